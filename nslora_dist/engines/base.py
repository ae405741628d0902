"""What the trainer may ask of an engine, and what an engine is given."""

import gc
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import PreTrainedModel

from nslora_dist import watch
from nslora_dist.adapter import adapted_linears
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


MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of every parameter, under PyTorch's names."""


@dataclass(frozen=True)
class Shard:
    """This rank's run of one trained parameter's elements, in row-major order; every engine's share is such a run.

    Attributes:
        name: of the adapted module and its parameter, ``model.layers.0.self_attn.q_proj.lora_B``.
        shape: of the whole parameter.
        start: the first element that this rank keeps.
        values: ``value`` (the float32 master) and ``MOMENTS``, each (n,) float32, n the same for all and possibly 0.
            Views of what the optimizer writes: copy them before the next step.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    values: dict[str, Tensor]


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
        """Clips, updates and clears; a gradient that is not finite is cleared and changes nothing.

        Returns:
            The global gradient norm before clipping.
        """
        ...

    def skip(self) -> None:
        """Clears the gradients of a whole step's micro-batches and changes nothing else."""
        ...

    def shards(self, *, moments: bool = True) -> list[Shard]:
        """What this rank keeps of every trained parameter: over the ranks, every element once.

        Args:
            moments: False leaves them out, for whoever looks at the parameters alone.
        """
        ...

    def masters(self, names: Sequence[str]) -> list[Tensor]:
        """The ``value`` of ``shards()`` of these parameters, flat or in rows, for whoever wants it at every step.

        Finding hundreds of parameters in a model of thousands takes longer than arithmetic on them.
        """
        ...

    def scale(self, factors: Mapping[str, float]) -> None:
        """Multiplies whole trained parameters, named as in ``shards()``, by a number each; AdamW's moments stay.

        The float32 master is multiplied, and the compute dtype's copy follows.
        """
        ...

    def restore(self, shards: list[Shard], *, updates: int) -> None:
        """Takes up the state of another training: ``shards`` are those of ``shards()`` with the values to be had.

        Args:
            shards: the same runs in the same order.
            updates: AdamW's step count.
        """
        ...

    def gather(self, parameter: nn.Parameter) -> Tensor:
        """The whole of a parameter on the CPU of every rank, of a trained one its float32 master copy."""
        ...

    def whole(self) -> AbstractContextManager[object]:
        """Keeps what forward passes gather until it is closed, where that leaves room enough on every rank; collective.

        For passes without gradients, between which no parameter changes: an evaluation, where every batch, and every
        token that a model writes, would gather all weights anew.
        """
        ...

    def close(self) -> None:
        """Frees what the engine holds, after which it is of no use; the next arm builds an engine of its own."""
        ...


def let_go(engine: Engine) -> None:
    """What every ``close`` ends with: drops all that the engine refers to and frees it now, before the next arm loads.

    Modules, hooks and the state that shards them refer to each other, so that a base dropped alone stays in memory
    beside the next one until Python happens to look for circles.
    """
    vars(engine).clear()
    gc.collect()
    return_freed_memory()
    torch.cuda.empty_cache()  # nothing where no GPU is in use


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
    # Largest first, while nothing else takes room: a 4-bit base's embedding and head are larger than its blocks.
    for name, unit in sorted(units(job.model), key=lambda named: -_stored_bytes(named[1])):
        watch.progress(name)
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


def uncompiled(recipe: Recipe) -> AbstractContextManager[object]:
    """Evaluation runs as it is written: decoding alone would use up the variants that one block may be compiled in.

    All blocks share these (``torch._dynamo.config.recompile_limit``, 8), and a key-value cache asks for one a layer.
    """
    return torch.compiler.set_stance("force_eager") if recipe.train.compile else nullcontext()


def _stored_bytes(unit: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in unit.parameters())


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that take gradients."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def trained_by_name(model: nn.Module) -> dict[str, nn.Parameter]:
    """The same, by adapted module and parameter: names that every engine shares."""
    return {
        f"{name}.{key}": parameter
        for name, module in adapted_linears(model).items()
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.requires_grad
    }


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW with decoupled weight decay on every trained parameter: on D = B − B₀ it pulls ΔW towards zero."""
    train = recipe.train
    return torch.optim.AdamW(
        trained(model), lr=train.learning_rate, betas=train.betas, eps=1e-8, weight_decay=train.weight_decay
    )


@torch.no_grad()
def clip_and_step(
    parameters: Iterable[nn.Parameter], optimizer: torch.optim.Optimizer, *, max_grad_norm: float, learning_rate: float
) -> Tensor:
    """Clips the global gradient norm, steps and clears; returns the norm before clipping, () float32.

    Where the norm is not finite no step is taken, for it would end the training.
    """
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    with watch.waiting():  # over NCCL for the ranks whose gradients are still missing
        finite = bool(norm.isfinite())
    if finite:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def whole_moments(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """AdamW's state of one parameter, made as AdamW makes it where no step was taken yet."""
    state = optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32)
        state |= {key: torch.zeros_like(parameter, memory_format=torch.preserve_format) for key in MOMENTS}
    return state


@torch.no_grad()
def optimizer_shards(
    parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, *, moments: bool = True
) -> list[Shard]:
    """``Engine.shards`` where parameters are whole, or DTensors sharded by rows."""
    found = []
    for name, parameter in parameters.items():
        values: dict[str, Tensor] = {"value": parameter}
        if moments:
            state = whole_moments(optimizer, parameter)
            values |= {key: state[key] for key in MOMENTS}
        start = 0
        if isinstance(parameter, DTensor):
            start = _first_row(parameter.shape, parameter.device_mesh, parameter.placements) * parameter.shape[1]
            values = {key: value.to_local() for key, value in values.items()}  # type: ignore[attr-defined]
        flat = {key: value.detach().view(-1) for key, value in values.items()}
        found.append(Shard(name, tuple(parameter.shape), start, flat))
    return found


def _first_row(shape: torch.Size, mesh: DeviceMesh, placements: tuple[Placement, ...]) -> int:
    """The first row that this rank keeps."""
    _, (row, *_) = compute_local_shape_and_global_offset(shape, mesh, placements)
    return row


@torch.no_grad()
def restore_optimizer(
    parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, shards: list[Shard], *, updates: int
) -> None:
    """``Engine.restore`` for the same."""
    for own, given in zip(optimizer_shards(parameters, optimizer), shards, strict=True):
        assert (own.name, own.start) == (given.name, given.start)
        for key, value in own.values.items():
            value.copy_(given.values[key])
    for parameter in parameters.values():
        optimizer.state[parameter]["step"].fill_(updates)


@torch.no_grad()
def kept_of(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """``Engine.masters`` for the same: this rank's rows of each."""
    # Not to_local(), which makes a view that autograd could follow: ten times as long, at hundreds a step.
    return [p._local_tensor if isinstance(p, DTensor) else p for p in parameters]


@torch.no_grad()
def scale_parameters(parameters: Mapping[str, nn.Parameter], factors: Mapping[str, float]) -> None:
    """``Engine.scale`` for the same."""
    kept = kept_of(parameters[name] for name in factors)
    torch._foreach_mul_(kept, list(factors.values()))  # one launch for many small parameters
