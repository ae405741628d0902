"""A rank with nothing to do but meet the others: what a launch script is, without the model.

    python watched_loop.py --recipe loop.json [name=value ...]

It writes where it is to ``<folder>/at-<rank>`` before each step, and does ``fault`` on ``rank`` at ``step``.
"""

import errno
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from nslora_dist import command, dist, logs, watch
from nslora_dist.errors import Preempted, UserError


@dataclass(frozen=True)
class Loop:
    """The whole recipe of such a loop."""

    folder: str
    fault: str = "none"
    rank: int = 1
    step: int = 3
    steps: int = 5
    timeout: float = 5.0
    grace: float = 25.0
    pause: float = 0.0

    @property
    def engine(self) -> SimpleNamespace:
        return SimpleNamespace(timeout_seconds=self.timeout)

    @property
    def checkpoint(self) -> SimpleNamespace:
        return SimpleNamespace(grace_seconds=self.grace)


def read(path: str, overrides: Sequence[str]) -> Loop:
    values = {"folder": path} | dict(override.split("=", 1) for override in overrides)
    kinds = {field.name: field.type for field in fields(Loop)}
    return Loop(**{name: kinds[name](value) for name, value in values.items()})  # type: ignore[operator]


def work(loop: Loop, device: torch.device) -> None:
    folder = Path(loop.folder)
    logs.open_at(folder)
    with watch.phase("training"):
        for step in range(loop.steps):
            watch.progress(f"step {step} of {loop.steps}")
            (folder / f"at-{dist.rank()}").write_text(str(step))
            if dist.stopping():
                watch.saved(f"step-{step}")
                raise Preempted(f"stopped at step {step} after {watch.why_stop()}")
            if step == loop.step and dist.rank() == loop.rank:
                fail(loop.fault, folder)
            with dist.together("writing"):
                if loop.fault == "work alone" and step == loop.step and dist.rank() == loop.rank:
                    for part in range(int(4 * (loop.timeout + 4.0))):  # past gloo's time-out and the guard's
                        watch.progress(f"part {part}")
                        time.sleep(0.25)
                if loop.fault == "full" and step == loop.step and dist.rank() == loop.rank:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / "file"))
            if loop.fault in ("compute", "compute nothing") and step == loop.step:
                compute_alone(loop)
            if loop.fault != "stall all" or step != loop.step:
                dist.all_reduce(torch.ones(1))
            time.sleep(loop.pause)
            if loop.fault == "stall all" and step == loop.step:
                time.sleep(1e6)
    (folder / f"done-{dist.rank()}").write_text(json.dumps(loop.steps))


def compute_alone(loop: Loop) -> None:
    """Rank 0 is in code of other people, past gloo's time-out and the guard's; the others wait for what comes of it."""
    if dist.rank() == 0:
        with watch.working(every=0.5):
            if loop.fault == "compute nothing":
                time.sleep(1e6)
            until = time.monotonic() + loop.timeout + 4.0
            while time.monotonic() < until:
                pass
    assert dist.share(loop.steps if dist.rank() == 0 else None, patient=True) == loop.steps


def fail(fault: str, folder: Path) -> None:
    """What can happen to one rank."""
    match fault:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "sleep":
            time.sleep(1e6)
        case "bug":
            [][1]
        case "user":
            raise UserError("this rank alone found something wrong")


if __name__ == "__main__":
    sys.exit(command.run("A loop of collectives.", work, load=read))
