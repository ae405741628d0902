"""One process, nothing sharded: the reference that the other engines are compared with."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from nslora_dist import dist
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
from nslora_dist.recipe import Recipe


class SingleEngine:
    """The plain PyTorch engine."""

    def __init__(self, job: Job, recipe: Recipe) -> None:
        """Loads the model onto the device.

        Raises:
            UserError: started with several ranks.
        """
        recipe.engine.check_ranks(dist.world_size())
        self.model, self.recipe = job.model, recipe
        self.root = prepare(job, recipe, lambda name, unit: None)
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
        """See ``Engine``."""
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
        return parameter.detach().cpu().clone()

    def whole(self) -> AbstractContextManager[object]:
        """See ``Engine``. It is."""
        return nullcontext()

    def close(self) -> None:
        """See ``Engine``."""
        let_go(self)
