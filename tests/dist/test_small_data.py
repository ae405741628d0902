"""Fewer rows than ranks: ranks with nothing to do keep step, and the losses are those of one rank."""

from pathlib import Path

import pytest

from helpers.ranks import run_ranks
from helpers.stages import started
from helpers.world import make_base, make_recipe, make_texts, write_rows, zero_config
from nslora_dist import dist


def losses(engine: str, folder: Path) -> list[float]:
    settings = {"name": engine}
    if engine == "zero3":
        with dist.together("config"):
            if dist.is_main():
                zero_config(folder)
        settings["config"] = str(folder / "zero.json")
    recipe = make_recipe(
        folder,
        folder / "base",
        folder / f"run_{engine}",
        adapter={"method": "lora"},
        data={"path": str(folder / "few.jsonl"), "on_bad_row": "skip"},
        train={"max_steps": 4, "micro_batch_size": 1, "global_batch_size": 4},
        engine=settings,
    )
    with started(recipe) as stage:
        assert (stage.data.samples, stage.data.bad_rows, stage.data.steps_per_epoch) == (2, {"null": 1}, 1)
        return stage.train().losses


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    folder = make_texts(tmp_path_factory.mktemp("few"))
    make_base(folder / "base")
    rows = [{"prompt": "w1 w2", "response": "w3 w4"}, {"prompt": "w5", "response": None}]
    write_rows(folder / "few.jsonl", [*rows, {"prompt": "w6", "response": "w7"}])
    (alone,) = run_ranks(losses, 1, "single", folder)
    assert alone[-1] < alone[0]
    return folder, alone


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_two_rows_on_four_ranks(few: tuple[Path, list[float]], engine: str) -> None:
    folder, alone = few
    for found in run_ranks(losses, 4, engine, folder):
        assert found == pytest.approx(alone, rel=1e-5)
