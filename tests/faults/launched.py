"""Runs under a real launcher, whose ranks are found in the process table by their command line."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

from faults.jobs import HANG, Hangs
from helpers.launching import ROOT, environment

SCRIPT = "launch/train.py"


class Launched:
    """A command line whose ranks write into ``output``; a context that leaves nothing running."""

    def __init__(self, said: Path, output: Path, *command: str, **env: str) -> None:
        """Starts it.

        Args:
            said: the file for what launcher and ranks print.
            output: the run's folder, named among the ranks' arguments.
            command: the whole command line.
            env: more for the environment.
        """
        self.said, self.output = said, output
        said.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[bytes] = said.open("wb")
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(**env),
            stdin=subprocess.DEVNULL,
            stdout=self._file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def ranks(self) -> dict[int, int]:
        """Rank → process, of those alive."""
        found = {}
        for process in self._processes():
            with suppress(OSError, KeyError):
                set_ = dict(
                    line.split("=", 1)
                    for line in Path(f"/proc/{process}/environ").read_text(errors="replace").split("\0")
                    if "=" in line
                )
                found[int(set_["RANK"])] = process
        return found

    def _processes(self) -> list[int]:
        """The pythons that run our script into our folder, without the launchers that only name both."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                words = (path / "cmdline").read_text(errors="replace").split("\0")
                state = (path / "stat").read_text().rpartition(")")[2].split()[0]
                mine = f"output_dir={self.output}" in words and state != "Z"
                if mine and SCRIPT in words[1:3] + words[-1:] and "torchrun" not in " ".join(words[:2]):
                    found.append(int(path.name))
        return found

    def until(self, true: Callable[[], bool], what: str) -> None:
        """Waits.

        Raises:
            Hangs: it took longer than ``HANG``, or the launcher ended first.
        """
        deadline = time.monotonic() + HANG
        while not true():
            if time.monotonic() > deadline or (self.process.poll() is not None and not self.ranks()):
                if true():
                    return
                raise Hangs(f"{what}; it ended with {self.process.poll()}:\n{self.text()[-3000:]}")
            time.sleep(0.05)

    def gone(self) -> float:
        """Waits until no rank is left; returns the seconds that this took.

        Raises:
            Hangs: it took longer than ``HANG``.
        """
        started = time.monotonic()
        while self.ranks():
            if time.monotonic() - started > HANG:
                raise Hangs(f"ranks live on:\n{self.text()[-3000:]}")
            time.sleep(0.05)
        return time.monotonic() - started

    def wait(self) -> int:
        """The launcher's exit status."""
        return self.process.wait(timeout=HANG)

    def text(self) -> str:
        """What was printed so far."""
        return self.said.read_text(errors="replace")

    def error_lines(self) -> list[str]:
        """The ranks' lines for the person; deepspeed prefixes none of them, torchrun only with --tee."""
        return [line for line in self.text().splitlines() if line.startswith("error: ")]

    def __enter__(self) -> "Launched":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        for process in self._processes():
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._file.close()
