"""What DeepSpeed does to the process around it and between passes, where nobody asked for it."""

import gc
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from helpers.parity_run import IDS
from helpers.ranks import run_ranks
from helpers.stages import started
from helpers.world import make_recipe, zero_config
from nslora_dist.base_model import units
from nslora_dist.engines.zero3 import Init


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


def kept_whole(world: Path, folder: Path) -> tuple[list[int], list[int], bool]:
    """Elements of each gather that ``whole`` begins with; of each unit; whether logits are those of gathered passes."""
    changes = {"adapter": {"method": "lora"}, "engine": {"name": "zero3", "config": str(folder / "zero.json")}}
    gathers: list[int] = []
    gather = Init._all_gather

    def seen(self: Init, given: list[Any], *args: Any, **kwargs: Any) -> Any:
        gathers.append(sum(parameter.ds_numel for parameter in given))
        return gather(self, given, *args, **kwargs)

    with started(make_recipe(world, world / "llama", folder / "out", **changes)) as stage:
        before = stage.logits(IDS)
        with mock.patch.object(Init, "_all_gather", seen), stage.engine.whole():
            begun = list(gathers)
            same = torch.equal(before, stage.logits(IDS))
            assert gathers == begun, "and none is gathered again"
        sizes = [sum(p.ds_numel for p in unit.parameters()) for _, unit in units(stage.engine.model)]
        assert all(p.numel() == 0 for p in stage.engine.model.parameters()), "let go"
        return begun, sizes, same and torch.equal(before, stage.logits(IDS))


def test_is_kept_whole_unit_by_unit(world: Path, tmp_path: Path) -> None:
    """A gather sends every part that it is given to the device, where parts wait in host memory."""
    zero_config(tmp_path)
    for gathers, sizes, same in run_ranks(kept_whole, 2, world, tmp_path):
        assert gathers == sizes and len(sizes) > 3
        assert same
