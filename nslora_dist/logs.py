"""One log a rank, ``logs/rank-N.log`` in the run folder: JSON lines, kept in memory until that folder is this run's."""

import json
import logging
import os
import sys
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from nslora_dist import watch
from nslora_dist.redact import redact

CLAIM = ".ended-"
KEPT = 10_000
"""Records held back at most before the folder is known; a run that claims none drops them."""


class RankLog(logging.Handler):
    """Writes records to this rank's file; never raises and never prints, whatever happens to the disk."""

    def __init__(self, rank: int) -> None:
        super().__init__(logging.INFO)
        self.rank = rank
        self.path: Path | None = None
        self._held: list[str] = []
        self._file: int | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Writes one line, or keeps it until ``open_at``."""
        with suppress(Exception):  # a full disk must not end a run that could go on, nor fill the terminal
            line = self._line(record)
            if self._file is not None:
                os.write(self._file, line.encode("utf-8", "replace"))
            elif len(self._held) < KEPT:
                self._held.append(line)

    def _line(self, record: logging.LogRecord) -> str:
        place = watch.current()
        message = record.getMessage()
        if record.exc_info:
            message += "\n" + logging.Formatter().formatException(record.exc_info)
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "rank": self.rank,
            "phase": place.phase,
            "progress": place.progress,
            "message": redact(message),
        }
        return json.dumps(entry, ensure_ascii=False) + "\n"

    def open_at(self, folder: Path) -> None:
        """Appends from now on to ``folder/logs/rank-N.log``, what was held back first."""
        if self._file is not None:
            return
        try:
            (folder / "logs").mkdir(parents=True, exist_ok=True)
            path = folder / "logs" / f"rank-{self.rank}.log"
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            self._file = os.open(path, flags, 0o666)
            self.path = path
            held, self._held = self._held, []
            os.write(self._file, "".join(held).encode("utf-8", "replace"))
        except OSError as error:
            say(f"{folder / 'logs'}: no log can be written ({error.strerror}); the run goes on without")

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
        super().close()


class Console(logging.Handler):
    """Writes records to the terminal as it is at that moment; never raises."""

    def emit(self, record: logging.LogRecord) -> None:
        """Writes one line."""
        if record.exc_info:  # tracebacks are for the log
            return
        with suppress(Exception):
            clock = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
            say(f"{clock} {record.getMessage()}")


@dataclass
class _Logs:
    """This process's handlers, and what the root logger was like before."""

    file: RankLog
    console: Console
    level: int
    run: str = ""


_logs: _Logs | None = None


def start(rank: int) -> None:
    """Begins to keep this rank's records, and to show rank 0's in the terminal; of other ranks only warnings."""
    global _logs
    stop()
    root = logging.getLogger()
    _logs = _Logs(RankLog(rank), Console(logging.INFO if rank == 0 else logging.WARNING), root.level)
    root.addHandler(_logs.file)
    root.addHandler(_logs.console)
    root.setLevel(logging.INFO)


def stop() -> None:
    """Leaves the root logger as it was before ``start``."""
    global _logs
    if _logs is None:
        return
    root = logging.getLogger()
    root.removeHandler(_logs.file)
    root.removeHandler(_logs.console)
    root.setLevel(_logs.level)
    _logs.file.close()
    _logs = None


def begin_run(run: str, world_size: int) -> None:
    """Writes the line that a start begins with, into the log alone."""
    if _logs is not None:
        _logs.run = run
        note(f"run {run} begins: rank {_logs.file.rank} of {world_size}, process {os.getpid()}")


def note(message: str, *, level: int = logging.INFO) -> None:
    """Writes a line into the log that the terminal does not show."""
    if _logs is not None:
        _logs.file.emit(logging.LogRecord("nslora_dist", level, "", 0, message, None, None))


def open_at(folder: Path) -> None:
    """Writes this rank's log into the run folder from now on; call it right after the folder is claimed."""
    if _logs is None:
        return
    _logs.file.open_at(folder)
    if _logs.file.rank == 0:
        with suppress(OSError):
            for old in (folder / "logs").glob(f"{CLAIM}*"):
                if old.name != CLAIM + _logs.run:
                    old.unlink()


def path() -> Path | None:
    """This rank's log file, once it is open."""
    return None if _logs is None else _logs.file.path


def claim() -> bool | None:
    """Whether this rank is the first of its run to ask; None where there is no folder to ask in.

    For ranks whose store is gone: the one that is first says what has happened.
    """
    here = path()
    if _logs is None or here is None or not _logs.run:
        return None
    try:
        os.close(os.open(here.parent / f"{CLAIM}{_logs.run}", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except FileExistsError:
        return False
    except OSError:
        return None
    return True


def say(text: str) -> None:
    """Writes a line to the person, below a progress bar that is on its way; never raises."""
    with suppress(Exception):
        # Only rank 0 shows bars, and the others, who share its terminal, cannot know whether it does.
        bars = getattr(getattr(sys.modules.get("tqdm"), "tqdm", None), "_instances", ())
        under_a_bar = bool(bars) or os.environ.get("RANK", "0") != "0"
        sys.stderr.write("\n" * under_a_bar + redact(text) + "\n")
        sys.stderr.flush()
