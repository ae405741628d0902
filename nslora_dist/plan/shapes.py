"""A recipe's model as plain numbers: parameters by unit, input groups, and the order of a block's modules.

Read off the model built on the meta device (``build_empty``, ``attach_adapters``), so a plan needs the config alone and
follows the code where layouts, biases or packing change.
"""

from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from nslora_dist.attach import attach_adapters
from nslora_dist.base_config import planning_config
from nslora_dist.base_model import blocks, build_empty, torch_dtype, units
from nslora_dist.engines.base import adapter_dtype
from nslora_dist.frozen import FrozenLinear
from nslora_dist.input_groups import input_groups, target_groups
from nslora_dist.nf4 import BLOCK as NF4_BLOCK
from nslora_dist.recipe import Recipe

NESTED_BLOCK = 256
"""Of bitsandbytes' double quantisation: float32 scales, one for so many 8-bit ones."""


@dataclass(frozen=True)
class Param:
    """One parameter: its shape as stored (4-bit weights packed), bytes per element as stored, and whether it trains."""

    name: str
    shape: tuple[int, ...]
    itemsize: int
    trained: bool

    @property
    def numel(self) -> int:
        """Stored elements."""
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        """Stored bytes."""
        return self.numel * self.itemsize


@dataclass(frozen=True)
class Unit:
    """What is loaded, sharded and gathered as a whole: embedding, a block, the final norm, the head (``units``)."""

    name: str
    params: tuple[Param, ...]

    @property
    def bytes(self) -> int:
        """Stored bytes, adapters included."""
        return sum(p.bytes for p in self.params)

    @property
    def base_bytes(self) -> int:
        """Stored bytes of the frozen base alone."""
        return sum(p.bytes for p in self.params if not is_adapter(p.name))


@dataclass(frozen=True)
class Linear:
    """A linear of a block as the products see it: unpacked sizes; ``adapted`` where it has an adapter."""

    name: str
    d_in: int
    d_out: int
    adapted: bool


@dataclass(frozen=True)
class Group:
    """A targeted input group of a block: the width of its Gram, and d_out of its modules."""

    width: int
    outputs: tuple[int, ...]


@dataclass(frozen=True)
class Adapter:
    """The sizes that the adapter's method brings (``AdapterSection``)."""

    rank: int
    a_trains: bool
    residual: bool
    projected: bool
    null_space: bool
    item: int
    null_lora: bool = False


@dataclass(frozen=True)
class Shapes:
    """One model with one adapter.

    Attributes:
        units: in the order of the forward pass.
        linears: of one block; all blocks are alike.
        groups: targeted input groups of one block.
        order: one block's modules as the forward pass enters (True) and leaves (False) them, names inside the block.
        readers: names inside a block of the linears that read its normed input, adapted or not.
        layers: L, the number of blocks.
        hidden: h.
        intermediate: I, the widest activation of the MLP.
        heads: query heads.
        kv_heads: key and value heads.
        head_dim: width of a head.
        qk_norm: whether queries and keys are normalised (Qwen3).
        vocabulary: V.
        tied: whether the head is the embedding.
        compute: bytes of the compute dtype, 2 or 4.
        quantized: whether the blocks' linears are packed to 4 bits.
    """

    units: tuple[Unit, ...]
    linears: tuple[Linear, ...]
    groups: tuple[Group, ...]
    order: tuple[tuple[str, bool], ...]
    readers: tuple[str, ...]
    adapter: Adapter
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    qk_norm: bool
    vocabulary: int
    tied: bool
    compute: int
    quantized: bool

    @property
    def block(self) -> Unit:
        """The first block; the others are alike."""
        return next(unit for unit in self.units if unit.name.startswith("model.layers."))

    @property
    def params(self) -> tuple[Param, ...]:
        """Every parameter once."""
        return tuple(p for unit in self.units for p in unit.params)

    @property
    def trained(self) -> tuple[Param, ...]:
        """The parameters that take gradients."""
        return tuple(p for p in self.params if p.trained)

    @property
    def block_products(self) -> int:
        """Multiply-adds of one token through a block's frozen linears."""
        return sum(linear.d_in * linear.d_out for linear in self.linears)

    @property
    def adapter_flops(self) -> float:
        """Of one token through a block's adapters, forward: r (d_in + d_out) multiply-adds each."""
        return sum(2.0 * self.adapter.rank * (m.d_in + m.d_out) for m in self.linears if m.adapted)

    def attention_flops(self, length: int) -> float:
        """Causal scores and values of one token in one block, forward: 2 · s · heads · head_dim."""
        return 2.0 * length * self.heads * self.head_dim

    def forward_flops(self, length: int) -> float:
        """Of one token of a row of this length through one adapted block."""
        return 2.0 * self.block_products + self.adapter_flops + self.attention_flops(length)

    @property
    def quant_state(self) -> int:
        """Bytes a block's 4-bit scales take on *every* rank, for they are no parameters (``FrozenLinear.quant_state``).

        One byte per 64 weights, float32 per 256 of those, the two code books (16 and 256 float32) and the offset.
        """
        if not self.quantized:
            return 0
        total = 0
        for linear in self.linears:
            scales = -(-linear.d_in * linear.d_out // NF4_BLOCK)
            total += scales + 4 * -(-scales // NESTED_BLOCK) + 4 * (16 + 256 + 1)
        return total

    @property
    def dense_block(self) -> int:
        """Bytes of the largest linear of a block in the compute dtype: what unpacking one 4-bit weight takes."""
        return self.compute * max(linear.d_in * linear.d_out for linear in self.linears)

    @property
    def checkpoint(self) -> int:
        """Bytes of the base in 16 bits, as checkpoints are published."""
        dense = sum(p.numel for u in self.units for p in u.params if not is_adapter(p.name))
        if self.quantized:
            packed = sum(p.numel for u in self.units for p in u.params if p.shape[1:] == (1,))
            dense += self.layers * self.block_products - packed
        return 2 * dense


def is_adapter(name: str) -> bool:
    """Whether a parameter belongs to an adapter and not to the base."""
    return name.rsplit(".", 1)[-1] in ("lora_A", "lora_B", "start_A", "start_B") or is_null_basis(name)


def is_null_basis(name: str) -> bool:
    """Whether a parameter is one of Null-LoRA's bases, which stay in training and are no part of an export."""
    return name.rsplit(".", 1)[-1] in ("null_in", "null_out")


def shapes_of(recipe: Recipe, config: PreTrainedConfig | None = None) -> Shapes:
    """Reads the shapes off the recipe's model on the meta device; ``base_model.config`` spares the checkpoint.

    Raises:
        UserError: the config cannot be had, or the recipe does not fit the model.
    """
    base, section = recipe.base_model, recipe.adapter
    config = planning_config(base) if config is None else config
    layers = int(config.num_hidden_layers)
    # Blocks are alike in size, so one is built and repeated: 80 would cost seconds and say nothing more.
    config = type(config).from_dict(config.to_dict() | {"num_hidden_layers": 1} | _first_layers(config))
    model = build_empty(base, config)
    every = input_groups(model)
    groups = target_groups(every, section)
    order = _order(model, base.attention)
    compute = torch_dtype(base)
    linears = {n: m for n, m in blocks(model)[0][1].named_modules() if isinstance(m, FrozenLinear)}
    targets = {shape.name.split(".", 3)[3] for group in groups for shape in group.modules}
    held = adapter_dtype(recipe, compute)
    attach_adapters(model, groups, section, held)
    found: list[Unit] = []
    for name, unit in units(model):
        params = tuple(
            Param(f"{name}.{key}", tuple(p.shape), p.element_size(), p.requires_grad)
            for key, p in unit.named_parameters()
        )
        found.append(Unit(name, params))
    place = next(i for i, unit in enumerate(found) if unit.name == "model.layers.0")
    first = found[place]
    copies = [
        Unit(name, tuple(replace(p, name=p.name.replace(first.name, name, 1)) for p in first.params))
        for name in (f"model.layers.{number}" for number in range(layers))
    ]
    heads = int(config.num_attention_heads)
    return Shapes(
        units=(*found[:place], *copies, *found[place + 1 :]),
        linears=tuple(Linear(n, m.in_features, m.out_features, n in targets) for n, m in linears.items()),
        groups=tuple(Group(g.in_features, tuple(m.out_features for m in g.modules)) for g in groups),
        order=_with_adapters(order, targets),
        readers=tuple(shape.name.split(".", 3)[3] for shape in every[0].modules),
        adapter=Adapter(
            rank=section.rank,
            a_trains=not section.a_is_frozen,
            residual=section.form == "residual",
            projected=section.a_init == "projected",
            null_space=section.method == "lora_null",
            item=held.itemsize,
            null_lora=section.method == "null_lora",
        ),
        layers=layers,
        hidden=int(config.hidden_size),
        intermediate=int(config.intermediate_size),
        heads=heads,
        kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
        qk_norm=any(name.endswith("q_norm") for name, _ in order),
        vocabulary=int(config.vocab_size),
        tied=bool(config.tie_word_embeddings),
        compute=compute.itemsize,
        quantized=base.quantization == "nf4",
    )


def _first_layers(config: PreTrainedConfig) -> dict[str, Any]:
    """Per-layer lists of a config, cut to the one layer that is built."""
    kinds = getattr(config, "layer_types", None)
    return {"layer_types": list(kinds[:1])} if kinds else {}


@torch.no_grad()
def _order(model: Any, attention: str) -> tuple[tuple[str, bool], ...]:
    """The modules of a block as its forward pass enters and leaves them, by running it once on the meta device."""
    _, block = blocks(model)[0]
    seen: list[tuple[str, bool]] = []
    hooks = []
    for path, module in block.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda m, a, p=path: seen.append((p, True))))
        hooks.append(module.register_forward_hook(lambda m, a, o, p=path: seen.append((p, False))))
        if isinstance(module, FrozenLinear):
            module.forward = _Product(module)  # type: ignore[method-assign, assignment]
    hidden = torch.empty(1, 4, model.config.hidden_size, dtype=model.dtype, device="meta")
    mask = torch.empty(1, 1, 4, 4, dtype=torch.bool, device="meta")
    positions = torch.empty(1, 4, dtype=torch.int64, device="meta")
    rotary = model.model.rotary_emb(hidden, position_ids=positions)
    block(hidden, attention_mask=mask, position_ids=positions, position_embeddings=rotary, use_cache=False)
    for hook in hooks:
        hook.remove()
    for module in block.modules():
        module.__dict__.pop("forward", None)
    return tuple(seen)


class _Product:
    """A linear's result without its weight, which may be packed and on the meta device cannot be unpacked."""

    def __init__(self, module: nn.Module) -> None:
        self.width = int(module.out_features)  # type: ignore[arg-type]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_empty(*x.shape[:-1], self.width)


def _with_adapters(order: tuple[tuple[str, bool], ...], targets: set[str]) -> tuple[tuple[str, bool], ...]:
    """Puts ``name.base`` inside every adapted linear ``name``, as ``AdaptedLinear`` does."""
    found: list[tuple[str, bool]] = []
    for name, enters in order:
        pair = [(name, enters), (f"{name}.base", enters)]
        found += (pair if enters else pair[::-1]) if name in targets else [(name, enters)]
    return tuple(found)
