"""torchrun and deepspeed as they are: the launcher killed, a rank killed under it, and before the ranks have met."""

import os
import signal
from pathlib import Path

import pytest

from faults.jobs import Who
from faults.kill import FULL, Case, Kill, Outcome, Range, compare, keep, results
from faults.launched import Launched
from helpers.launching import free_port

pytestmark = pytest.mark.skipif(not FULL, reason="NSLORA_FAULTS=full, or make faults")
ENGINES = {"torchrun": "fsdp2", "deepspeed": "zero3"}


def start(launcher: str, killing: Range, name: str, **env: str) -> Launched:
    """The launch line of the README for two ranks."""
    output = killing.folder / name / "run"
    port = free_port()
    command = {
        "torchrun": ["torchrun", "--nproc-per-node", "2", "--master-port", port],
        "deepspeed": ["deepspeed", "--num_accelerators", "2", "--master_port", port],
    }[launcher]
    return Launched(
        killing.folder / name / "said", output, *command, *killing.command(ENGINES[launcher], output, 2), **env
    )


def again(launcher: str, killing: Range, name: str) -> list[str]:
    """The same command finishes; returns what is different from an undisturbed run."""
    with start(launcher, killing, name) as run:
        assert run.wait() == 0, run.text()[-3000:]
        return compare(results(run.output), killing.reference(ENGINES[launcher]).result)


def steps(output: Path) -> list[Path]:
    """The checkpoints of the first arm so far."""
    return list(output.glob("checkpoints/step-*"))


@pytest.mark.parametrize("victim", ["launcher", 0, 1])
@pytest.mark.parametrize("launcher", ENGINES)
def test_killed_in_training(launcher: str, victim: Who, killing: Range) -> None:
    name = f"{launcher}-{victim}"
    with start(launcher, killing, name) as run:
        run.until(lambda: bool(steps(run.output)), "no checkpoint comes")
        os.kill(run.process.pid if victim == "launcher" else run.ranks()[victim], signal.SIGKILL)
        seconds = run.gone()
        status = run.wait()
        said = run.error_lines()
        assert status != 0
        assert len(said) == 1, run.text()[-3000:]
    case = Case(ENGINES[launcher], f"training step, under {launcher}", victim, 0)
    outcome = Outcome(case, [Kill(victim, "training", seconds, [status], said)])
    outcome.different = again(launcher, killing, name)
    keep(outcome)
    assert not outcome.different


@pytest.mark.parametrize("launcher", ENGINES)
def test_rank_killed_before_they_have_met(launcher: str, killing: Range) -> None:
    """The others cannot know of it; the launcher tells them."""
    name = f"{launcher}-early"
    with start(launcher, killing, name) as run:
        run.until(lambda: len(run.ranks()) == 2, "no ranks come")
        os.kill(run.ranks()[1], signal.SIGKILL)
        run.gone()
        assert run.wait() != 0
    assert not again(launcher, killing, name)
