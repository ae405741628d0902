"""A finished arm is taken up again only while everything it depends on, and its adapter's bytes, are the same."""

from pathlib import Path

import pytest

from nslora_dist.arms import FinishedArm
from nslora_dist.export import WEIGHTS_FILE
from nslora_dist.recipe_file import load_recipe

FIGURES = {"losses": [2.0, 1.0], "scores": {"adaptation": 1.0}}


def finished(run: Path, *overrides: str, rows: str = "r") -> FinishedArm:
    arm = load_recipe("tiny_math", overrides)
    return FinishedArm(run, "null_space", run / "adapter", arm=arm, hashes={"base": "b", "rows": rows})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / WEIGHTS_FILE).write_bytes(b"weights")
    finished(tmp_path).write(FIGURES)
    return tmp_path


def test_the_same_command_takes_the_figures_up(run: Path) -> None:
    assert finished(run).read() == FIGURES
    assert (
        finished(
            run, "train.log_every=3", "output_dir=elsewhere", "engine.name=fsdp2", "train.micro_batch_size=8"
        ).read()
        == FIGURES
    )


@pytest.mark.parametrize("change", ["train.seed=1", "adapter.rank=8", "base_model.dtype=bfloat16"])
def test_a_changed_recipe_trains(run: Path, change: str) -> None:
    assert finished(run, change).read() is None


def test_changed_rows_train(run: Path) -> None:
    assert finished(run, rows="others").read() is None


def test_a_changed_or_missing_adapter_trains(run: Path) -> None:
    weights = run / "adapter" / WEIGHTS_FILE
    weights.write_bytes(b"weightz")
    assert finished(run).read() is None
    weights.unlink()
    assert finished(run).read() is None
