"""What the pipeline does for every arm: its model and how it is filled."""

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from nslora_dist.adapter import AdaptedLinear
from nslora_dist.attach import attach_adapters
from nslora_dist.base_files import BaseFiles
from nslora_dist.base_model import build_empty, torch_dtype
from nslora_dist.base_weights import fill_unit
from nslora_dist.calibration.store import NullSpace
from nslora_dist.calibration.weights import WeightNullSpace
from nslora_dist.data import TrainingData
from nslora_dist.engines.base import Job, adapter_dtype
from nslora_dist.input_groups import InputGroup
from nslora_dist.null_lora import NullLoraLinear
from nslora_dist.recipe import Recipe


@dataclass(frozen=True)
class Arm:
    """One adapter of a run: the recipe's own, or a baseline.

    Attributes:
        name: its key in the report.
        recipe: the run's, with the baseline's overrides.
        null_space: what it starts from; None for plain LoRA's random A.
        data: its rows, dealt by its own training section.
    """

    name: str
    recipe: Recipe
    null_space: NullSpace | WeightNullSpace | None
    data: TrainingData


def make_job(
    arm: Recipe,
    config: PreTrainedConfig,
    checkpoint: BaseFiles,
    groups: list[InputGroup],
    null_space: NullSpace | WeightNullSpace | None,
    *,
    device: torch.device,
) -> Job:
    """The arm's model on the meta device, and how its units are filled.

    Args:
        arm: its recipe.
        config: the base's.
        checkpoint: the base's weights.
        groups: the target modules.
        null_space: what the adapters start from; None for plain LoRA's random A.
        device: this rank's.
    """
    model = build_empty(arm.base_model, config)
    dtype = adapter_dtype(arm, torch_dtype(arm.base_model))
    sizes = null_space.sizes(arm.adapter.rank) if isinstance(null_space, WeightNullSpace) else None
    attach_adapters(model, groups, arm.adapter, dtype, null_sizes=sizes)

    def fill(unit: nn.Module, name: str) -> None:
        fill_unit(unit, name, checkpoint, device=device)
        if isinstance(null_space, WeightNullSpace):
            for own in [m for m in unit.modules() if isinstance(m, NullLoraLinear)]:
                own.fill(*null_space.bases(own.name, device=device), device=device)
            return
        adapted = {m.name: m for m in unit.modules() if isinstance(m, AdaptedLinear)}
        if null_space is None:
            for module in adapted.values():
                module.fill(random_a(module, seed=arm.train.seed), None, device=device)
            return
        for target, start in null_space.starts(adapted, device=device):
            module = adapted[target]
            module.fill(start.a, start.b, device=device)
            if module.a_is_frozen:
                module.update_grams, module.references = start.update_grams, start.references

    return Job(model=model, fill=fill, device=device)


def random_a(module: AdaptedLinear, *, seed: int) -> Tensor:
    """Plain LoRA's A, (r, d_in) uniform in ±1/√d_in (Kaiming with a = √5): the same on every rank and engine."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{module.name}".encode()))
    bound = module.lora_A.shape[1] ** -0.5
    return (torch.rand(module.lora_A.shape, generator=generator) * 2 - 1) * bound
