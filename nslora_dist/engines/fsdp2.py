"""PyTorch FSDP2: every parameter a DTensor sharded over all ranks, gathered block by block."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from nslora_dist import dist, machine
from nslora_dist.base_model import torch_dtype
from nslora_dist.data import Batch
from nslora_dist.engines.base import (
    Job,
    Shard,
    clip_and_step,
    kept_of,
    let_go,
    make_optimizer,
    optimizer_shards,
    prepare,
    restore_optimizer,
    scale_parameters,
    trained_by_name,
    uncompiled,
)
from nslora_dist.frozen import keep_bytes
from nslora_dist.recipe import Recipe


class Fsdp2Engine:
    """``fully_shard`` on the embedding, every block and the head, and on the root for what is left.

    Trained parameters are float32 and gathered in the compute dtype; FSDP2 wants one dtype among the *trained*
    parameters of a group, so frozen bfloat16 weights share a block's group with them. So do 4-bit weights, as bytes
    (``keep_bytes``). Those groups have no parameter dtype, to which FSDP2 of PyTorch 2.11 would cast the bytes: the few
    trained parameters beside them are gathered in float32, and cast where they are used.
    """

    def __init__(self, job: Job, recipe: Recipe) -> None:
        """Loads and shards the model unit by unit."""
        mesh = init_device_mesh(job.device.type, (dist.world_size(),))
        compute = torch_dtype(recipe.base_model)
        policy = packed = MixedPrecisionPolicy()
        if compute != torch.float32:
            policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
            packed = MixedPrecisionPolicy(reduce_dtype=torch.float32)
        quantized = recipe.base_model.quantization == "nf4"
        self.units: list[FSDPModule] = []
        tied = job.model.lm_head.weight is job.model.model.embed_tokens.weight

        def shard(name: str, unit: nn.Module) -> None:
            # A tied embedding is used by two modules, so it belongs to the root's group; a norm alone is too small
            # for a collective of its own.
            if name != "model.norm" and not (tied and name == "model.embed_tokens"):
                in_block = name.startswith("model.layers.")
                keep_bytes(unit)
                sharded = fully_shard(unit, mesh=mesh, mp_policy=packed if quantized and in_block else policy)
                # No gradient needs these two's weights: the embedding's input takes none, and the head's loss makes
                # its gradient in forward. Their backward would gather 2 x 2.1 GB at 70B for nothing.
                sharded.set_unshard_in_backward(in_block)
                self.units.append(sharded)

        def alone(name: str) -> bool:
            # One frozen weight: a rank reads the rows it keeps, and a 4-bit base's largest unit is never whole.
            return name == "lm_head" or (name == "model.embed_tokens" and not tied)

        self.model, self.recipe, self.device, self.compute = job.model, recipe, job.device, compute
        self.root = prepare(job, recipe, shard, shards_empty=alone)
        fully_shard(self.root, mesh=mesh, mp_policy=policy)  # in place
        self.optimizer = make_optimizer(self.root, recipe)
        self.trained = trained_by_name(self.model)  # at a step they are the optimizer's own, sharded or whole
        self.max_grad_norm = recipe.train.max_grad_norm

    def forward(self, batch: Batch) -> Tensor:
        """See ``Engine``."""
        self.root.train()
        return self.root(batch)

    @torch.no_grad()
    def matches(self, batch: Batch) -> Tensor:
        """See ``Engine``."""
        self.root.eval()
        with uncompiled(self.recipe):
            return self.root(batch)

    def backward(self, loss: Tensor) -> None:
        """See ``Engine``. Gradients are reduced at every micro-batch: kept whole, they would cost a copy of B."""
        loss.backward()

    def step(self, learning_rate: float) -> float:
        """See ``Engine``."""
        trained, most = self.trained.values(), self.max_grad_norm
        return float(clip_and_step(trained, self.optimizer, max_grad_norm=most, learning_rate=learning_rate))

    def skip(self) -> None:
        """See ``Engine``."""
        self.optimizer.zero_grad(set_to_none=True)

    def shards(self, *, moments: bool = True) -> list[Shard]:
        """See ``Engine``."""
        return optimizer_shards(self.trained, self.optimizer, moments=moments)

    def masters(self, names: Sequence[str]) -> list[Tensor]:
        """See ``Engine``."""
        return kept_of(self.trained[name] for name in names)

    def scale(self, factors: Mapping[str, float]) -> None:
        """See ``Engine``."""
        scale_parameters(self.trained, factors)

    def restore(self, shards: list[Shard], *, updates: int) -> None:
        """See ``Engine``."""
        restore_optimizer(self.trained, self.optimizer, shards, updates=updates)

    def gather(self, parameter: nn.Parameter) -> Tensor:
        """See ``Engine``."""
        value = parameter.detach()
        return (value.full_tensor() if isinstance(value, DTensor) else value).cpu().clone()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """See ``Engine``. The root's own group, of a norm and a tied embedding, is kept by FSDP2 in any case."""
        size = sum(p.numel() * min(p.element_size(), self.compute.itemsize) for p in self.model.parameters())
        units = self.units if machine.may_keep(size, self.device) else []
        for unit in units:
            unit.set_reshard_after_forward(False, recurse=False)
        try:
            yield
        finally:
            for unit in units:
                unit.set_reshard_after_forward(True, recurse=False)
                unit.reshard()

    def close(self) -> None:
        """See ``Engine``."""
        let_go(self)
