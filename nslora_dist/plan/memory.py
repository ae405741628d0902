"""Bytes held: parameters and optimizer, activations kept for backward, what is gathered, and the calibration pass.

Every function returns named parts, so that a table can say what takes the room. Tensors below a few hundred bytes
(optimizer step counts, scalars) are left out.
"""

from dataclasses import dataclass

from nslora_dist.eigensolver import block_size
from nslora_dist.linear import HEAD_CHUNK_BYTES
from nslora_dist.plan import zero3
from nslora_dist.plan.shapes import Group, Linear, Shapes, is_null_basis
from nslora_dist.plan.traffic import FLOAT32, FLOAT64, Texts, fsdp2_gather, fsdp2_units, padded, padded_rows

INT64 = 8
CACHED_WIDTH = 8192
"""Up to this width the fast solver keeps a float64 copy of the Gram (``eigensolver._CACHED_ENTRIES``)."""
RNG_STATE = 5056
"""The CPU generator's state, kept by every checkpointed block."""

Parts = dict[str, float]


@dataclass(frozen=True)
class Batch:
    """One rank's rows that go through at once.

    Attributes:
        rows: b.
        length: s, tokens of a row with padding.
        masked: whether an attention mask exists: rows are padded or packed, and attention is not FlashAttention 2.
        supervised: share of tokens with a label.
    """

    rows: int
    length: int
    masked: bool = False
    supervised: float = 1.0

    @property
    def tokens(self) -> int:
        """b · s."""
        return self.rows * self.length


def state(shapes: Shapes, world_size: int, engine: str, knobs: zero3.Knobs) -> tuple[Parts, Parts]:
    """What lies on a rank between steps, and gradients after a backward pass: (on the device, in host memory).

    FSDP2: rows padded to the ranks; trained parameters float32; AdamW two float32 moments of the rank's own rows (at
    most the padded ones); float32 gradients of padded rows. ZeRO-3: elements padded; trained parameters in the compute
    dtype with a float32 master, two moments and a float32 gradient partition. 4-bit scales are whole on every rank.
    """

    def share(trained: bool) -> list[tuple[int, int]]:
        chosen = [p for p in shapes.params if p.trained == trained]
        if engine == "zero3":
            return [(padded(p.numel, world_size) // world_size, p.itemsize) for p in chosen]
        return [(padded_rows(p, world_size) // world_size, p.itemsize) for p in chosen]

    frozen, trained = share(False), share(True)
    count = sum(numel for numel, _ in trained)
    held = {
        "frozen weights": float(sum(n * size for n, size in frozen)),
        "trained weights": float(sum(n * size for n, size in trained)),
    }
    if engine == "zero3":
        optimizer = {"float32 masters": 4.0 * count, "AdamW moments": 8.0 * count, "gradients": 4.0 * count}
    else:
        optimizer = {"AdamW moments": 8.0 * count, "gradients": 4.0 * count}
    device: Parts = {}
    host: Parts = {}
    offload = engine == "zero3"
    (host if offload and knobs.offload_param else device).update(held)
    (host if offload and knobs.offload_optimizer else device).update(optimizer)
    if shapes.quantized:
        device["4-bit scales"] = float(shapes.layers * shapes.quant_state)
    return device, host


def norm_saved(width: int) -> int:
    """Bytes a token an RMS norm keeps: its input in float32 (widened if need be) and 1 / rms (``LlamaRMSNorm``)."""
    return FLOAT32 * width + FLOAT32


def block_saved(shapes: Shapes, batch: Batch, *, attention: str, first: bool = False) -> float:
    """Bytes one block keeps for backward without checkpointing.

    Per token: two norms (``norm_saved``); query, key and value after rotation, the attention's output and its float32
    log-sum (sdpa; under a mask keys and values are repeated to all heads and a float mask of s a token is kept; eager
    keeps the probabilities twice); gate, silu(gate) and up (``LlamaMLP``); z of each adapter; and where A trains, the
    inputs it saw. Linears keep none. In the first block the input takes no gradient, so its norm keeps nothing.
    """
    c, h, wide = shapes.compute, shapes.hidden, shapes.intermediate
    query, key = shapes.heads * shapes.head_dim, shapes.kv_heads * shapes.head_dim
    per_token = norm_saved(h) * (1 if first else 2)
    repeated = query if batch.masked and attention != "flash_attention_2" else key
    per_token += c * (2 * query + 2 * repeated)
    if attention == "eager":
        per_token += (FLOAT32 + c) * shapes.heads * batch.length - c * query
    else:
        per_token += FLOAT32 * shapes.heads
        per_token += c * batch.length if batch.masked and attention == "sdpa" else 0
    if shapes.qk_norm:
        per_token += norm_saved(shapes.head_dim) * (shapes.heads + shapes.kv_heads)
    per_token += 3 * c * wide
    per_token += c * shapes.adapter.rank * sum(linear.adapted for linear in shapes.linears)  # z = A x of each
    if shapes.adapter.a_trains:  # o_proj reads the attention's output, which is kept already
        read = {_input_of(shapes, linear) for linear in shapes.linears if linear.adapted}
        per_token += c * h * len(read & {"input norm", "MLP norm"}) + c * wide * ("product" in read)
    return float(per_token * batch.tokens)


def _input_of(shapes: Shapes, linear: Linear) -> str:
    if linear.name in shapes.readers:
        return "input norm"
    if linear.d_in == shapes.intermediate and linear.d_out == shapes.hidden:
        return "product"
    return "MLP norm" if linear.d_out == shapes.intermediate else "attention"


def saved(shapes: Shapes, batch: Batch, *, attention: str, checkpointing: bool, engine: str) -> Parts:
    """Bytes kept between forward and backward of one micro-batch.

    With checkpointing a block keeps its input and the generator's state. Always: the final norm, the head's input
    gradient (made in forward, ``_HeadLoss``) with the index of its tokens, cos and sin of the rotation, the mask, and
    on engines that hold adapters wider than they compute, their narrow copies (FSDP2 gathers them narrow already, but
    beside 4-bit weights); Null-LoRA's factors of the whole rank, which it makes anew in every forward pass from what it
    trains.
    """
    c, h = shapes.compute, shapes.hidden
    labelled = batch.supervised * batch.rows * (batch.length - 1)
    if checkpointing:
        blocks = shapes.layers * (float(c * h * batch.tokens) + RNG_STATE)
        if c == FLOAT32:
            blocks += c * h * batch.tokens  # the last block's output, which the final norm keeps as it is
    else:
        blocks = block_saved(shapes, batch, attention=attention, first=True)
        blocks += (shapes.layers - 1) * block_saved(shapes, batch, attention=attention)
    final = norm_saved(h) * batch.tokens
    if checkpointing and c == FLOAT32:
        final -= FLOAT32 * h * batch.tokens
    parts = {
        "blocks": blocks,
        "final norm": float(final),
        "head": labelled * (c * h + 2 * INT64),
        "rotation and mask": float(2 * c * shapes.head_dim * batch.length)
        + (batch.tokens * batch.length if batch.masked else 0),
    }
    if shapes.adapter.null_lora and not checkpointing:
        parts["composed factors"] = 2.0 * c * sum(p.numel for p in shapes.trained)
    elif engine == "single" and shapes.adapter.item != c and not checkpointing:
        parts["narrow adapters"] = float(sum(p.numel for u in shapes.units for p in u.params if "lora_" in p.name) * c)
    elif engine == "fsdp2" and shapes.quantized and c != FLOAT32 and not checkpointing:
        parts["narrow adapters"] = float(sum(p.numel for p in shapes.trained) * c)
    return parts


def transient(shapes: Shapes, batch: Batch, *, attention: str, checkpointing: bool) -> Parts:
    """What comes and goes on top during backward, at its highest.

    At the final norm, before anything kept is freed, four float32 and two compute-dtype copies of a row's h; inside the
    MLP two gradients of I and two of h, where checkpointing has one block's kept activations beside them. Before
    that, in forward, the head's chunk of logits. 4-bit weights add one unpacked one.
    """
    c, h, wide = shapes.compute, shapes.hidden, shapes.intermediate
    recomputed = block_saved(shapes, batch, attention=attention) if checkpointing else 0.0
    mlp = recomputed + batch.tokens * (2 * c * wide + 2 * c * h) + (shapes.dense_block if shapes.quantized else 0)
    norm = float(batch.tokens * (4 * FLOAT32 + 2 * c) * h)
    rows = min(batch.supervised * batch.tokens, max(1, HEAD_CHUNK_BYTES // (FLOAT32 * shapes.vocabulary)))
    head = rows * shapes.vocabulary * (FLOAT32 + c) + c * h * batch.supervised * batch.tokens
    if checkpointing and mlp >= max(norm, head):
        return {"recomputed block": recomputed, "gradients of activations": mlp - recomputed}
    name = "head's logits" if head > max(norm, mlp) else "gradients of activations"
    return {name: max(head, norm, mlp)}


def gathered(shapes: Shapes, world_size: int, engine: str, knobs: zero3.Knobs, *, checkpointing: bool) -> Parts:
    """Parameters whole on a rank for a moment, and buffers for gradients on their way.

    FSDP2: a unit's all-gather output is kept until the next one has been copied out (``wait_for_unshard``), so two
    outputs and the current unit's parameters; the root's group; a block's gradients in float32 twice (reduce-scatter in
    and out) and in the compute dtype. ZeRO-3: the replay's highest, and one bucket.
    """
    if engine == "single" or world_size == 1:
        return {}
    if engine == "zero3":
        live = zero3.steady(shapes, knobs, checkpointing=checkpointing).live
        return {"gathered": float(live), "gradient bucket": float(knobs.bucket * FLOAT32)}
    units = fsdp2_units(shapes)
    sizes = [fsdp2_gather(unit, shapes, world_size) for unit in units]
    most = max(before + 2 * now for before, now in zip([0, *sizes[1:]], sizes[1:], strict=False))
    grads = sum(padded_rows(p, world_size) for p in shapes.block.params if p.trained)
    return {"gathered": float(sizes[0] + most), "gradient buffers": float(grads * (2 * FLOAT32 + shapes.compute))}


@dataclass(frozen=True)
class CalibrationLoad:
    """One rank's share of the calibration texts.

    Attributes:
        texts: how many sets.
        tokens: of all sets together, on this rank.
        batch: what goes through a block at once.
        on_host: whether hidden states wait in host memory.
        method: the solver's.
        owned: groups of a block that this rank solves.
        native: whether bfloat16 products are summed in float32 by matrix units (a GPU), without widened inputs.
    """

    texts: Texts
    tokens: float
    batch: Batch
    on_host: bool
    method: str
    owned: tuple[Group, ...]
    native: bool = True


def solver_workspace(shapes: Shapes, group: Group, *, sources: int, method: str) -> float:
    """Bytes beyond the sources' Grams while one group is solved (``solve_group``, ``null_basis``).

    The mixture where there are several sources. eigh: four float64 matrices (``gram.double``, the vectors, and twice
    that as LAPACK's workspace). fast: the shifted Gram and its factor in float32, a float64 copy up to 8,192 wide, and
    the Krylov space with its image (about ten float64 blocks in all). Unpacked 4-bit weights of the group's modules.
    """
    d = group.width
    square = float(d * d)
    mixture = FLOAT32 * square if sources > 1 else 0.0
    if method == "eigh" or d < max(512, 10 * block_size(shapes.adapter.rank)):
        work = 4 * FLOAT64 * square
    else:
        work = 2 * FLOAT32 * square + (FLOAT64 * square if d <= CACHED_WIDTH else 0.0)
        work += 10 * FLOAT64 * d * block_size(shapes.adapter.rank)
    dense = float(shapes.compute * d * sum(group.outputs)) if shapes.quantized else 0.0
    return mixture + work + dense


def calibration(
    shapes: Shapes, load: CalibrationLoad, world_size: int, *, overlapped: bool = True
) -> tuple[Parts, Parts]:
    """The highest of the streamed pass: (on the device, in host memory).

    While a block's sequences run, its Grams are summed and the ones of the source before are on their way as triangles;
    the block before is still there with its owners' Grams being solved in a thread. ``overlapped=False`` is the same
    without the thread: the higher of running (two blocks) and solving (one).
    """
    texts, c, h, wide = load.texts, shapes.compute, shapes.hidden, shapes.intermediate
    block = shapes.block.base_bytes + shapes.quant_state
    full = [float(FLOAT32 * g.width**2) for g in shapes.groups]
    own = [float(FLOAT32 * g.width**2) for g in load.owned]
    half = 0.5 if world_size > 1 else 1.0
    # The last source's pass: its Grams, the source's before as triangles, and the sources' before that where owned.
    summing = sum(full)
    if texts.sources > 1:
        summing += half * sum(full) + max(0, texts.sources - 2) * sum(own)
    # Packing frees each Gram behind its triangle; the owner then unpacks: triangles and its whole Grams.
    packing = half * sum(full) + sum(own) * texts.sources if world_size > 1 else 0.0
    grams = max(summing, packing)
    solving = max(
        (
            texts.sources * sum(own[place:]) + solver_workspace(shapes, g, sources=texts.sources, method=load.method)
            for place, g in enumerate(load.owned)
        ),
        default=0.0,
    )
    hidden = float(load.tokens * c * h)
    ids = float(load.tokens * 2 * INT64)
    mask = load.batch.masked
    # silu(gate), up and their product; or the product beside its float32 copy for the Gram (``add_gram``), or on a GPU
    # a float32 tile of a quarter of the Gram instead; and the block's and the norm's own rows.
    widened = 0 if load.native or c == FLOAT32 else FLOAT32 * wide
    widest = max(3 * c * wide, c * wide * (2 if mask else 1) + widened)
    running = float(load.batch.tokens * (widest + 2 * c * h + (c * h if load.on_host else 0)))
    if load.native:
        running += FLOAT32 * (max(g.width for g in shapes.groups) / 2) ** 2
    if shapes.quantized:
        running += shapes.dense_block
    parts: Parts = {
        "block weights": 2.0 * block,
        "token ids": ids,
    }
    if overlapped:
        parts |= {"Grams": grams, "activations": running, "solver": solving}
    elif block + grams + running >= solving:
        parts |= {"Grams": grams, "activations": running}
    else:
        parts |= {"block weights": float(block), "solver": solving}
    host: Parts = {}
    (host if load.on_host else parts)["hidden states"] = hidden
    return parts, host


def null_space_bytes(shapes: Shapes, texts: Texts) -> float:
    """Float32 bytes of ``null_space.safetensors``, and what rank 0 holds of it in host memory (``store``).

    Of Null-LoRA: of ``weight_null_space.safetensors``, at most, with ``null_dim`` directions on every side.
    """
    adapter = shapes.adapter
    if adapter.null_lora:
        return float(FLOAT32 * sum(p.numel for p in shapes.params if is_null_basis(p.name)))
    if not adapter.null_space:
        return 0.0
    rank, total = adapter.rank, 0
    for group in shapes.groups:
        total += group.width * rank + rank + (group.width if group.width <= 2048 else 0) + texts.grams * rank * rank
        total += len(group.outputs) * rank * rank if adapter.projected else 0
        total += rank * sum(group.outputs) if adapter.residual else 0
    return float(FLOAT32 * total * shapes.layers)


def checkpoint_bytes(shapes: Shapes) -> float:
    """One checkpoint: of every trained parameter the float32 master and AdamW's two moments."""
    return 12.0 * sum(p.numel for p in shapes.trained)


def adapter_bytes(shapes: Shapes) -> float:
    """Bytes of ``adapter_model.safetensors``: A and B in the compute dtype, of rank 2r in residual form.

    Null-LoRA trains half of each and exports both halves in float32.
    """
    numel = sum(p.numel for p in shapes.params if p.name.endswith(("lora_A", "lora_B")))
    if shapes.adapter.null_lora:
        return float(2 * FLOAT32 * numel)
    return float(numel * shapes.compute * (2 if shapes.adapter.residual else 1))
