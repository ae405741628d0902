"""Ranks without the seconds that their imports take: one process imports everything once and forks them.

Run as a script. A line on stdin asks for a job: ``{"job", "argv", "world_size", "folder", "env", "output", "strike",
"unprivileged"}`` (see ``place.py``). The server forks a launcher, which forks the ranks and only waits for them:
what the ranks do about the death of one of them is their own doing. Each rank runs ``launch/train.py`` as
``__main__``, in the environment that ``torchrun`` would give it, and leaves by the interpreter's own exit. Lines on
stdout tell of pids and ends: ``{"job", "event", "who", "pid", "status"?, "time"}``, ``who`` being a rank or "launcher".

When the launcher is killed its ranks are adopted by this server, so that their ends are still seen.
"""

import ctypes
import gc
import io
import json
import os
import runpy
import select
import signal
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PR_SET_CHILD_SUBREAPER = 36


def main() -> None:
    """Serves until stdin ends; in a forked rank, runs the script instead."""
    requests, events = _own_pipes()
    _import_everything()
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    _say(events, event="ready", pid=os.getpid())
    script = _serve(requests, events)
    if script is not None:
        sys.path[0] = str(ROOT / "launch")  # where python puts the script's folder
        runpy.run_path(str(ROOT / script), run_name="__main__")


def _own_pipes() -> tuple[int, int]:
    """stdin and stdout under other numbers, so that whatever the ranks print goes elsewhere."""
    requests, events = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(2, 1)
    os.close(null)
    return requests, events


def _import_everything() -> None:
    sys.path.insert(0, str(ROOT))
    from nslora_dist.quiet import quiet

    quiet()
    import datasets  # noqa: F401
    import deepspeed.module_inject  # noqa: F401
    import peft  # noqa: F401
    import tensorboard  # noqa: F401
    import torch
    import transformers  # noqa: F401
    from matplotlib import pyplot
    from torch.utils import tensorboard as writer  # noqa: F401

    import nslora_dist.command
    import nslora_dist.engines.fsdp2
    import nslora_dist.engines.zero3
    import nslora_dist.pipeline  # noqa: F401

    torch.set_num_threads(1)
    pyplot.figure().text(0, 0, "fonts are found")
    pyplot.savefig(io.BytesIO())
    pyplot.close()
    gc.collect()
    gc.freeze()  # or each rank's collections, DeepSpeed asks for many, would write to and so copy all of this memory


def _serve(requests: int, events: int) -> str | None:
    """Forks jobs and reaps processes; returns only in a rank (the script to run), or at the end of ``requests``."""
    wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    names: dict[int, tuple[str, Any]] = {}
    text = b""
    while True:
        ready, _, _ = select.select([requests, wake_read], [], [], 1.0)
        if wake_read in ready:
            os.read(wake_read, 4096)
        _reap(events, names)
        if requests not in ready:
            continue
        read = os.read(requests, 65536)
        if not read:
            return None
        *lines, text = (text + read).split(b"\n")
        for line in lines:
            job = json.loads(line)
            pid = os.fork()
            if pid == 0:
                for number in (requests, wake_read, wake_write):
                    os.close(number)
                return _launch(job, events)
            names[pid] = (job["job"], "launcher")
            _say(events, job=job["job"], event="started", who="launcher", pid=pid)


def _reap(events: int, names: dict[int, tuple[str, Any]]) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        job, who = names.pop(pid, (None, None))  # an adopted rank's name is known to whoever asked for the job
        _say(events, job=job, event="ended", who=who, pid=pid, status=os.waitstatus_to_exitcode(status))


def _launch(job: dict[str, Any], events: int) -> str:
    """The launcher: waits for its ranks and exits; returns only in a rank."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setpgid(0, 0)
    ranks: dict[int, int] = {}
    for rank in range(job["world_size"]):
        pid = os.fork()
        if pid == 0:
            os.close(events)
            return _become(job, rank)
        ranks[pid] = rank
        _say(events, job=job["job"], event="started", who=rank, pid=pid)
    worst = 0
    while ranks:
        pid, status = os.wait()
        code = os.waitstatus_to_exitcode(status)
        worst = worst or code
        _say(events, job=job["job"], event="ended", who=ranks.pop(pid), pid=pid, status=code)
    os._exit(0 if worst == 0 else 1)


def _become(job: dict[str, Any], rank: int) -> str:
    """A rank: files for what it says, a launcher's environment, the user's arguments."""
    folder = Path(job["folder"])
    for number, name in ((1, f"{rank}.out"), (2, f"{rank}.err")):
        opened = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(opened, number)
        os.close(opened)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True, write_through=True)  # type: ignore[union-attr]
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(job["world_size"]),
        "LOCAL_WORLD_SIZE": str(job["world_size"]),
        "MASTER_ADDR": "127.0.0.1",
        "TORCHELASTIC_RUN_ID": "forked",  # as under torchrun, the ranks end when their launcher does
    }
    os.environ |= job["env"]
    os.chdir(ROOT)
    if job["unprivileged"]:  # no capabilities: root then needs permissions like anybody
        version_3, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        assert ctypes.CDLL(None).capset(version_3, none) == 0
    from place import record

    record(folder, rank, job["output"], job["strike"])
    script, *arguments = job["argv"]
    sys.argv = [script, *arguments]
    return str(script)


def _say(events: int, **event: Any) -> None:
    os.write(events, json.dumps(event | {"time": time.monotonic()}).encode() + b"\n")


if __name__ == "__main__":
    main()
