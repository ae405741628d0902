"""Input groups: which linears of a block read the same tensor, and so share one Gram matrix and one null space."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nslora_dist.adapter import Adapter
from nslora_dist.base_model import blocks
from nslora_dist.errors import UserError
from nslora_dist.explain import nearest
from nslora_dist.frozen import FrozenLinear

if TYPE_CHECKING:
    from nslora_dist.recipe_adapter import AdapterSection


@dataclass(frozen=True)
class LinearShape:
    """A linear inside a decoder block: its name there and its sizes."""

    name: str
    in_features: int
    out_features: int


@dataclass(frozen=True)
class InputGroup:
    """Linears of one block that read the same tensor; they share one Gram matrix and one null space.

    ``name`` is that of its first module with the block's prefix, e.g. ``model.layers.3.self_attn.q_proj``.
    """

    name: str
    modules: tuple[LinearShape, ...]

    @property
    def in_features(self) -> int:
        """d_in, the width of the shared input."""
        return self.modules[0].in_features


@torch.no_grad()
def input_groups(model: PreTrainedModel) -> list[InputGroup]:
    """The input groups of every block, found by watching which linears of it receive the same tensor.

    Every block runs once on the meta device, where a forward pass costs nothing at any size.
    """
    received: list[tuple[Tensor, str, FrozenLinear]] = []
    hooks = []
    for block_name, block in blocks(model):
        for name, module in block.named_modules():
            if isinstance(module, Adapter):
                raise AssertionError("groups are found on the base, before adapters are attached")
            if isinstance(module, FrozenLinear):
                full = f"{block_name}.{name}"
                hooks.append(module.register_forward_pre_hook(functools.partial(_receive, received, full)))
                module.forward = functools.partial(_meta_product, module)  # type: ignore[method-assign]
    hidden = torch.empty(1, 4, model.config.hidden_size, dtype=model.dtype, device="meta")
    # A ready 4-dimensional mask, or transformers would ask the meta tensors for values.
    mask = torch.empty(1, 1, 4, 4, dtype=torch.bool, device="meta")
    positions = torch.empty(1, 4, dtype=torch.int64, device="meta")
    rotary = model.model.rotary_emb(hidden, position_ids=positions)
    for _, block in blocks(model):
        block(hidden, attention_mask=mask, position_ids=positions, position_embeddings=rotary, use_cache=False)
    for hook in hooks:
        hook.remove()
    members: dict[int, list[LinearShape]] = {}
    for tensor, name, module in received:  # the list keeps the tensors alive, so that no id is used twice
        members.setdefault(id(tensor), []).append(LinearShape(name, module.in_features, module.out_features))
        module.__dict__.pop("forward", None)
    return [InputGroup(modules[0].name, tuple(modules)) for modules in members.values()]


def _receive(received: list[tuple[Tensor, str, FrozenLinear]], name: str, module: FrozenLinear, args: Any) -> None:
    received.append((args[0], name, module))


def _meta_product(module: FrozenLinear, x: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], module.out_features)


def target_groups(groups: list[InputGroup], adapter: AdapterSection) -> list[InputGroup]:
    """The groups with the modules that the recipe adapts, by the last part of their names.

    Raises:
        UserError: a target that no block has, or a rank above a target's width.
    """
    known = sorted({shape.name.rsplit(".", 1)[1] for group in groups for shape in group.modules})
    for target in adapter.target_modules:
        if target not in known:
            raise UserError(
                f"adapter.target_modules: the model has no linear '{target}'{nearest(target, known)}; "
                f"its blocks have {', '.join(known)}"
            )
    chosen = []
    for group in groups:
        modules = tuple(shape for shape in group.modules if shape.name.rsplit(".", 1)[1] in adapter.target_modules)
        if not modules:
            continue
        if adapter.rank > group.in_features:
            raise UserError(
                f"adapter.rank {adapter.rank} is above the {group.in_features} inputs of {modules[0].name}; "
                f"use adapter.rank={group.in_features} at most"
            )
        chosen.append(InputGroup(modules[0].name, modules))
    return chosen
