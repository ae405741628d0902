"""A checkpoint of any engine on any number of ranks is taken up by any other; by the same one to the last bit."""

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.ranks import run_ranks
from helpers.resume_run import STEPS, Resumed, resume_each, same, whole
from helpers.world import make_base, make_texts

LAYOUTS = ("single-1", "fsdp2-1", "fsdp2-2", "fsdp2-4", "zero3-1", "zero3-2", "zero3-4")
SAVED = 2
"""The step whose checkpoints are taken up."""
TOLERANCE = 1e-5
"""Relative, of float32 losses across layouts: sums of other numbers of ranks are rounded in another order."""


def ranks(layout: str) -> int:
    return int(layout.split("-")[1])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_texts(tmp_path_factory.mktemp("resume"))
    make_base(folder / "llama")
    make_base(folder / "dropout", attention_dropout=0.3)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(world: Path) -> dict[str, list[Resumed]]:
    return {layout: run_ranks(whole, ranks(layout), layout, world, {}) for layout in LAYOUTS}


def checkpoint(world: Path, layout: str, step: int = SAVED, name: str = "whole") -> Path:
    return world / layout / name / "checkpoints" / f"step-{step}"


@pytest.fixture(scope="module")
def resumed(world: Path, uninterrupted: Any) -> dict[str, list[dict[str, Resumed]]]:
    """Every layout from every layout's checkpoint."""
    starts = {layout: checkpoint(world, layout) for layout in LAYOUTS}
    return {layout: run_ranks(resume_each, ranks(layout), layout, world, starts, {}) for layout in LAYOUTS}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_layout_goes_on_to_the_last_bit(uninterrupted: Any, resumed: Any, layout: str) -> None:
    one, other = uninterrupted[layout][0], resumed[layout][0][layout]
    assert len(one.trained.losses) == STEPS and same(one, other)
    assert not torch.equal(one.factors["model.layers.0.mlp.up_proj.lora_B"], torch.zeros(128, 5))


@pytest.mark.parametrize("to", LAYOUTS)
@pytest.mark.parametrize("of", LAYOUTS)
def test_any_layout_goes_on_from_any_other(uninterrupted: Any, resumed: Any, of: str, to: str) -> None:
    first, *others = resumed[to]
    found = first[of]
    assert found.trained.losses[:SAVED] == uninterrupted[of][0].trained.losses[:SAVED]
    reference = uninterrupted["single-1"][0].trained
    assert found.trained.losses == pytest.approx(reference.losses, rel=TOLERANCE)
    assert found.trained.tokens == reference.tokens and found.trained.updates == STEPS
    assert all(other[of].trained.losses == found.trained.losses for other in others)
    engines = [(part["engine"], part["world_size"], part["from"], part["to"]) for part in found.history]
    assert engines == [(of.split("-")[0], ranks(of), 0, SAVED), (to.split("-")[0], ranks(to), SAVED, STEPS)]


@pytest.mark.parametrize("to", LAYOUTS)
@pytest.mark.parametrize("of", LAYOUTS)
def test_every_sample_of_the_epoch_once(uninterrupted: Any, resumed: Any, of: str, to: str) -> None:
    before = [rank.seen[step] for rank in uninterrupted[of] for step in range(SAVED)]
    after = [samples for rank in resumed[to] for samples in rank[of].seen.values()]
    assert all(min(rank[of].seen) == SAVED for rank in resumed[to])
    assert sorted(sample for part in (*before, *after) for sample in part) == list(range(70))


def test_a_start_between_two_others_counts_once(world: Path, uninterrupted: Any) -> None:
    """Twice interrupted, by three layouts."""
    starts = {"again": checkpoint(world, "fsdp2-2")}
    run_ranks(resume_each, 4, "zero3-4", world, starts, {"checkpoint": {"every": 3, "keep_last": 9}})
    starts = {"third": checkpoint(world, "zero3-4", 3, "from_again")}
    found = run_ranks(resume_each, 1, "single-1", world, starts, {})[0]["third"]
    assert found.trained.losses == pytest.approx(uninterrupted["single-1"][0].trained.losses, rel=TOLERANCE)
    assert [part["to"] for part in found.history] == [2, 3, 5]


CASES: dict[str, dict[str, Any]] = {
    "bfloat16": {"base_model": {"dtype": "bfloat16"}},
    "nf4": {"base_model": {"dtype": "bfloat16", "quantization": "nf4"}},
    "null_lora": {"adapter": {"method": "null_lora", "rank": 8, "null_dim": 16, "null_threshold": 0.3}},
    "v1": {"adapter": {"method": "lora_null", "form": "residual", "freeze_a": False}},
    "accumulation": {"train": {"micro_batch_size": 1}},
    "dropout": {"base": "dropout"},  # type: ignore[dict-item]
}


@pytest.mark.parametrize("layout", ["single-1", "fsdp2-2", "zero3-2"])
def test_every_kind_of_training_goes_on_to_the_last_bit(world: Path, layout: str) -> None:
    """float32 masters behind bfloat16 weights, 4-bit bases, other adapters, random states."""
    curves = {}
    for case, changes in CASES.items():
        one = run_ranks(whole, ranks(layout), layout, world, changes, case)[0]
        starts = {case: checkpoint(world, layout, name=case)}
        other = run_ranks(resume_each, ranks(layout), layout, world, starts, changes)[0][case]
        assert same(one, other), case
        curves[case] = one.trained.losses
    assert curves["dropout"] != pytest.approx(curves["accumulation"], rel=1e-4), "no dropout: nothing was drawn"
