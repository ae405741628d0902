"""What DeepSpeed does to the process around it and between passes, where nobody asked for it."""

import gc
from pathlib import Path
from unittest import mock

import pytest
from torch import nn

from helpers.parity_run import IDS
from helpers.ranks import run_ranks
from helpers.stages import started
from helpers.world import make_recipe


def watched(world: Path, folder: Path) -> tuple[bool, int, int]:
    """Whether ``functional.linear`` stays; collections during a pass without backward; frozen parameters after it."""
    linear = nn.functional.linear
    changes = {"adapter": {"method": "lora"}, "engine": {"name": "zero3"}}
    with started(make_recipe(world, world / "llama", folder / "out", **changes)) as stage:
        with mock.patch.object(gc, "collect") as collect:
            for _ in range(2):
                stage.logits(IDS)
        whole = stage.frozen()  # nothing is in flight any more, which could not be gathered
        return nn.functional.linear is linear, collect.call_count, len(whole)


@pytest.fixture(scope="module")
def seen(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[bool, int, int]:
    first, second = run_ranks(watched, 2, world, tmp_path_factory.mktemp("zero3"))
    assert first == second
    return first


def test_functional_linear_stays(seen: tuple[bool, int, int]) -> None:
    assert seen[0]


def test_no_collection_in_a_pass(seen: tuple[bool, int, int]) -> None:
    assert seen[1] == 0 and seen[2] > 0
