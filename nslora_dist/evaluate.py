"""What an adapter learned and what it disturbed: adaptation, retention, and interference by a forward pass."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nslora_dist import dist, watch
from nslora_dist.adapter import adapted_linears, observed
from nslora_dist.bad_rows import RowCounts
from nslora_dist.calibration.store import MIXTURE
from nslora_dist.calibration_data import CalibrationTexts, text_batches
from nslora_dist.data import Batch, deal_evaluation, evaluation_samples
from nslora_dist.engines import Engine
from nslora_dist.errors import Preempted
from nslora_dist.lm_eval_bridge import LmEval
from nslora_dist.recipe import EvaluationSection, PromptSet
from nslora_dist.supervised import Compared

ADAPTATION = "adaptation"


@dataclass(frozen=True)
class EvaluationSets:
    """This rank's batches of the adaptation set and of every retention set.

    Attributes:
        adaptation: None where it was not asked for.
        retention: By name.
        counts: ``adaptation`` or ``retention.<name>`` → what became of the set's rows, over all ranks.
        lm_eval: lm-eval's tasks, where the recipe names some.
    """

    adaptation: list[Batch] | None
    retention: dict[str, list[Batch]]
    counts: dict[str, RowCounts] = field(default_factory=dict)
    lm_eval: LmEval | None = None

    @classmethod
    def load(
        cls, section: EvaluationSection, tokenizer: PreTrainedTokenizerBase, *, base: Path | None = None
    ) -> "EvaluationSets":
        """Reads and tokenises every set; every rank must call this.

        Args:
            section: the recipe's.
            tokenizer: the base's.
            base: its folder; lm-eval's tasks are left out without one.

        Raises:
            UserError: rows that cannot be read, or tasks that lm-eval cannot run.
        """
        counts: dict[str, RowCounts] = {}

        def load(where: str, prompts: PromptSet) -> list[Batch]:
            name = f"evaluation.{where}"
            samples = evaluation_samples(prompts, tokenizer, max_length=section.max_length, name=name)
            counts[where] = samples.counts
            here = {"rank": dist.rank(), "world_size": dist.world_size()}
            return deal_evaluation(samples, tokenizer, batch_size=section.batch_size, **here)

        return cls(
            adaptation=None if section.adaptation is None else load("adaptation", section.adaptation),
            retention={name: load(f"retention.{name}", prompts) for name, prompts in section.retention.items()},
            counts=counts,
            lm_eval=LmEval(section.lm_eval, tokenizer, base) if section.lm_eval is not None and base else None,
        )

    def before_training(self) -> "EvaluationSets":
        """What is measured on the base."""
        left_out = self.lm_eval is not None and not self.lm_eval.section.before
        return replace(self, lm_eval=None) if left_out else self


def exact_match(engine: Engine, batches: Sequence[Batch], *, device: torch.device, name: str = "questions") -> float:
    """Share of questions that greedy decoding answers exactly, over all ranks, in 0..1.

    Raises:
        Preempted: a rank was asked to stop before the set named ``name``.
    """
    if dist.stopping():
        raise Preempted(
            f"evaluation: stopped before {name}, as asked; the same command continues from {watch.continues_from()}"
        )
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    for number, batch in enumerate(batches, start=1):
        watch.progress(f"{name}, batch {number} of {len(batches)}")
        totals[0] += engine.matches(batch.to(device)).sum()
        totals[1] += batch.supervised_rows
    right, asked = dist.all_reduce(totals).tolist()
    return right / asked


def evaluate(engine: Engine, sets: EvaluationSets, *, device: torch.device) -> dict[str, Any]:
    """``adaptation``, ``retention`` (the mean over names) and ``retention_by`` name; None where nothing was asked.

    ``lm_eval``, as ``LmEval.run`` gives it, where the recipe names tasks.
    """
    retention = {
        name: exact_match(engine, batches, device=device, name=name) for name, batches in sets.retention.items()
    }
    task = sets.adaptation
    return {
        "adaptation": None if task is None else exact_match(engine, task, device=device, name=ADAPTATION),
        "retention": sum(retention.values()) / len(retention) if retention else None,
        "retention_by": retention,
        **({} if sets.lm_eval is None else {"lm_eval": sets.lm_eval.run(engine, device=device)}),
    }


def even_batches(batches: list[Batch], *, device: torch.device) -> list[Batch]:
    """This rank's text batches, filled up so that every rank runs the same number through a sharded model."""
    most = torch.tensor([len(batches)], device=device)
    if dist.world_size() > 1:
        torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
    idle = torch.zeros(1, 2, dtype=torch.int64)
    # A mask that is all zero counts nothing; its row attends to nothing, so its first token is left in and masked off
    # by the caller through ``labels``.
    filler = Batch(idle, None, None, torch.full_like(idle, -100), unmasked_padding=2)
    return batches + [filler] * (int(most) - len(batches))


def forward_interference(
    engine: Engine, texts: Sequence[CalibrationTexts], *, batch_size: int, device: torch.device
) -> dict[str, dict[str, Tensor]]:
    """‖ΔW X‖_F / ‖W X‖_F on the base's activations, by a forward pass over each source and probe (METHODS.md §1d).

    For adapters whose A trained or whose calibration did not keep A G Aᵀ; the delta form with frozen A knows the same
    number from r × r matrices.

    Returns:
        name → module → () float64. The mixture of the sources, in which a source counts by its weight over the energy
        of its inputs, as its Gram does in METHODS.md §1d, stands under ``calibration``.
    """
    found: dict[str, dict[str, Tensor]] = {}
    mixed: dict[str, Tensor] = {}
    for text in texts:
        batches = text_batches(text.calibration, batch_size=batch_size, rank=dist.rank(), world_size=dist.world_size())
        with observed(engine.model) as seen:
            for batch in even_batches(batches, device=device):
                watch.progress(f"interference with {text.name}")
                real = torch.ones_like(batch.input_ids) if batch.attention_mask is None else batch.attention_mask
                seen.mask = (real.bool() & (batch.unmasked_padding == 0)).to(device)
                engine.matches(batch.to(device))
        names = list(seen.update)
        sums = torch.stack([torch.stack([seen.update[name], seen.output[name], seen.input[name]]) for name in names])
        dist.all_reduce(sums)
        found[text.name] = {}
        for name, (update, output, energy) in zip(names, sums, strict=True):
            found[text.name][name] = (update / output).sqrt()
            if text.weight is not None:
                share = text.weight / energy * torch.stack([update, output])
                mixed[name] = mixed[name] + share if name in mixed else share
    found[MIXTURE] = {name: (update / output).sqrt() for name, (update, output) in mixed.items()}
    return found


def divergence(
    engine: Engine, texts: Sequence[CalibrationTexts], *, batch_size: int, device: torch.device
) -> dict[str, float]:
    """How far the adapted model's next tokens are from the base's: mean over tokens of KL(base ‖ adapted), in nats.

    Interference looks at each module by itself and at the base's own activations. What all updates come to together,
    each reading what those before it have moved, it cannot see; this can, for two passes over the texts, collective.

    Returns:
        Source or probe → mean; under ``calibration`` that of the sources by their weights.
    """
    found: dict[str, float] = {}
    for text in texts:
        batches = text_batches(text.calibration, batch_size=batch_size, rank=dist.rank(), world_size=dist.world_size())
        total = torch.zeros(2, dtype=torch.float64, device=device)
        for batch in even_batches(batches, device=device):
            watch.progress(f"divergence on {text.name}")
            compared = Compared(**vars(batch.to(device)))
            with observed(engine.model):
                base = engine.matches(compared)
            total += engine.matches(replace(compared, against=base))
        nats, tokens = dist.all_reduce(total).tolist()
        found[text.name] = nats / tokens
    weights = {text.name: text.weight for text in texts if text.weight is not None}
    if weights:
        found[MIXTURE] = sum(weight * found[name] for name, weight in weights.items()) / sum(weights.values())
    return found


def live_interference(engine: Engine) -> dict[str, dict[str, Tensor]]:
    """name → module → (), what the last forward pass with ``measure`` set left on the adapted linears."""
    found: dict[str, dict[str, Tensor]] = {}
    for module, adapted in adapted_linears(engine.model).items():
        for name, value in adapted.interference.items():
            found.setdefault(name, {})[module] = value
    return found


def summarise(
    found: Mapping[str, Mapping[str, Tensor]],
    texts: Sequence[CalibrationTexts],
    divergence: Mapping[str, float] | None = None,
) -> dict[str, Any] | None:
    """``max``, ``mean``, ``rms`` and ``per_module`` of the mixture; ``by_source``, ``by_probe`` with the first three.

    Where ``divergence`` is given, each of them has its ``divergence`` too.
    """
    if not found:
        return None

    def ends(name: str) -> dict[str, float]:
        stacked = torch.stack(list(found[name].values())).double()
        rms = stacked.square().mean().sqrt()
        ends = {"max": float(stacked.max()), "mean": float(stacked.mean()), "rms": float(rms)}
        return ends if divergence is None else ends | {"divergence": divergence[name]}

    return {
        **ends(MIXTURE),
        "per_module": {module: float(value) for module, value in found[MIXTURE].items()},
        "by_source": {text.name: ends(text.name) for text in texts if text.weight is not None},
        "by_probe": {text.name: ends(text.name) for text in texts if text.weight is None},
    }
