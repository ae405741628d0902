"""A rank that dies, stops, hangs or fails: every other rank ends, with one message in all and the same status."""

import json
import signal
import time
from pathlib import Path

import pytest

from helpers.watched import start
from nslora_dist.errors import EXIT_BUG, EXIT_PREEMPTED, EXIT_RANK_LOST, EXIT_STORAGE, EXIT_USER_ERROR

KILLED = -signal.SIGKILL


def test_nothing_happens_to_ranks_that_work(tmp_path: Path) -> None:
    started = start(tmp_path, 3)
    assert started.wait() == [0, 0, 0]
    assert started.said() == ""
    assert all((tmp_path / f"done-{rank}").is_file() for rank in range(3))
    first = json.loads(started.log(2).splitlines()[0])
    assert list(first) == ["time", "level", "rank", "phase", "progress", "message"]
    assert first["rank"] == 2 and "rank 2 of 3" in first["message"]


@pytest.mark.parametrize(("world_size", "lost"), [(2, 1), (3, 0)])
def test_a_killed_rank(tmp_path: Path, world_size: int, lost: int) -> None:
    """Rank 0 keeps the store that the others would ask."""
    started = start(tmp_path, world_size, fault="kill", rank=lost)
    codes = started.wait()
    assert codes == [KILLED if rank == lost else EXIT_RANK_LOST for rank in range(world_size)], started.said()
    error = started.error()
    assert error.startswith(f"training, step 3 of 5: rank {lost} is gone")
    assert error.endswith("run the same command again to continue from what output_dir holds")
    for rank in set(range(world_size)) - {lost}:
        assert f"rank {lost} is gone" in started.log(rank)


@pytest.mark.parametrize(("world_size", "lost"), [(2, 0), (3, 1)])
def test_a_stopped_rank(tmp_path: Path, world_size: int, lost: int) -> None:
    started = start(tmp_path, world_size, fault="stop", rank=lost, timeout=3)
    codes = started.wait(but=lost)
    assert codes == [None if rank == lost else EXIT_RANK_LOST for rank in range(world_size)], started.said()
    assert "training, step 3 of 5: " in started.error()
    assert f"rank {lost}" in started.error() and "no sign of life" in started.error()


@pytest.mark.parametrize(("world_size", "lost"), [(2, 0), (3, 1)])
def test_a_rank_that_hangs_ends_too(tmp_path: Path, world_size: int, lost: int) -> None:
    started = start(tmp_path, world_size, fault="sleep", rank=lost, timeout=3)
    assert started.wait() == [EXIT_RANK_LOST] * world_size, started.said()
    assert f"training, step 3 of 5: rank {lost} does not go on (alive, but nothing done for " in started.error()


def test_a_rank_that_works_alone_is_waited_for(tmp_path: Path) -> None:
    started = start(tmp_path, 3, fault="work alone", rank=0, timeout=3)
    assert started.wait() == [0, 0, 0], started.said()


def test_a_rank_that_computes_in_silence_is_waited_for(tmp_path: Path) -> None:
    """lm-eval on rank 0, while it draws 100,000 samples for a standard error."""
    started = start(tmp_path, 2, fault="compute", timeout=3)
    assert started.wait() == [0, 0], started.said()


def test_a_rank_that_waits_in_silence_is_not(tmp_path: Path) -> None:
    started = start(tmp_path, 2, fault="compute nothing", timeout=3)
    assert started.wait() == [EXIT_RANK_LOST] * 2, started.said()
    assert "training, step 3 of 5: rank 0 does not go on (alive, but nothing done for " in started.error()


def test_all_ranks_hang(tmp_path: Path) -> None:
    """Nothing raises then: the guard has to see it."""
    started = start(tmp_path, 2, fault="stall all", timeout=3)
    assert started.wait() == [EXIT_RANK_LOST] * 2, started.said()
    assert "no rank goes on" in started.error()


@pytest.mark.parametrize(
    ("fault", "status", "said"),
    [
        ("full", EXIT_STORAGE, "file: No space left on device; free some disk space and run the same command again"),
        ("user", EXIT_USER_ERROR, "this rank alone found something wrong"),
        ("bug", EXIT_BUG, "training, step 3 of 5: IndexError: list index out of range (a fault of this program; "),
    ],
)
def test_a_failure_on_one_rank_ends_all_with_its_status(tmp_path: Path, fault: str, status: int, said: str) -> None:
    started = start(tmp_path, 2, fault=fault)
    assert started.wait() == [status, status], started.said()
    assert said in started.error()
    if fault == "bug":
        assert f"traceback in {tmp_path}/logs/rank-1.log" in started.error()
        assert "Traceback" in started.log(1) and "IndexError" in started.log(1)


def test_all_ranks_stop_at_the_same_boundary(tmp_path: Path) -> None:
    started = start(tmp_path, 3, steps=1000, pause=0.1)
    started.until(2)
    started.signal(1, signal.SIGTERM)
    assert started.wait() == [EXIT_PREEMPTED] * 3, started.said()
    steps = {(tmp_path / f"at-{rank}").read_text() for rank in range(3)}
    assert len(steps) == 1
    assert started.error() == f"stopped at step {steps.pop()} after another rank"


def test_no_boundary_in_time(tmp_path: Path) -> None:
    started = start(tmp_path, 2, steps=1000, pause=1000, grace=1, timeout=60)
    started.until(0)
    for _ in range(2):  # the terminal and the launcher both pass a signal on
        started.signal(1, signal.SIGTERM)
    assert started.wait() == [EXIT_PREEMPTED] * 2, started.said()
    error = started.error()
    assert "SIGTERM: no boundary came within 1 s; the same command continues from what output_dir holds" in error


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    started = start(tmp_path, 2, steps=1000, pause=1000, grace=600, timeout=600)
    started.until(0)
    started.signal(0, signal.SIGINT)
    time.sleep(2.5)
    assert all(process.is_alive() for process in started.ranks)
    started.signal(0, signal.SIGINT)
    assert started.wait() == [EXIT_PREEMPTED] * 2, started.said()
    assert "SIGINT again: ended at once" in started.error()
    assert "stopping at the next boundary, within 600 s; Ctrl-C again ends it at once" in started.said()
