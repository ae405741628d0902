"""Adapters put in the place of a base's linears: which kind, and of what sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from nslora_dist.adapter import AdaptedLinear, Adapter
from nslora_dist.input_groups import InputGroup, LinearShape
from nslora_dist.null_lora import NullLoraLinear
from nslora_dist.weight_null import NullSizes

if TYPE_CHECKING:
    from nslora_dist.recipe_adapter import AdapterSection


def attach_adapters(
    model: PreTrainedModel,
    groups: list[InputGroup],
    adapter: AdapterSection,
    dtype: torch.dtype,
    *,
    null_sizes: Mapping[str, NullSizes] | None = None,
) -> None:
    """Puts an adapted linear, still on the meta device, in the place of every target module.

    Args:
        model: the empty base.
        groups: the target modules.
        adapter: the recipe's section.
        dtype: of the adapter's parameters.
        null_sizes: for ``null_lora``, what the weights' null spaces leave; a module without a rank stays as it is. None
            takes what the shapes alone would allow, for planning.
    """
    for group in groups:
        for shape in group.modules:
            base = model.get_submodule(shape.name)
            named: dict[str, Any] = {
                "name": shape.name,
                "in_features": shape.in_features,
                "out_features": shape.out_features,
                "scale": adapter.scale,
                "dtype": dtype,
            }
            if adapter.method == "null_lora":
                sizes = planned_sizes(shape, adapter) if null_sizes is None else null_sizes[shape.name]
                if sizes.rank:
                    made: Adapter = NullLoraLinear(base, **named, sizes=sizes, basis_dtype=model.dtype)
                    model.set_submodule(shape.name, made)
                continue
            made = AdaptedLinear(
                base,
                **named,
                rank=adapter.rank,
                freeze_a=adapter.a_is_frozen,
                residual=adapter.form == "residual",
            )
            model.set_submodule(shape.name, made)


def planned_sizes(shape: LinearShape, adapter: AdapterSection) -> NullSizes:
    """The most that a module's Null-LoRA can come to, before any weight is looked at."""
    right, left = min(adapter.null_dim, shape.in_features), min(adapter.null_dim, shape.out_features)
    return NullSizes.fitted(adapter.rank, right=right, left=left)
