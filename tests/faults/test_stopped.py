"""Asked to stop, or stalled, in the middle of work: one line, one status, and the same command finishes as ever."""

import random
import re
from collections.abc import Sequence

import pytest

from faults.jobs import Job
from faults.kill import FULL, PHASES, Range, compare, draw, finished, results
from nslora_dist.errors import EXIT_PREEMPTED, EXIT_RANK_LOST

STOPS = [("fsdp2", "training step", 1), ("zero3", "calibration block", 0)]
if FULL:
    STOPS += [
        ("zero3", "training step", 0),
        ("zero3", "evaluation", 1),
        ("zero3", "export", 0),
        ("zero3", "loading", 1),
    ]
    STOPS += [("fsdp2", "calibration block", 1), ("fsdp2", "evaluation", 0), ("fsdp2", "report", 1)]


def send(
    killing: Range, engine: str, phase: str, rank: int, name: str, number: str, overrides: Sequence[str] = ()
) -> tuple[Job, str]:
    """A run of which one rank gets a signal somewhere in a phase, at its end; and what the rank was doing."""
    nth, delay = draw(killing.reference(engine).places[rank], PHASES[phase], random.Random(name))
    strike = {"rank": rank, "pattern": PHASES[phase], "nth": nth, "delay": delay, "victim": number}
    job, _ = killing.start(engine, name, overrides=overrides, strike=strike)
    if number == "SIGSTOP":
        others = [each for each in (0, 1) if each != rank]
        killing.zygote.until(lambda: all(each in job.statuses for each in others), f"{name}: the other hangs")
        job.kill(rank)
    job.wait()
    struck = [place["place"] for place in job.places(rank) if "struck" in place]
    assert struck, (name, job.errors(rank)[-1500:])
    return job, struck[-1]


@pytest.mark.parametrize(("engine", "phase", "rank"), STOPS)
def test_asked_to_stop(killing: Range, engine: str, phase: str, rank: int) -> None:
    """SIGTERM to one rank: all leave with a state on disk, at the same boundary, and the same command continues."""
    name = f"stop-{engine}-{phase}-{rank}".replace(" ", "_")
    job, place = send(killing, engine, phase, rank, name, "SIGTERM")
    said = [line for each in (0, 1) for line in job.error_lines(each)]
    statuses = {job.statuses[0], job.statuses[1]}
    if statuses != {0}:
        assert statuses == {EXIT_PREEMPTED}, (place, job.errors(0), job.errors(1))
        assert len(said) == 1 and "as asked; the same command continues" in said[0], said
    else:  # past the last boundary there is nothing to stop
        assert not re.search(r"^(data|calibration|load|training)", place), place
    job, output = killing.start(engine, name)
    finished(job.wait())
    assert not compare(results(output), killing.reference(engine).result)


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"] if FULL else ["fsdp2"])
def test_a_rank_that_stalls(killing: Range, engine: str) -> None:
    """SIGSTOP in training: the other rank waits as long as the recipe says, and names rank and phase."""
    name = f"stall-{engine}"
    job, place = send(killing, engine, "training step", 1, name, "SIGSTOP", ["engine.timeout_seconds=8"])
    assert job.statuses[0] == EXIT_RANK_LOST
    log = (killing.folder / name / "run" / "logs" / "rank-0.log").read_text()
    assert len(job.error_lines(0)) == 1, job.errors(0) + log
    (said,) = job.error_lines(0)
    assert place.partition(",")[0] in said and "rank 1" in said, (place, said)
    job, output = killing.start(engine, name)
    finished(job.wait())
    assert not compare(results(output), killing.reference(engine).result)
