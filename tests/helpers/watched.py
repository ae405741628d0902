"""Starts ranks of ``watched_loop.py`` that may be killed, and tells how each one ended."""

import os
import signal
import sys
import time
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from helpers import watched_loop
from helpers.launching import free_port
from helpers.ranks import context_for
from nslora_dist import command

ENOUGH = 60.0
"""Seconds after which a loop of five steps counts as hanging."""


@dataclass(frozen=True)
class Started:
    """Ranks at work, as processes of their own."""

    folder: Path
    ranks: list[BaseProcess]

    def wait(self, *, but: int | None = None) -> list[int | None]:
        """Every rank's exit status, by rank; None for a rank that had to be killed by this test."""
        deadline = time.monotonic() + ENOUGH
        for number, process in enumerate(self.ranks):
            if number != but:
                process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in self.ranks]
        for process in self.ranks:
            process.kill()
            process.join()
        return codes

    def until(self, step: int) -> None:
        """Waits until every rank has come to a step."""
        deadline = time.monotonic() + ENOUGH
        files = [self.folder / f"at-{rank}" for rank in range(len(self.ranks))]
        while not all(path.is_file() and int(path.read_text() or -1) >= step for path in files):
            assert time.monotonic() < deadline and all(p.is_alive() for p in self.ranks), self.said()
            time.sleep(0.05)

    def signal(self, rank: int, number: signal.Signals) -> None:
        """Sends a rank a signal."""
        pid = self.ranks[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def said(self) -> str:
        """What all ranks wrote to the terminal."""
        return "".join(path.read_text() for path in sorted(self.folder.glob("said-*")))

    def error(self) -> str:
        """The one line of error that all ranks together wrote, without any traceback."""
        said = self.said()
        assert not [word for word in ("Traceback", "frame #", "terminate called") if word in said], said
        lines = [line.removeprefix("error: ") for line in said.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, said
        return lines[0]

    def log(self, rank: int) -> str:
        """A rank's log."""
        return (self.folder / "logs" / f"rank-{rank}.log").read_text()


def start(folder: Path, world_size: int, **recipe: object) -> Started:
    """Starts the ranks of a loop."""
    overrides = [f"{name}={value}" for name, value in recipe.items()]
    port = free_port()
    context = context_for(False)
    ranks = [
        context.Process(target=_rank, args=(rank, world_size, port, folder, overrides), daemon=True)
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    return Started(folder, ranks)


def _rank(rank: int, world_size: int, port: str, folder: Path, overrides: list[str]) -> None:
    said = os.open(folder / f"said-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
    sys.argv = ["loop", "--recipe", str(folder), *overrides]
    status = command.run("A loop of collectives.", watched_loop.work, load=watched_loop.read)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
