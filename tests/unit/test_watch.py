"""Phases, progress, logs that never raise, and what a failure is called."""

import errno
import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nslora_dist import base_files, command, dist, guard, logs, watch
from nslora_dist.batches import Batch
from nslora_dist.calibration_data import CalibrationTexts
from nslora_dist.effects import measure
from nslora_dist.errors import EXIT_BUG, EXIT_PREEMPTED, EXIT_STORAGE, Preempted, UserError, storage_error
from nslora_dist.peers import Peers, Sign
from nslora_dist.recipe import BaseModelSection
from nslora_dist.update_grams import collect_update_grams

log = logging.getLogger("nslora_dist")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    watch.reset()
    yield
    watch.reset()  # whoever was asked to stop here is not asked in the next file's tests


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_phases_nest_and_progress_belongs_to_the_innermost() -> None:
    before = watch.current()
    assert before.phase == "starting"
    with watch.phase("training"):
        watch.progress("step 7 of 400")
        with watch.phase("checkpoint"):
            assert str(watch.current()) == "training / checkpoint"
        assert str(watch.current()) == "training, step 7 of 400"
        count = watch.current().count
        watch.progress("step 7 of 400")
        assert watch.current().count > count  # the same words are progress too
    assert watch.current().phase == "between two phases" and watch.current().seconds < 60


def test_computing_is_progress_unless_a_rank_waits_for_others() -> None:
    def compute(seconds: float) -> int:
        before, until = watch.current().count, time.monotonic() + seconds
        while time.monotonic() < until:
            pass
        return watch.current().count - before

    with watch.working(every=0.2):
        while not compute(1.0):  # this process may get less of a processor than that
            pass
        with watch.waiting():  # on a GPU, spinning
            time.sleep(0.3)
            assert compute(1.0) == 0


def test_a_failure_remembers_where_it_was() -> None:
    with pytest.raises(KeyError) as caught, watch.phase("outer"):
        watch.progress("step 1")
        with watch.phase("inner"):
            watch.progress("file 2")
            raise KeyError
    assert watch.current().phase == "between two phases" and watch.current().seconds < 60
    watch.back_to(caught.value)
    assert str(watch.current()) == "outer / inner, file 2"


def test_a_log_is_held_back_until_there_is_a_folder(tmp_path: Path) -> None:
    logs.start(3)
    try:
        with watch.phase("calibration"):
            watch.progress("block 3 of 80")
            log.info("before")
        assert not list(tmp_path.iterdir())
        logs.open_at(tmp_path)
        try:
            raise ValueError("why")
        except ValueError:
            log.exception("after")
    finally:
        logs.stop()
    before, after = lines(tmp_path / "logs" / "rank-3.log")
    assert before["time"].endswith("+00:00")  # type: ignore[attr-defined]
    del before["time"]
    assert before == {
        "level": "INFO",
        "rank": 3,
        "phase": "calibration",
        "progress": "block 3 of 80",
        "message": "before",
    }
    assert "Traceback" in str(after["message"]) and "ValueError: why" in str(after["message"])
    logs.start(3)
    logs.open_at(tmp_path)
    log.info("again")
    logs.stop()
    assert len(lines(tmp_path / "logs" / "rank-3.log")) == 3


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_logging_never_raises_and_never_complains(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    logs.start(1)
    try:
        logs.open_at(blocked)
        assert "no log can be written" in capfd.readouterr().err
        log.info("no folder")
        assert logs.path() is None
        (tmp_path / "logs").mkdir()
        logs.open_at(tmp_path)
        handler = logs._logs.file  # type: ignore[union-attr]
        os.dup2(os.open("/dev/full", os.O_WRONLY), handler._file or 0)
        log.info("no room")
    finally:
        logs.stop()
    assert capfd.readouterr().err == ""


def test_a_full_disk_has_a_name_a_path_and_a_status(tmp_path: Path) -> None:
    full = storage_error(OSError(errno.ENOSPC, "x", "/data/run/file"))
    assert full is not None and full.status == EXIT_STORAGE
    assert str(full).startswith("/data/run/file: No space left on device; free some disk space")
    assert storage_error(FileNotFoundError(errno.ENOENT, "x")) is None
    assert storage_error(ValueError("No space left on device")) is None


@pytest.mark.parametrize(
    "said", ["I/O error: No space left (os error 28)", "IoError(Os { code: 28, kind: StorageFull })"]
)
def test_safetensors_says_it_in_words(said: str) -> None:
    found = storage_error(type("SafetensorError", (Exception,), {})(said))
    assert found is not None and "No space left on device" in str(found)


@pytest.mark.parametrize(
    ("message", "loss"),
    [
        ("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1", True),
        ("[/x/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 5000ms for recv operation", True),
        ("The size of tensor a (3) must match the size of tensor b (4)", False),
    ],
)
def test_which_failures_are_another_ranks(message: str, loss: bool) -> None:
    assert guard.is_loss(RuntimeError(message)) == loss
    wrapped = ValueError("while stepping")
    wrapped.__cause__ = RuntimeError(message)
    assert guard.is_loss(wrapped) == loss
    assert not guard.is_loss(UserError(message))
    assert guard.is_loss(torch.distributed.DistBackendError("x"))


def peers(**signs: tuple[int, float, bool]) -> Peers:
    """Rank 0's view: name → (count of units of work, seconds since the last sign of life, waits in a collective)."""
    made = object.__new__(Peers)
    made.rank, made.world_size, made.keeper, made.broken = 0, len(signs), 0, False
    made.answered = time.monotonic()
    made.signs = {
        rank: (Sign(1, count, 9.0, waiting, "0"), made.answered - silent)
        for rank, (count, silent, waiting) in enumerate(signs.values())
    }
    return made


def test_who_is_missing() -> None:
    assert peers(a=(5, 0, True), b=(5, 0, True)).lost(6.0) is None
    found = str(peers(a=(5, 0, True), b=(5, 8, True)).lost(6.0))
    assert "rank 1 is gone, stopped or cut off (no sign of life for 8 s)" in found
    several = peers(a=(5, 0, True), b=(5, 8, True), c=(5, 7, True), d=(5, 9, True))
    assert str(several.lost(6.0)).startswith("ranks 1, 2 and 3 are gone")
    assert "rank 2 does not go on" in peers(a=(4, 0, True), b=(4, 0, True), c=(9, 0, False)).stalled()
    assert "rank 1 does not go on" in peers(a=(5, 0, True), b=(4, 0, True)).stalled()  # both wait: who has done less
    assert peers(a=(5, 0, True), b=(5, 0, True)).stalled().startswith("no rank goes on")
    store_gone = peers(a=(5, 0, True), b=(5, 0, True))
    store_gone.broken = True
    assert str(store_gone.lost(6.0)).startswith("rank 0 is gone")
    store_gone.keeper = None
    assert str(store_gone.lost(6.0)).startswith("the launcher of the first machine is gone")


def test_a_rank_that_reads_what_others_give_says_that_it_waits() -> None:
    """Over NCCL it stands in a line of ours then, and in no frame of a collective."""
    store = torch.distributed.PrefixStore("watch", torch.distributed.HashStore())
    ours = Peers(store, rank=0, world_size=1, keeper=0)

    def waits() -> bool:
        ours._moved = time.monotonic() - 9.0
        ours._say()
        return bool(json.loads(store.get("alive/0"))["waiting"])

    class Numbers:
        def tolist(self) -> bool:
            return waits()

    assert dist.numbers(Numbers()) is True  # type: ignore[arg-type]
    assert not waits()


def test_ranks_stall_together_or_not_at_all() -> None:
    """A rank that waits has begun nothing for as long as another is at work."""
    ours = peers(a=(5, 0, True), b=(9, 0, False))  # the other last began something 9 s ago
    ours._count, ours._moved = watch.current().count, time.monotonic() - 60.0
    assert ours.nobody_goes_on(5.0) and not ours.nobody_goes_on(30.0)
    watch.progress("another unit")
    assert not ours.nobody_goes_on(5.0)


def test_what_is_fetched_from_the_hub_is_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = [watch.current().count]

    def fetch(name: str, *, tqdm_class: Any, **_: Any) -> str:
        with tqdm_class(total=20, disable=True) as bar:
            for _ in range(2):
                bar.update(10)
                counts.append(watch.current().count)
        return str(tmp_path)

    monkeypatch.setattr(base_files, "snapshot_download", fetch)
    assert base_files.locate(BaseModelSection(path="somebody/base")) == tmp_path
    assert counts[0] < counts[1] < counts[2]


def test_heartbeats_in_a_long_phase(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with dist.process_group(heartbeat_seconds=0.3):
        logs.open_at(tmp_path)
        with watch.phase("calibration"):
            watch.progress("block 3 of 80")
            deadline = time.monotonic() + 30
            path = tmp_path / "logs" / "rank-0.log"
            while path.read_text().count("alive: ") < 2 and time.monotonic() < deadline:
                time.sleep(0.05)
    said = [str(line["message"]) for line in lines(path) if "alive" in str(line["message"])]
    assert len(said) >= 2 and said[0].startswith("alive: calibration, block 3 of 80, ")
    assert "alive: calibration, block 3 of 80" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (Preempted("stopped at step 3"), EXIT_PREEMPTED, "stopped at step 3"),
        (OSError(errno.EROFS, "x", "out/file"), EXIT_STORAGE, "out/file: Read-only file system; mount it for writing"),
        (KeyError("k"), EXIT_BUG, "training: KeyError: 'k' (a fault of this program; traceback in "),
    ],
)
def test_one_line_and_a_status(
    error: Exception,
    status: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def work(recipe: object, device: torch.device) -> None:
        logs.open_at(tmp_path)
        with watch.phase("training"):
            raise error

    monkeypatch.setattr("sys.argv", ["x", "--recipe", "r"])
    assert command.run("x", work, load=lambda path, overrides: SimpleNamespace()) == status
    err = capsys.readouterr().err
    assert err.startswith(f"error: {said}") and len(err.splitlines()) == 1
    log_text = (tmp_path / "logs" / "rank-0.log").read_text()
    assert f"(exit status {status})" in log_text
    assert ("Traceback" in log_text) == (status != EXIT_PREEMPTED)


def test_measuring_and_collecting_stop_at_the_next_batch() -> None:
    """Before a model is needed: there is none here."""
    nothing: Any = None
    ids = torch.zeros(1, 4, dtype=torch.int64)
    text = CalibrationTexts("french", None, [ids[0]], [], "", 0, nothing)
    watch.saved("checkpoints/step-7")
    watch.ask_stop("the test")
    said = "as asked; the same command continues from checkpoints/step-7"
    with pytest.raises(Preempted, match=f"stopped in the effect on french, {said}"):
        measure(nothing, [text], batch_size=1, device=torch.device("cpu"))
    with pytest.raises(Preempted, match=f"export: stopped in the update Grams, {said}"):
        collect_update_grams(torch.nn.Linear(1, 1), [Batch(ids, None, None, ids)], nothing, device=torch.device("cpu"))
