"""``train.compile``: blocks traced by TorchDynamo and AOTAutograd, without the minutes that generating code takes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from helpers.ranks import run_ranks
from helpers.stages import started
from helpers.world import make_recipe
from nslora_dist.errors import UserError
from nslora_dist.recipe_file import load_recipe
from nslora_dist.supervised import Continued


def losses(world: Path, folder: Path, engine: str, compiled: bool) -> tuple[list[float], int]:
    """Of two steps, and how many graphs were traced."""

    def traced(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        self._compiled_call_impl = torch.compile(self._call_impl, backend="aot_eager")

    nn.Module.compile = traced  # type: ignore[method-assign]
    changes = {"engine": {"name": engine}, "train": {"compile": compiled, "max_steps": 2, "log_every": 10}}
    recipe = make_recipe(world, world / "llama", folder / f"{engine}_{compiled}", **changes)
    with started(recipe) as stage:
        batch = stage.data.micro_batches(0, rank=0, world_size=1)[0]
        stage.engine.matches(batch)
        ids, mask = batch.input_ids, torch.ones_like(batch.input_ids)
        cache = DynamicCache(config=stage.engine.model.config)
        stage.engine.matches(Continued(ids, mask, mask.cumsum(1) - 1, ids, cache=cache))
        assert not torch._dynamo.utils.counters["stats"]["unique_graphs"], "what evaluates uses up no variants"
        found = stage.train().losses
    return found, torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_same_losses(world: Path, tmp_path: Path) -> None:
    (plain, none), (compiled, graphs) = (
        run_ranks(losses, 1, world, tmp_path, "single", compiled)[0] for compiled in (False, True)
    )
    assert none == 0 and graphs >= 2
    # The same operations on float32 values; a backend may only fuse what follows one another.
    assert compiled == pytest.approx(plain, rel=1e-6)


def test_zero3_refuses() -> None:
    with pytest.raises(UserError, match="train.compile: DeepSpeed's hooks"):
        load_recipe("tiny_math", ["train.compile=true", "engine.name=zero3"])
