"""A trained state without a model, to be written and taken up: what an engine shows of itself to a checkpoint."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nslora_dist.checkpoint import Checkpoints
from nslora_dist.checkpoint_files import KINDS
from nslora_dist.engines.base import Shard
from nslora_dist.recipe import CheckpointSection

SHAPES = {"model.layers.0.q_proj.lora_A": (3, 8), "model.layers.0.q_proj.lora_B": (5, 3)}
BELONGS = {"adapter": {"rank": 3}, "train": {"seed": 7, "betas": [0.9, 0.999], "weight_decay": 0.1}, "rows": "r"}


@dataclass
class State:
    """Stands where an engine stands; ``updates`` is what ``restore`` was told."""

    values: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    updates: int = -1

    @classmethod
    def drawn(cls, seed: int) -> "State":
        """Random values."""
        dice = torch.Generator().manual_seed(seed)
        sizes = {name: torch.Size(shape).numel() for name, shape in SHAPES.items()}
        return cls({name: {key: torch.randn(size, generator=dice) for key in KINDS} for name, size in sizes.items()})

    def shards(self) -> list[Shard]:
        """All of it, on one rank."""
        return [Shard(name, SHAPES[name], 0, dict(values)) for name, values in self.values.items()]

    def restore(self, shards: list[Shard], *, updates: int) -> None:
        """Takes the values over."""
        self.values, self.updates = {shard.name: dict(shard.values) for shard in shards}, updates

    def same(self, other: "State") -> bool:
        """Whether all values are those of ``other``."""
        return all(torch.equal(self.values[n][k], value) for n, own in other.values.items() for k, value in own.items())


def checkpoints(folder: Path, *, belongs_to: dict[str, Any] | None = None, **section: Any) -> Checkpoints:
    """The checkpoints of a training in ``folder``."""
    return Checkpoints(
        folder, CheckpointSection(**section), belongs_to=BELONGS if belongs_to is None else belongs_to, engine="single"
    )


def facts(step: int) -> dict[str, Any]:
    """What a trainer would want back."""
    return {"updates": step, "losses": [0.5] * step, "seconds": 1.0 * step}
