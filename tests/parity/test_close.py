"""A run's arms follow each other in one process: what an engine held is gone once it is closed."""

import gc
import weakref
from pathlib import Path

import pytest

from helpers.parity_run import ENGINES, IDS
from helpers.ranks import run_ranks
from helpers.stages import started
from helpers.world import make_recipe


def left(world: Path, folder: Path, engine: str) -> list[str]:
    """The parameters still there after ``close``, while the caller keeps the engine itself."""
    gc.disable()  # nothing that is freed was so by chance
    changes = {"adapter": {"method": "lora"}, "engine": {"name": engine}, "train": {"max_steps": 1, "log_every": 10}}
    recipe = make_recipe(world, world / "llama", folder / engine, **changes)
    with started(recipe) as stage:
        stage.train()
        stage.logits(IDS)
        stage.engine.masters(list(stage.engine.trained))
        held = {name: weakref.ref(parameter) for name, parameter in stage.engine.model.named_parameters()}
    return [name for name, parameter in held.items() if parameter() is not None]


@pytest.mark.parametrize("engine", ENGINES)
def test_nothing_is_left(world: Path, tmp_path: Path, engine: str) -> None:
    assert run_ranks(left, 1, world, tmp_path, engine) == [[]]
