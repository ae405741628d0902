"""Jobs whose processes can be killed one by one: forked by the zygote, or started by a real launcher."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from helpers.launching import ROOT, environment, free_port

Who = Literal["launcher"] | int
"""The launcher, or a rank."""

HANG = 300.0
"""Seconds after which processes count as hanging, on a machine however loaded."""


class Hangs(AssertionError):
    """Processes did not end, or did not start, within ``HANG``."""


@dataclass
class Job:
    """A launcher and its ranks.

    Attributes:
        folder: of ``<rank>.out`` and ``<rank>.err``.
        pids: of what has started.
        statuses: of what has ended: the exit status, or minus the signal.
        ended: when, on the monotonic clock.
    """

    zygote: "Zygote"
    name: str
    folder: Path
    world_size: int
    pids: dict[Who, int] = field(default_factory=dict)
    statuses: dict[Who, int] = field(default_factory=dict)
    ended: dict[Who, float] = field(default_factory=dict)

    @property
    def alive(self) -> list[Who]:
        """What has started and not ended."""
        return [who for who in self.pids if who not in self.statuses]

    def started(self) -> "Job":
        """Waits until every rank is there."""
        self.zygote.until(lambda: len(self.pids) == self.world_size + 1, f"{self.name}: ranks do not start")
        return self

    def over(self) -> bool:
        """Whether launcher and ranks have all ended."""
        return len(self.statuses) == self.world_size + 1

    def wait(self) -> "Job":
        """Waits for the end of launcher and ranks."""
        self.zygote.until(self.over, f"{self.name}: {self.alive} hang")
        return self

    def kill(self, who: Who) -> bool:
        """SIGKILL; False where that process has ended by itself already."""
        self.zygote.pump(0.0)
        if who in self.statuses:
            return False
        os.kill(self.pids[who], signal.SIGKILL)
        return True

    def stop(self) -> None:
        """Leaves nothing running."""
        for who in self.alive:
            self.kill(who)
        self.wait()

    def errors(self, rank: int) -> str:
        """What the rank wrote to stderr."""
        return (self.folder / f"{rank}.err").read_text(errors="replace")

    def error_lines(self, rank: int) -> list[str]:
        """The rank's lines for the person."""
        return [line for line in self.errors(rank).splitlines() if line.startswith("error: ")]

    def places(self, rank: int) -> list[dict[str, Any]]:
        """Where the rank has been so far: the whole lines of its ``.place``."""
        path = self.folder / f"{rank}.place"
        if not path.is_file():
            return []
        whole = path.read_text().rpartition("\n")[0]
        return [json.loads(line) for line in whole.splitlines()]


class Zygote:
    """The server of ``zygote.py``; a context."""

    def __init__(self, *prefix: str, **env: str) -> None:
        """``prefix`` is put before the command, as ``ip netns exec NAME``."""
        self._process = subprocess.Popen(
            [*prefix, sys.executable, "-u", str(Path(__file__).with_name("zygote.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env=environment(**env),
        )
        self._jobs: dict[str, Job] = {}
        self._by_pid: dict[int, tuple[Job, Who]] = {}
        self._text = b""
        self.ready = False

    def job(
        self,
        folder: Path,
        *argv: str,
        output: Path,
        world_size: int = 2,
        strike: dict[str, Any] | None = None,
        unprivileged: bool = False,
        **env: str,
    ) -> Job:
        """Starts ``argv``, a script of ``launch/`` and its arguments, on ``world_size`` ranks.

        Args:
            folder: for what the ranks print, made if need be.
            argv: the script, from the clone's root, and its arguments.
            output: the run's folder.
            world_size: the number of ranks.
            strike: where a rank kills itself or the launcher, as in ``place.record``.
            unprivileged: whether the ranks have to keep to permissions, even where this process is root's.
            env: more for the ranks' environment.
        """
        self.until(lambda: self.ready, "the zygote does not start")
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{folder.name}-{len(self._jobs)}"
        job = self._jobs[name] = Job(self, name, folder, world_size)
        asked: dict[str, Any] = {
            "job": name,
            "argv": argv,
            "world_size": world_size,
            "folder": str(folder),
            "output": str(output),
            "strike": strike,
            "unprivileged": unprivileged,
            "env": {"MASTER_PORT": free_port()} | env,
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asked).encode() + b"\n")
        self._process.stdin.flush()
        return job.started()

    def pump(self, timeout: float) -> None:
        """Takes in what has happened, waiting up to ``timeout`` seconds for something to happen."""
        assert self._process.stdout is not None
        number = self._process.stdout.fileno()
        if not select.select([number], [], [], timeout)[0]:
            return
        read = os.read(number, 65536)
        if not read:
            raise AssertionError(f"the zygote has ended: {self._process.wait()}")
        *lines, self._text = (self._text + read).split(b"\n")
        for line in lines:
            self._take(json.loads(line))

    def _take(self, event: dict[str, Any]) -> None:
        pid = event["pid"]
        match event["event"]:
            case "ready":
                self.ready = True
            case "started":
                job = self._jobs[event["job"]]
                job.pids[event["who"]] = pid
                self._by_pid[pid] = job, event["who"]
            case "ended" if pid in self._by_pid:  # else a child of a killed rank
                job, who = self._by_pid.pop(pid)
                job.statuses[who], job.ended[who] = event["status"], event["time"]

    def until(self, true: Any, otherwise: str) -> None:
        """Takes events in until ``true()``.

        Raises:
            Hangs: not within ``HANG``; ``otherwise`` says what.
        """
        deadline = time.monotonic() + HANG
        while not true():
            if time.monotonic() > deadline:
                raise Hangs(otherwise)
            self.pump(0.2)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.pump(0.0)
        for job in self._jobs.values():
            for who in job.alive:
                with suppress(ProcessLookupError):
                    os.kill(job.pids[who], signal.SIGKILL)
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=HANG)
