"""Full-parameter pre-training of a small LLaMA on rows: how the demo's base came to be.

One process, one loop, no adapters: this is not the trainer of the recipes. Rows stay apart (one statement per sequence,
padded on the right) because that is how they are fine-tuned on and evaluated; a causal model never sees the padding.

The defaults (1,200 steps of 192 rows, 3.1M parameters) take 13 minutes of processor time, 8 to 15 minutes on two cores.
They bring recall of 600 facts and both skills to 1.00.
"""

import math
import random
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from nslora_dist import artifacts

Row = dict[str, str]
IGNORED = -100  # the label of a position that is not scored
STATE_SECONDS = 60.0
"""How much of a pre-training a kill may cost."""


@dataclass(frozen=True)
class PretrainSettings:
    """How a small base is trained.

    Attributes:
        steps: Optimizer steps.
        batch_rows: Rows per step.
        mixture: Kind of row to its share of each batch; shares sum to 1.
        learning_rate: Peak of the cosine, reached after `warmup_ratio` of the steps.
        warmup_ratio: Share of steps spent warming up.
        weight_decay: Decoupled weight decay of AdamW, on matrices alone.
        max_grad_norm: Gradient clipping.
        prompt_weight: Loss weight of a prompt token against a response token's 1: names and digits of a prompt are
            drawn at random, so most of their loss cannot be learnt away.
        seed: Seed of weights and batches.
    """

    steps: int = 1200
    batch_rows: int = 192
    mixture: dict[str, float] = field(default_factory=lambda: {"facts": 0.5, "sum": 0.3, "maximum": 0.2})
    learning_rate: float = 2e-3
    warmup_ratio: float = 0.05
    weight_decay: float = 0.05
    max_grad_norm: float = 1.0
    prompt_weight: float = 0.1
    seed: int = 0


def build_model(
    tokenizer: PreTrainedTokenizerFast,
    *,
    hidden_size: int = 256,
    intermediate_size: int = 704,
    layers: int = 4,
    heads: int = 4,
    kv_heads: int = 2,
    seed: int = 0,
) -> LlamaForCausalLM:
    """Makes an untrained LLaMA in float32.

    Args:
        tokenizer: Gives vocabulary size and special tokens.
        hidden_size: Width; a multiple of 64, the block of NF4.
        intermediate_size: Width inside the MLP; a multiple of 64.
        layers: Number of blocks.
        heads: Query heads.
        kv_heads: Key and value heads; fewer than `heads` is grouped-query attention.
        seed: Seed of the weights.

    Returns:
        The model, head and embedding untied.

    Raises:
        ValueError: If a width is no multiple of 64.
    """
    for name, width in (("hidden_size", hidden_size), ("intermediate_size", intermediate_size)):
        if width % 64:
            raise ValueError(f"{name}={width}: must be a multiple of 64, or NF4's blocks straddle rows")
    config = LlamaConfig(
        vocab_size=math.ceil(len(tokenizer) / 64) * 64,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).float()


def encode(rows: Sequence[Row], tokenizer: PreTrainedTokenizerFast) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokenises rows as ``<bos> prompt response <eos>``, padded on the right.

    Returns:
        ids: Token ids, (rows, longest), int64.
        is_response: True on response tokens and ``<eos>``, same shape.
    """
    prompts = tokenizer([row["prompt"] for row in rows])["input_ids"]
    responses = tokenizer([row["response"] for row in rows], add_special_tokens=False)["input_ids"]
    longest = max(len(p) + len(r) + 1 for p, r in zip(prompts, responses, strict=True))
    ids = torch.full((len(rows), longest), tokenizer.pad_token_id)
    is_response = torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        end = len(prompt) + len(response) + 1
        ids[i, :end] = torch.tensor([*prompt, *response, tokenizer.eos_token_id])
        is_response[i, len(prompt) : end] = True
    return ids, is_response


def pretrain(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    rows: dict[str, list[Row]],
    settings: PretrainSettings,
    *,
    state: Path | None = None,
) -> list[float]:
    """Trains all parameters in place.

    Args:
        model: The model, float32, on any device.
        tokenizer: Its tokenizer.
        rows: Rows by kind; the kinds of ``settings.mixture``.
        settings: The settings.
        state: A file that the state is kept in every ``STATE_SECONDS``, to go on from to the same bits; the caller
            removes it when the model is saved. It has to be this model's, these rows' and these settings' own.

    Returns:
        The loss of every step.

    Raises:
        UserError: If the file of the state is damaged.
        ValueError: If a kind of the mixture has no rows, or the shares do not sum to 1.
    """
    missing = [kind for kind in settings.mixture if not rows.get(kind)]
    if missing or not math.isclose(sum(settings.mixture.values()), 1.0):
        raise ValueError(f"mixture={settings.mixture}: shares must sum to 1 and each kind needs rows (none: {missing})")
    encoded = {kind: encode(rows[kind], tokenizer) for kind in settings.mixture}
    streams = {kind: _shuffled_for_ever(len(rows[kind]), settings.seed + i) for i, kind in enumerate(settings.mixture)}
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98))

    losses = [] if state is None or not state.is_file() else _restore(state, model, optimizer)
    counts = {kind: round(share * settings.batch_rows) for kind, share in settings.mixture.items()}
    for kind, count in counts.items():
        deque(islice(streams[kind], len(losses) * count), maxlen=0)
    device, kept_at = model.device, time.monotonic()
    model.train()
    first = len(losses)
    progress = tqdm(
        range(first, settings.steps),
        desc="pre-training",
        unit="step",
        mininterval=1.0,
        initial=first,
        total=settings.steps,
    )
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * _cosine(step, settings)
        drawn = []
        for kind, count in counts.items():
            chosen = list(islice(streams[kind], count))
            drawn.append((encoded[kind][0][chosen], encoded[kind][1][chosen]))
        # One forward pass per kind: rows of a kind are about equally long, so hardly any padding is computed. A GPU
        # waits for its kernels to be launched at such sizes, and is sooner done with fewer of them and some padding.
        parts = [_joined(drawn, tokenizer.pad_token_id)] if device.type == "cuda" else drawn
        loss_sum, weight_sum = torch.zeros((), device=device), 0.0
        for ids, is_response in parts:
            part, weight = _weighted_loss(
                model, ids.to(device), is_response.to(device), tokenizer.pad_token_id, settings
            )
            loss_sum, weight_sum = loss_sum + part, weight_sum + weight
        loss = loss_sum / weight_sum
        if not torch.isfinite(loss):
            raise ValueError(
                f"loss is {loss.item()} at step {len(losses)}: lower learning_rate={settings.learning_rate}"
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if state is not None and time.monotonic() - kept_at >= STATE_SECONDS:
            _keep(state, model, optimizer, losses)
            kept_at = time.monotonic()
        if len(losses) % 20 == 0:
            progress.set_postfix(loss=f"{losses[-1]:.3f}")
    model.eval()
    return losses


MOMENTS = ("exp_avg", "exp_avg_sq")


def _keep(path: Path, model: LlamaForCausalLM, optimizer: torch.optim.AdamW, losses: Sequence[float]) -> None:
    """Writes all that the next step depends on."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for number, own in optimizer.state_dict()["state"].items():
        tensors |= {f"{moment}.{number}": own[moment] for moment in MOMENTS}
    artifacts.save_tensors(path, tensors | {"losses": torch.tensor(losses, dtype=torch.float64)})


def _restore(path: Path, model: LlamaForCausalLM, optimizer: torch.optim.AdamW) -> list[float]:
    """The inverse of ``_keep``: the losses so far."""
    found = artifacts.load_tensors(path)
    model.load_state_dict({name: found[f"model.{name}"] for name in model.state_dict()})
    losses: list[float] = found["losses"].tolist()
    whole = optimizer.state_dict()
    numbers = [number for group in whole["param_groups"] for number in group["params"]]
    step = torch.tensor(float(len(losses)))
    own = {n: {"step": step.clone()} | {moment: found[f"{moment}.{n}"] for moment in MOMENTS} for n in numbers}
    optimizer.load_state_dict(whole | {"state": own})
    return losses


@torch.no_grad()
def greedy_exact_match(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, rows: Sequence[Row], *, batch_rows: int = 256
) -> float:
    """Share of rows whose response and ``<eos>`` greedy decoding would write exactly.

    Decided in one forward pass: greedy decoding writes the reference if and only if every reference token is the most
    likely one after the reference's own prefix.
    """
    right = 0
    for start in range(0, len(rows), batch_rows):
        ids, is_response = encode(rows[start : start + batch_rows], tokenizer)
        best = model(input_ids=ids).logits[:, :-1].argmax(-1)  # (rows, longest - 1)
        right += ((best == ids[:, 1:]) | ~is_response[:, 1:]).all(dim=1).sum().item()
    return right / len(rows)


def save_base(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: str | Path) -> LlamaForCausalLM:
    """Saves model (bfloat16 safetensors) and tokenizer and gives back what a user will load.

    Measure recall on the returned model: rounding to bfloat16 is part of the base.
    """
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True).eval()


def _joined(parts: Sequence[tuple[torch.Tensor, torch.Tensor]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Batches of ``encode`` as one, padded on the right to the longest."""
    longest = max(ids.shape[1] for ids, _ in parts)
    pad = torch.nn.functional.pad
    return (
        torch.cat([pad(ids, (0, longest - ids.shape[1]), value=pad_id) for ids, _ in parts]),
        torch.cat([pad(mask, (0, longest - mask.shape[1]), value=False) for _, mask in parts]),
    )


def _weighted_loss(
    model: LlamaForCausalLM, ids: torch.Tensor, is_response: torch.Tensor, pad_id: int, settings: PretrainSettings
) -> tuple[torch.Tensor, float]:
    """Summed loss of one batch and the sum of its weights; `ids` and `is_response` are (rows, longest)."""
    # No attention mask: padding is on the right, where a causal model does not look, and its labels are ignored.
    logits = model(input_ids=ids).logits[:, :-1]
    labels = ids[:, 1:].masked_fill(ids[:, 1:] == pad_id, IGNORED)
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    weights = torch.where(is_response[:, 1:], 1.0, settings.prompt_weight) * (labels != IGNORED)
    return (losses * weights).sum(), weights.sum().item()


def _cosine(step: int, settings: PretrainSettings) -> float:
    """Learning-rate factor: linear warm-up, then half a cosine down to 0."""
    warmup = max(1, round(settings.warmup_ratio * settings.steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, settings.steps - warmup)))


def _shuffled_for_ever(count: int, seed: int) -> Iterator[int]:
    """Indices in a new order each epoch, so that every row comes round equally often."""
    rng = random.Random(seed)
    while True:
        yield from rng.sample(range(count), count)
