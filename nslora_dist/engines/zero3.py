"""DeepSpeed ZeRO-3: parameters, gradients and optimizer state partitioned. ``deepspeed`` is imported here alone."""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from nslora_dist import dist, machine
from nslora_dist.base_model import units
from nslora_dist.data import Batch
from nslora_dist.engines.base import (
    MOMENTS,
    Job,
    Shard,
    let_go,
    make_optimizer,
    prepare,
    trained_by_name,
    whole_moments,
)
from nslora_dist.errors import UserError
from nslora_dist.recipe import Recipe, check_zero_config, zero_settings

# DeepSpeed logs dozens of lines per rank at INFO; a person running a recipe needs its warnings.
os.environ.setdefault("DS_LOG_LEVEL", "warning")
try:
    import deepspeed
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.runtime.zero.partition_parameters import Init
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
    from deepspeed.utils import (
        safe_get_full_fp32_param,
        safe_get_local_fp32_param,
        safe_get_local_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )
except ImportError as error:
    raise UserError(f"engine.name zero3: deepspeed cannot be imported ({error}); pip install deepspeed") from error


WHOLE = -1
"""No module's number: stands for an evaluation that has all parameters gathered."""


class _PartitionLocally(Init):
    """ZeRO-3's partitioning without its broadcast: every rank has read the same unit from the checkpoint."""

    def _zero_init_param(self, param: nn.Parameter) -> None:
        self._convert_to_deepspeed_param(param)
        param.partition()  # type: ignore[attr-defined]  # given to it by the line above


def deepspeed_config(recipe: Recipe, *, world_size: int) -> dict[str, Any]:
    """The whole DeepSpeed config: ZeRO knobs from ``engine.config``, everything else from the recipe.

    DeepSpeed wants a batch that divides over the ranks, even of who only evaluates. For training that was
    checked before.
    """
    settings = {} if recipe.engine.config is None else check_zero_config(recipe)
    train = recipe.train.fitting(world_size)
    # The memory-efficient linear would replace F.linear in the whole process by one that keeps the input of frozen
    # weights too; what is frozen here has a product of its own.
    ours = {"stage": 3, "memory_efficient_linear": False}
    return (
        settings
        | zero_settings(recipe)
        | {
            "train_batch_size": train.global_batch_size,
            "train_micro_batch_size_per_gpu": train.micro_batch_size,
            "gradient_accumulation_steps": train.accumulation(world_size),
            "zero_optimization": settings.get("zero_optimization", {}) | ours,
            "steps_per_print": 2**31,
        }
    )


def _run(parameter: Any) -> tuple[int, int]:
    """First element and number of those that this rank keeps of a parameter.

    DeepSpeed deals the elements evenly, in order, and pads the last part.
    """
    size = parameter.partition_numel()
    start = min(dist.rank() * size, parameter.ds_numel)
    return start, min(size, parameter.ds_numel - start)


class Zero3Engine:
    """The DeepSpeed engine."""

    def __init__(self, job: Job, recipe: Recipe) -> None:
        """Loads and partitions the model unit by unit, then hands it to DeepSpeed."""
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        os.environ.setdefault("LOCAL_RANK", "0")
        config = deepspeed_config(recipe, world_size=dist.world_size())

        def shard(name: str, unit: nn.Module) -> None:
            _PartitionLocally(module=unit, config_dict_or_path=config)

        # On a CPU DeepSpeed would compile an extension for minutes that tensor-parallel inference alone calls.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(verbose=False)
        self.model, self.device, self.kept = job.model, job.device, False
        root = prepare(job, recipe, shard)
        self.optimizer = make_optimizer(root, recipe)
        self.engine, *_ = deepspeed.initialize(
            model=root, optimizer=self.optimizer, config=config, dist_init_required=False
        )
        self.trained: dict[str, Any] = trained_by_name(self.model)  # DeepSpeed has hung things of its own on them

    def forward(self, batch: Batch) -> Tensor:
        """See ``Engine``."""
        self.engine.train()
        return self.engine(batch)

    @torch.no_grad()
    def matches(self, batch: Batch) -> Tensor:
        """See ``Engine``."""
        self.engine.eval()
        right = self.engine(batch)
        # Without a backward pass the parameters prefetched for one stay in flight, and nothing could gather them. The
        # engine's own method of this name collects garbage as well, which would be once for every token generated.
        if not self.kept:
            self.engine.optimizer.empty_partition_cache()
        return right

    def backward(self, loss: Tensor) -> None:
        """See ``Engine``. The loss is weighted by tokens already, so DeepSpeed must not divide it by micro-batches.

        DeepSpeed counts micro-batches itself: only the last one of a step lets ``engine.step`` update.
        """
        self.engine.backward(loss, scale_wrt_gas=False)
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()

    def step(self, learning_rate: float) -> float:
        """See ``Engine``."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def skip(self) -> None:
        """See ``Engine``. As DeepSpeed drops a step itself whose gradient norm is not finite."""
        zero = self.engine.optimizer
        zero._overflow_clean_up(zero.loss_scale)
        self.engine.micro_steps += 1  # the boundary that ``engine.step`` would have passed

    @torch.no_grad()
    def shards(self, *, moments: bool = True) -> list[Shard]:
        """See ``Engine``."""
        found = []
        for name, parameter in self.trained.items():
            start, count = _run(parameter)
            values = {"value": safe_get_local_fp32_param(parameter)}
            if moments:
                self._moments(parameter)
                values |= {key: safe_get_local_optimizer_state(parameter, key) for key in MOMENTS}
            shape = tuple(parameter.ds_shape)
            found.append(Shard(name, shape, start, {key: value[:count] for key, value in values.items()}))
        return found

    @torch.no_grad()
    def restore(self, shards: list[Shard], *, updates: int) -> None:
        """See ``Engine``. The compute dtype's copies follow from the float32 masters, as after a step."""
        for (name, parameter), shard in zip(self.trained.items(), shards, strict=True):
            assert name == shard.name
            self._moments(parameter)["step"].fill_(updates)
            padded = {key: torch.zeros(parameter.partition_numel()) for key in shard.values}
            for key, value in shard.values.items():
                padded[key][: len(value)] = value
            safe_set_local_fp32_param(parameter, padded["value"])
            for key in MOMENTS:
                safe_set_local_optimizer_state(parameter, padded[key], key)
        self._copies_follow()

    @torch.no_grad()
    def masters(self, names: Sequence[str]) -> list[Tensor]:
        """See ``Engine``."""
        return [self._views[name] for name in names]

    @torch.no_grad()
    def scale(self, factors: Mapping[str, float]) -> None:
        """See ``Engine``."""
        torch._foreach_mul_([self._views[name] for name in factors], list(factors.values()))
        self._copies_follow()

    @cached_property
    def _views(self) -> dict[str, Tensor]:
        """This rank's run of every float32 master without its padding.

        Looked up once: at every step, and by DeepSpeed's own look-up, which waits for the device at each of hundreds of
        parameters, it would take longer than what is done with them.
        """
        zero, found = self.engine.optimizer, {}
        for name, parameter in self.trained.items():
            group, offset, _ = zero.grad_position[zero.get_param_id(parameter)]
            flat = zero.fp32_partitioned_groups_flat[group].detach()
            found[name] = flat.narrow(0, offset, _run(parameter)[1])
        return found

    def _copies_follow(self) -> None:
        """Makes the compute dtype's copies, and those of parameters that are kept whole, from the float32 masters.

        Between a step and the next forward pass all others are partitioned already; to look through the whole model for
        them, as DeepSpeed would, takes longer than the copy.
        """
        zero = self.engine.optimizer
        for parameter in zero.persistent_parameters:
            parameter.partition()
        for number in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(number)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    def _moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """AdamW's state of the flat group that holds this parameter's part."""
        zero = self.engine.optimizer
        group, _, _ = zero.grad_position[zero.get_param_id(parameter)]
        return whole_moments(self.optimizer, zero.fp32_partitioned_groups_flat[group])

    def gather(self, parameter: nn.Parameter) -> Tensor:
        """See ``Engine``."""
        if parameter.requires_grad:
            master = safe_get_full_fp32_param(parameter)
            assert master is not None
            return master.detach().cpu().clone()
        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().cpu().clone()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """See ``Engine``. What a module is at work with DeepSpeed does not release, so each parameter is given one.

        Gathered unit by unit: of parts that are kept in host memory a gather sends all that it is given to the device,
        which for the whole model at once would be half as much again on two GPUs.
        """
        self.engine.optimizer.empty_partition_cache()
        parameters: list[Any] = list(self.engine.module.parameters())
        size = sum(parameter.ds_numel * parameter.element_size() for parameter in parameters)
        if not machine.may_keep(size, self.device):
            yield
            return
        with ExitStack() as stack:
            for _, unit in units(self.model):
                stack.enter_context(deepspeed.zero.GatheredParameters(list(unit.parameters())))
            for parameter in parameters:
                parameter.ds_active_sub_modules.add(WHOLE)
            self.kept = True
            try:
                yield
            finally:
                self.kept = False
                for parameter in parameters:
                    # All of them: a module whose pass ended in an error is still noted as at work, and DeepSpeed would
                    # refuse to free its parameters, an error that hides the first one.
                    parameter.ds_active_sub_modules.clear()

    def close(self) -> None:
        """See ``Engine``. DeepSpeed keeps hooks and buffers until told."""
        self.engine.destroy()
        _forget(self.engine.module)
        let_go(self)


def _forget(root: nn.Module) -> None:
    """Takes a model out of what DeepSpeed keeps for the whole process, which ``destroy`` leaves as it is.

    A root stays on the stack of the modules that are running, and every module, with the coordinator that knows all
    parameters, in the cache of a method.
    """
    own = set(root.modules())
    running = getattr(parameter_offload, "FWD_MODULE_STACK", [])
    running[:] = [module for module in running if module not in own]
    cached = getattr(PartitionedParameterCoordinator, "_PartitionedParameterCoordinator__params_to_release", None)
    for cell in getattr(cached, "__closure__", None) or ():
        getattr(cell.cell_contents, "cache_clear", lambda: None)()


def gathered(parameter: Tensor) -> Tensor:
    """The whole of a partitioned parameter, on its device, on every rank; collective."""
    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


@torch.no_grad()
def refill(parameter: nn.Parameter, value: Tensor) -> None:
    """Puts a whole value, the same on every rank, into a partitioned parameter; collective."""
    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        parameter.copy_(value.to(device=parameter.device, dtype=parameter.dtype))
