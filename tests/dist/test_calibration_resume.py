"""A calibration that ended between two blocks goes on behind them and comes to the same bits."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.ranks import run_ranks
from helpers.stages import CPU
from helpers.world import make_base, make_recipe, make_texts
from nslora_dist import dist, watch
from nslora_dist.calibration.parts import Parts
from nslora_dist.calibration.stream import BlockStream
from nslora_dist.errors import Preempted
from nslora_dist.pipeline import Run

BLOCKS = 4
NULL_LORA = {"adapter": {"method": "null_lora", "null_dim": 16, "null_threshold": 0.3}}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_texts(tmp_path_factory.mktemp("calibration"))
    make_base(folder / "llama", num_hidden_layers=BLOCKS)
    return folder


def made(world: Path, name: str, changes: dict[str, Any]) -> tuple[dict[str, Tensor], Any]:
    """What a calibration on this group of ranks leaves, from the artifact in memory."""
    recipe = make_recipe(world, world / "llama", world / name, **changes)
    run = Run(recipe, CPU)
    space = run.null_space() if recipe.adapter.method == "lora_null" else run.weight_null_space(recipe)
    assert space is not None
    return dict(space.tensors), space.manifest


def interrupted(world: Path, name: str, changes: dict[str, Any], stop: int) -> dict[str, Any]:
    """Stopped when ``stop`` blocks are on disk, then again whole; what was there in between, and what was solved."""
    write, solved = Parts.write, []

    def last(self: Parts, number: int, part: Any) -> None:
        write(self, number, part)
        solved.append(number)
        if number + 1 == stop and dist.rank() == dist.world_size() - 1:
            watch.ask_stop("the test")

    Parts.write = last  # type: ignore[method-assign]
    try:
        with pytest.raises(Preempted, match="the same command continues"):
            made(world, name, changes)
    finally:
        watch.reset()
    left = sorted(str(path.relative_to(world / name)) for path in (world / name).rglob("block-*"))
    before = list(solved)
    loads: list[int] = []
    load = BlockStream.load

    def count(self: BlockStream, number: int) -> None:
        load(self, number)
        loads.append(number)

    BlockStream.load = count  # type: ignore[method-assign]
    tensors, manifest = made(world, name, changes)
    return {
        "left": left,
        "before": before,
        "after": solved[len(before) :],
        "loads": loads,
        "tensors": tensors,
        "manifest": manifest,
        "cleared": not (world / name / "calibration").exists(),
    }


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    ("case", "changes", "stop"),
    [
        ("activations", {"calibration": {"solver": {"placement": "spread"}}}, 2),
        # With a batch that two ranks could not train with.
        ("residual", {"adapter": {"form": "residual"}, "train": {"global_batch_size": 9, "micro_batch_size": 3}}, 1),
        ("weights", NULL_LORA, 3),
    ],
)
def test_to_the_same_bits(world: Path, ranks: int, case: str, changes: dict[str, Any], stop: int) -> None:
    tensors, manifest = run_ranks(made, ranks, world, f"{case}/{ranks}/whole", changes)[0]
    found = run_ranks(interrupted, ranks, world, f"{case}/{ranks}/stopped", changes, stop)
    first = found[0]
    assert len(first["left"]) == len(first["before"]) and first["before"][stop - 1] == stop - 1
    assert len(first["before"]) < BLOCKS
    assert first["before"] + first["after"] == list(range(BLOCKS)), "each block is solved once"
    assert first["loads"] == ([] if case == "weights" else list(range(BLOCKS)))
    assert first["cleared"]
    assert first["tensors"].keys() == tensors.keys()
    assert all(torch.equal(value, first["tensors"][name]) for name, value in tensors.items())
    assert all(rank["manifest"]["modules"] == manifest["modules"] for rank in found)
    assert first["manifest"] == manifest
    assert list(first["manifest"]["modules"]) == list(manifest["modules"])


def damage(world: Path, name: str) -> list[int]:
    """A pass that goes on behind two blocks of which the second is damaged, or of other texts; what it solves."""
    write, solved = Parts.write, []
    asked: list[bool] = []

    def last(self: Parts, number: int, part: Any) -> None:
        write(self, number, part)
        solved.append(number)
        if number == 1 and not asked:
            asked.append(True)
            watch.ask_stop("the test")

    Parts.write = last  # type: ignore[method-assign]
    with pytest.raises(Preempted):
        made(world, name, {})
    watch.reset()
    solved.clear()
    block = world / name / "calibration" / "activations" / "block-1"
    if name == "flipped":
        data = bytearray((block / "block.safetensors").read_bytes())
        data[-5] ^= 1
        (block / "block.safetensors").write_bytes(data)
        made(world, name, {})
    else:
        assert json.loads((block / "manifest.json").read_text())["key"]
        made(world, name, {"calibration": {"samples": 10}})
    return solved


def test_damaged_and_foreign_blocks_are_done_again(world: Path) -> None:
    assert run_ranks(damage, 1, world, "flipped") == [[1, 2, 3]]
    assert run_ranks(damage, 1, world, "others") == [[0, 1, 2, 3]]
