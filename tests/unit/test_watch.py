"""Phases, progress, logs that never raise, and what a failure is called."""

import errno
import json
import logging
import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nslora_dist import base_files, command, dist, guard, logs, meeting, reasons, rows, watch
from nslora_dist.batches import Batch
from nslora_dist.calibration_data import CalibrationTexts
from nslora_dist.effects import measure
from nslora_dist.errors import (
    EXIT_BUG,
    EXIT_PREEMPTED,
    EXIT_STORAGE,
    EXIT_USER_ERROR,
    Preempted,
    UserError,
    storage_error,
)
from nslora_dist.peers import Peers, Sign
from nslora_dist.recipe import BaseModelSection
from nslora_dist.update_grams import collect_update_grams

log = logging.getLogger("nslora_dist")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    watch.reset()
    yield
    watch.reset()  # whoever was asked to stop here is not asked in the next file's tests


NCCL = "NCCL error in: ProcessGroupNCCL.cpp:77, "


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


def test_a_download_is_progress_though_it_computes_nothing(tmp_path: Path) -> None:
    def wait_for(file: Any, seconds: float) -> int:
        before, until = watch.current().count, time.monotonic() + seconds
        while time.monotonic() < until and watch.current().count == before:
            file.write(b"x" * 2**18)
            time.sleep(0.1)
        return watch.current().count - before

    with watch.working(every=0.3), (tmp_path / "fetched").open("wb", buffering=0) as file:
        assert wait_for(file, 30.0)
        with watch.waiting():
            time.sleep(0.4)
            assert not wait_for(file, 1.0)


def test_ranks_that_wait_for_rows_see_rank_0_work(tmp_path: Path) -> None:
    """Rows are not read again from where they were: ended for a standstill, a run would never come to train."""

    def read() -> int:
        before, until = watch.current().count, time.monotonic() + 60.0
        with (tmp_path / "fetched").open("wb", buffering=0) as file:
            while watch.current().count == before and time.monotonic() < until:
                file.write(b"x" * 2**18)
                time.sleep(0.05)
        return watch.current().count - before

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watch, "working", partial(watch.working, every=0.3))
        assert rows.from_rank0(read) >= 1


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
        # NCCL tells of this rank's own trouble in the same class and words: nobody else is to be looked for.
        (f"{NCCL}unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'", False),
        (
            f"{NCCL}invalid usage\nLast error:\nDuplicate GPU detected : rank 1 and rank 0 both on CUDA device 1000",
            False,
        ),
        (f"{NCCL}remote process exited or there was a network error\nLast error:\nNET/IB : Got completion", True),
    ],
)
def test_which_failures_are_another_ranks(message: str, loss: bool) -> None:
    assert reasons.is_loss(RuntimeError(message)) == loss
    wrapped = ValueError("while stepping")
    wrapped.__cause__ = RuntimeError(message)
    assert reasons.is_loss(wrapped) == loss
    assert not reasons.is_loss(UserError(message))
    assert reasons.is_loss(torch.distributed.DistBackendError("x"))


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


def test_what_nccl_says_last_is_told() -> None:
    """Its first line says that something failed, its last one what."""
    error = torch.distributed.DistBackendError(f"{NCCL}network error\nLast error:\nsocketProgress: closed by b<4>\n")
    ours = object.__new__(guard.Guard)
    ours.peers, ours.lost_after = peers(a=(5, 0, True)), 0.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guard, "QUICK", -3.0)  # whoever is gone would have been missed by now
        found = ours._find_loss(error)
    assert found.endswith(f"though all are alive: {NCCL}network error; socketProgress: closed by b<4>")


def test_a_rank_without_its_gpu_is_named() -> None:
    meeting.same_kind([("cuda", "a"), ("cuda", "b")])
    meeting.same_kind([("cpu", "a"), ("cpu", "a")])
    with pytest.raises(UserError, match=r"2 of 4 ranks see no GPU, the others do: rank 2 \(b\), 3 \(b\); look at"):
        meeting.same_kind([("cuda", "a"), ("cuda", "a"), ("cpu", "b"), ("cpu", "b")])


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(UserError, match="LOCAL_RANK 4: this machine shows 4 GPUs, one a process; start fewer"):
        meeting.join(torch.device("cuda", 4), 5.0)


def test_nccl_is_not_to_abort_ranks_whatever_torchrun_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun sets 1, with which NCCL's own watchdog ends a rank without a line."""
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda *_, **__: iter([(torch.distributed.HashStore(), 0, 2)]))
    joined: list[str] = []
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **_: joined.append(backend))
    meeting.join(torch.device("cuda", 0), 5.0)
    assert joined == ["cuda:nccl,cpu:gloo"] and os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "0"


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
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation"),
            EXIT_USER_ERROR,
            "training: CUDA out of memory. Tried to allocate 2.00 GiB.; lower train.micro_batch_size, ",
        ),
        (
            torch.distributed.DistBackendError(f"{NCCL}x\nLast error:\nDuplicate GPU detected : rank 1 and rank 0"),
            EXIT_USER_ERROR,
            "training: two ranks have the same GPU (NCCL: Duplicate GPU detected); start one process a GPU",
        ),
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
