"""What the trainer may ask of an engine, and what an engine is given."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nslora_dist.base_model import units
from nslora_dist.base_weights import finish, return_freed_memory
from nslora_dist.data import Batch
from nslora_dist.recipe import Recipe
from nslora_dist.supervised import SupervisedModel


@dataclass(frozen=True)
class Job:
    """A model on the meta device and how to fill it.

    Attributes:
        model: adapters attached, nothing materialised.
        fill: materialises one unit (base weights and adapter start) on ``device``; every rank calls it for the same
            units in the same order, for it may broadcast. Parameters that are sharded by rows already are given this
            rank's rows.
        device: this rank's.
    """

    model: PreTrainedModel
    fill: Callable[[nn.Module, str], None]
    device: torch.device


class Engine(Protocol):
    """One training set-up. Every method but ``model`` is collective: all ranks call it in the same order."""

    model: PreTrainedModel
    """The Hugging Face model inside, for its modules and names; its parameters may be sharded."""

    def forward(self, batch: Batch) -> Tensor:
        """The summed loss of a batch already on the device (``SupervisedModel.forward`` in training mode)."""
        ...

    def matches(self, batch: Batch) -> Tensor:
        """(b,) bool: which rows greedy decoding gets right (``SupervisedModel.forward`` in evaluation mode)."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of ``loss`` to what the last ``step`` left; gradients are *averaged* over ranks."""
        ...

    def step(self, learning_rate: float) -> float:
        """Clips, updates and clears.

        Returns:
            The global gradient norm before clipping.
        """
        ...

    def gather(self, parameter: nn.Parameter) -> Tensor:
        """The whole of a parameter on the CPU of every rank, of a trained one its float32 master copy."""
        ...

    def close(self) -> None:
        """Frees what the engine holds; the next arm builds an engine of its own."""
        ...


def adapter_dtype(recipe: Recipe, compute: torch.dtype) -> torch.dtype:
    """The dtype in which adapter parameters are held.

    float32, cast to the compute dtype on use, except under ZeRO-3, which keeps float32 masters of its own.
    """
    return compute if recipe.engine.name == "zero3" else torch.float32


def prepare(
    job: Job,
    recipe: Recipe,
    shard: Callable[[str, nn.Module], None],
    *,
    shards_empty: Callable[[str], bool] = lambda name: False,
) -> SupervisedModel:
    """Fills and shards unit by unit, so that no rank ever holds more than its shards and one unit.

    Args:
        job: the empty model.
        recipe: for activation checkpointing and compiling.
        shard: keeps this rank's part of a unit just filled and frees the rest.
        shards_empty: whether a unit is sharded first and filled then, so that it is never whole.

    Returns:
        The root module, complete.
    """
    for name, unit in units(job.model):
        empty = shards_empty(name)
        if not empty:
            job.fill(unit, name)
        if recipe.train.compile and name.startswith("model.layers."):
            unit.compile()  # before it is sharded, so that gathering stays outside of the compiled code
        shard(name, unit)
        if empty:
            unit.to_empty(device=job.device)
            job.fill(unit, name)
        return_freed_memory()
    finish(job.model, device=job.device)
    if recipe.train.activation_checkpointing:
        job.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return SupervisedModel(job.model)


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that take gradients."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW with decoupled weight decay on every trained parameter: on D = B − B₀ it pulls ΔW towards zero."""
    train = recipe.train
    return torch.optim.AdamW(
        trained(model), lr=train.learning_rate, betas=train.betas, eps=1e-8, weight_decay=train.weight_decay
    )


@torch.no_grad()
def clip_and_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, *, max_grad_norm: float, learning_rate: float
) -> Tensor:
    """Clips the global gradient norm, steps and clears; returns the norm before clipping, () float32."""
    norm = torch.nn.utils.clip_grad_norm_(trained(model), max_grad_norm)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
