"""One log a rank, ``logs/rank-N.log`` in the run folder: JSON lines, kept in memory until that folder is this run's."""

import json
import logging
import os
import threading
from datetime import UTC, datetime
from pathlib import Path

from nslora_dist import watch

try:
    from nslora_dist.redact import redact
except ImportError:

    def redact(text: str) -> str:
        """Leaves the text as it is."""
        return text


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
        try:
            line = self._line(record)
            if self._file is not None:
                os.write(self._file, line.encode("utf-8", "replace"))
            elif self.path is None and len(self._held) < KEPT:
                self._held.append(line)
        except Exception:
            return  # a full disk must not end a run that could go on, nor fill the terminal

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
            self.path = folder / "logs" / f"rank-{self.rank}.log"
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            self._file = os.open(self.path, flags, 0o666)
            os.write(self._file, "".join(self._held).encode("utf-8", "replace"))
        except OSError:
            self.path = None
        self._held.clear()

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
        super().close()


_here: RankLog | None = None
_lock = threading.Lock()


def start(rank: int) -> RankLog:
    """Begins to keep this rank's records; a second call in one process begins anew."""
    global _here
    with _lock:
        root = logging.getLogger()
        if _here is not None:
            root.removeHandler(_here)
            _here.close()
        _here = RankLog(rank)
        root.addHandler(_here)
        return _here


def open_at(folder: Path) -> None:
    """Writes this rank's log into the run folder from now on; call it right after the folder is claimed."""
    if _here is not None:
        _here.open_at(folder)


def path() -> Path | None:
    """This rank's log file, once it is open."""
    return None if _here is None else _here.path
