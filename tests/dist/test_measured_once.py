"""What was measured of an adapter is kept until it is on disk: an export that fails costs no evaluation."""

from pathlib import Path
from typing import Any

import pytest

from helpers.resume_run import recipe_of
from helpers.stages import CPU
from helpers.world import make_base, make_texts
from nslora_dist import arm_stage, artifacts
from nslora_dist.errors import StorageError
from nslora_dist.pipeline import Run


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_texts(tmp_path_factory.mktemp("measured"))
    make_base(folder / "llama")
    return folder


def run(world: Path, name: str, **train: Any) -> dict[str, Any]:
    return Run(
        recipe_of("single-1", world, world / name, {"train": {"epochs": None, "max_steps": 2} | train}), CPU
    ).train()


def test_an_export_that_fails_costs_no_evaluation(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export, evaluate, seen = arm_stage.export, arm_stage.evaluate, []

    def full(*_: Any, **__: Any) -> None:
        raise StorageError("no space left")

    def counted(*given: Any, **more: Any) -> dict[str, Any]:
        seen.append(given)
        return evaluate(*given, **more)

    monkeypatch.setattr(arm_stage, "evaluate", counted)
    monkeypatch.setattr(arm_stage, "export", full)
    with pytest.raises(StorageError):
        run(world, "full")
    kept = world / "full" / "arms" / "lora.measured.json"
    assert len(seen) == 2 and kept.is_file(), "the base and the adapter"
    monkeypatch.setattr(arm_stage, "export", export)
    again = run(world, "full")
    assert len(seen) == 2, "neither once more"
    assert not kept.exists() and (world / "full" / "arms" / "lora.json").is_file()
    undisturbed = run(world, "undisturbed")
    for key in ("evaluation", "interference", "losses"):
        assert again[key] == undisturbed[key]
    assert again["seconds"]["evaluation"] > 0


def test_what_was_measured_of_another_state_does_not_count(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state at the end of training is trained anew with other numbers: here, a checkpoint that was taken away."""
    export = arm_stage.export

    def full(*_: Any, **__: Any) -> None:
        raise StorageError("no space left")

    monkeypatch.setattr(arm_stage, "export", full)
    with pytest.raises(StorageError):
        run(world, "other")
    kept = world / "other" / "arms" / "lora.measured.json"
    text = kept.read_text()
    state = world / "other" / "checkpoints" / "step-2"
    state.rename(world / "step-2")
    with pytest.raises(StorageError):  # trains to the same state: what was measured counts
        run(world, "other")
    assert kept.read_text() == text
    found = artifacts.read_sealed(kept, remedy="")
    artifacts.write_sealed(kept, found | {"key": found["key"] | {"state": "another"}})
    monkeypatch.setattr(arm_stage, "export", export)
    seen = []
    evaluate = arm_stage.evaluate
    monkeypatch.setattr(arm_stage, "evaluate", lambda *a, **k: (seen.append(a), evaluate(*a, **k))[1])
    run(world, "other")
    assert len(seen) == 1, "the adapter again, and not the base"
