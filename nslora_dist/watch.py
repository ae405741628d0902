"""What this rank is doing, and whether it was asked to stop: read by log records, heartbeats and the other ranks.

Plain values that the main thread writes, or threads that it waits for, and others read; nothing here touches a file.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

_PLACE = "_nslora_place"
_WRITES = 64 * 2**10
"""Bytes written to files between two looks that are work: a download, which costs a processor next to nothing."""
OUTSIDE = ("starting", "between two phases")


@dataclass
class _Frame:
    name: str
    since: float
    progress: str = ""


@dataclass(frozen=True)
class Current:
    """A rank's place in its work.

    ``count`` grows with every unit of work and every phase that begins or ends: the same twice is a standstill.
    """

    phase: str
    progress: str
    seconds: float
    count: int

    def __str__(self) -> str:
        return ", ".join(part for part in (self.phase, self.progress) if part)


class _State:
    frames: tuple[_Frame, ...] = (_Frame(OUTSIDE[0], time.monotonic()),)
    count = 0
    waiting = False
    stop: str | None = None
    saved: str | None = None


_state = _State()


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Names what follows, for logs, heartbeats and messages; phases nest, and the innermost one's progress is shown."""
    before = _state.frames
    # What a rank does before its first phase, and between two, is no part of any.
    outer = before if before[0].name not in OUTSIDE else ()
    _state.frames = (*outer, _Frame(name, time.monotonic()))
    _state.count += 1
    try:
        yield
    except BaseException as error:
        if not hasattr(error, _PLACE):
            setattr(error, _PLACE, _state.frames)  # what is said about it, further out, names the place
        raise
    finally:
        _state.frames = outer or (_Frame(OUTSIDE[1], time.monotonic()),)
        _state.count += 1


def back_to(error: BaseException) -> None:
    """Shows the phase in which ``error`` was raised as the current one, for what is said about it."""
    _state.frames = getattr(error, _PLACE, _state.frames)


def progress(text: str) -> None:
    """Says that another unit of work was begun, as in ``step 7 of 400, micro-batch 1``; cheap enough for any loop."""
    _state.frames[-1].progress = text
    _state.count += 1


@contextmanager
def working(*, every: float = 5.0) -> Iterator[None]:
    """Progress as long as this process computes or writes, for long work in code of other people that says nothing.

    Where it only waits, on a lock, on a network or, with a busy processor, on a GPU for other ranks (``waiting``), it
    shows none, and the guard still finds that it hangs.

    Args:
        every: seconds; a tenth of them on a processor is work, which what looks after this process does not come to.
    """
    done = threading.Event()

    def look() -> None:
        before = time.process_time(), _written()
        while not done.wait(every):
            now = time.process_time(), _written()
            if (now[0] - before[0] > every / 10 or now[1] - before[1] > _WRITES) and not _state.waiting:
                _state.count += 1
            before = now

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _written() -> int:
    """Bytes that this process has written to files so far; 0 where the system does not count them."""
    with suppress(OSError, ValueError), open("/proc/self/io", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("wchar:"))
    return 0


@contextmanager
def waiting() -> Iterator[None]:
    """Says that this rank, if it stands still here, waits for others: over NCCL it does so where it reads a number."""
    _state.waiting = True
    try:
        yield
    finally:
        _state.waiting = False


def is_waiting() -> bool:
    """Whether it said so."""
    return _state.waiting


def current() -> Current:
    """Phase, progress, seconds in this phase, and the count of units of work."""
    frames = _state.frames
    names = " / ".join(frame.name for frame in frames)
    return Current(names, frames[-1].progress, time.monotonic() - frames[-1].since, _state.count)


def saved(what: str) -> None:
    """Names the state that the same command would continue from, as in ``checkpoints/step-300``."""
    _state.saved = what


def continues_from() -> str:
    """What the same command continues from, for a message."""
    return _state.saved or "what output_dir holds"


def ask_stop(why: str) -> None:
    """Asks this rank to stop at its next boundary; ``dist.stopping`` tells the others."""
    _state.stop = _state.stop or why


def stop_asked() -> bool:
    """Whether this rank was asked to stop; the ranks agree on it in ``dist.stopping``."""
    return _state.stop is not None


def why_stop() -> str:
    """Who asked this rank to stop, as in ``SIGTERM``."""
    return _state.stop or "another rank"


def reset() -> None:
    """Forgets everything, for the next run in one process."""
    _state.frames, _state.count = (_Frame(OUTSIDE[0], time.monotonic()),), 0
    _state.stop = _state.saved = None
