"""A finished arm is taken up again only while everything it depends on, and its adapter's bytes, are the same."""

from pathlib import Path

import pytest

from nslora_dist.arms import BaseScores, FinishedArm
from nslora_dist.card import number
from nslora_dist.errors import UserError
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


def test_what_is_not_finite_is_kept_as_null(run: Path) -> None:
    scores = {"lm_eval": {"task": {"metrics": {"mcc": {"value": float("nan"), "stderr": float("inf")}}}}}
    kept = {"lm_eval": {"task": {"metrics": {"mcc": {"value": None, "stderr": None}}}}}
    finished(run).write(FIGURES | {"scores": scores})
    assert finished(run).read() == FIGURES | {"scores": kept}
    base = BaseScores(run, arm=load_recipe("tiny_math"), base="b", evaluation="e")
    base.write(scores)
    assert base.read() == kept
    assert number(float("nan")) == number(None) == "–"


@pytest.mark.parametrize("change", ["train.seed=1", "adapter.rank=8", "base_model.dtype=bfloat16"])
def test_a_changed_recipe_trains(run: Path, change: str) -> None:
    assert finished(run, change).read() is None


def test_changed_rows_train(run: Path) -> None:
    assert finished(run, rows="others").read() is None


def test_figures_that_were_altered_go_into_no_report(run: Path) -> None:
    base = BaseScores(run, arm=load_recipe("tiny_math"), base="b", evaluation="e")
    base.write({"adaptation": 0.25})
    for kept in (finished(run), base):
        text = kept.path.read_text()
        kept.path.write_text(text.replace("1.0", "1.5").replace("0.25", "0.75"))
        with pytest.raises(UserError, match=f"{kept.path.name}: altered.*; delete it, and the same command"):
            kept.read()
        kept.path.write_text(text)
        assert kept.read() is not None


def test_a_changed_or_missing_adapter_trains(run: Path) -> None:
    weights = run / "adapter" / WEIGHTS_FILE
    weights.write_bytes(b"weightz")
    assert finished(run).read() is None
    weights.unlink()
    assert finished(run).read() is None
