"""A toy world, ranks to kill, and the figures of ``make faults``."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from faults.hosts import host_outcomes, host_summary
from faults.jobs import Zygote
from faults.kill import FULL, Range, figures, outcomes, summary
from helpers.launching import ROOT, World
from helpers.world import make_base, make_recipe, make_texts


@pytest.fixture(scope="session")
def fault_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A job of a few seconds: two arms of four steps, a checkpoint after each step."""
    folder = tmp_path_factory.mktemp("faults")
    make_base(folder / "base")
    make_texts(folder)
    task = {"path": str(folder / "task.jsonl"), "samples": 3}
    recipe = make_recipe(
        folder,
        folder / "base",
        folder / "unused",
        calibration={"samples": 6, "heldout_fraction": 0.34, "batch_size": 6},
        train={"max_steps": 4, "global_batch_size": 12, "micro_batch_size": 3},
        checkpoint={"every": 1, "keep_last": 2},
        evaluation={
            "adaptation": task,
            "retention": {"kept": task},
            "baselines": {"lora": {"adapter": {"method": "lora"}, "train": {"learning_rate": 1e-3}}},
        },
    )
    tree = yaml.safe_load(recipe.to_yaml())
    del tree["output_dir"]
    (folder / "toy.yaml").write_text(yaml.safe_dump(tree))
    return World(folder, folder / "toy.yaml")


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    with Zygote() as started:
        yield started


@pytest.fixture(scope="session")
def killing(zygote: Zygote, fault_world: World) -> Range:
    def command(engine: str, output: Path, world_size: int) -> list[str]:
        whole = ["launch/train.py", "--recipe", str(fault_world.recipe)]
        rows = 12 // world_size if world_size % 2 else 3  # on an even number of ranks, micro-batches are summed up
        return [*whole, f"engine.name={engine}", f"output_dir={output}", f"train.micro_batch_size={rows}"]

    return Range(zygote, fault_world.folder, command)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints the figures, and keeps them where all cases were tried."""
    if not outcomes and not host_outcomes:
        return
    tables = ([summary(outcomes)] if outcomes else []) + ([host_summary(host_outcomes)] if host_outcomes else [])
    table = "\n\n".join(tables)
    terminalreporter.write_line("")
    terminalreporter.write_line(table)
    if FULL:
        path = ROOT / "build" / "faults.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(figures(outcomes, hosts=[o.as_json() for o in host_outcomes]))
        terminalreporter.write_line(f"\n{path}")
