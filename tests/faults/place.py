"""Inside a rank: writes down where it is, and strikes at a chosen file operation.

``<rank>.place`` in the job's folder gets a JSON line whenever the rank's phase or progress changes, and one before each
operation on a file of the run's folder. Nothing that the rank does is changed by it.
"""

import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

OPERATIONS = ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
SKIPPED = ("/logs", "/tensorboard")
"""Written all the time, and nothing that a run takes up."""


def record(folder: Path, rank: int, output: str, strike: dict[str, Any] | None) -> None:
    """Begins to write ``<rank>.place``.

    Args:
        folder: the job's.
        rank: this rank's.
        output: the run's folder.
        strike: what happens to whom: ``{"rank", "victim", "nth"}`` and either ``match``: right before the ``nth``
            operation on a path that holds it, or ``pattern`` and ``delay``: so many seconds after the rank came for the
            ``nth`` time to a place that it matches. ``victim`` is the rank (``self``) or its ``launcher``, which get
            SIGKILL, or something of ``spoil.py``.
    """
    from spoil import spoil

    from nslora_dist import watch

    file = os.open(folder / f"{rank}.place", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_TRUNC, 0o644)
    launcher = os.getppid()

    def write(**entry: Any) -> None:
        os.write(file, json.dumps({"time": time.monotonic(), **entry}).encode() + b"\n")

    def hit(place: str, path: str) -> None:
        assert strike is not None
        write(struck=strike["victim"], place=place)
        if strike["victim"] in ("self", "launcher"):
            os.kill(os.getpid() if strike["victim"] == "self" else launcher, signal.SIGKILL)
        elif strike["victim"].startswith("SIG"):
            os.kill(os.getpid(), signal.Signals[strike["victim"]])
        else:
            spoil(strike["victim"], Path(output), Path(path))

    mine = strike is not None and strike["rank"] == rank
    match = strike["match"] if strike is not None and mine and "match" in strike else None
    pattern = strike["pattern"] if strike is not None and mine and "pattern" in strike else None
    before, inside, nth = "", False, 0

    def arrived(place: str) -> None:
        nonlocal inside, nth
        was, inside = inside, bool(re.search(pattern, place))
        nth += inside and not was
        if inside and not was and nth == strike["nth"]:
            timer = threading.Timer(strike["delay"], lambda: hit(str(watch.current()), output))
            timer.daemon = True
            timer.start()

    known = type(watch._state)

    class Seen(known):  # type: ignore[misc, valid-type]
        def __setattr__(self, name: str, value: Any) -> None:
            nonlocal before
            super().__setattr__(name, value)
            if name == "count":
                now = str(watch.current())
                if now != before:
                    before = now
                    write(place=now)
                    if pattern is not None:
                        arrived(now)

    watch._state.__class__ = Seen

    def operation(what: str, path: str) -> None:
        nonlocal nth
        if not path.startswith(output) or any(part in path[len(output) :] for part in SKIPPED):
            return
        write(operation=what, path=path[len(output) + 1 :], place=str(watch.current()))
        if match is None or match not in path[len(output) :]:
            return
        nth += 1
        if nth == strike["nth"]:
            hit(f"{watch.current()}: {what} {path[len(output) + 1 :]}", path)

    _watch_files(operation)


def _watch_files(operation: Callable[[str, str], None]) -> None:
    inside = threading.local()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in OPERATIONS or getattr(inside, "busy", False):
            return
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & WRITING):
            return
        path = arguments[0]
        if isinstance(path, str | os.PathLike):
            inside.busy = True
            try:
                operation(event, os.path.abspath(path))
            finally:
                inside.busy = False

    sys.addaudithook(hook)
    fsync = os.fsync

    def seen(descriptor: Any) -> None:
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        operation("fsync", os.readlink(f"/proc/self/fd/{number}"))
        fsync(descriptor)

    os.fsync = seen
