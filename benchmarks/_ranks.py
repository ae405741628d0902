"""Several fresh processes over gloo, with their memory watched from outside, for the benchmarks of sharded engines."""

import multiprocessing
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import _common  # noqa: F401  (puts the repository on the path)
import torch

SAMPLE_SECONDS = 0.002
PRELOAD = ("torch", "transformers", "bitsandbytes.functional", "nslora_dist.engines.fsdp2")
ENVIRONMENT = {"GLOO_SOCKET_IFNAME": "lo", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


@dataclass
class Watched:
    """A rank's host memory in bytes, read from /proc every two milliseconds by the parent process.

    Attributes:
        own: anonymous and shared memory before the measured stretch: the interpreter with everything imported.
        peak: the highest in the stretch, anonymous and shared; pages of mapped files are left out, which the kernel
            drops when memory is short.
        peak_resident: the highest with mapped files' pages included.
        own_resident: the same before the stretch.
        result: what the rank returned.
    """

    own: int = 0
    peak: int = 0
    own_resident: int = 0
    peak_resident: int = 0
    result: Any = None

    @property
    def added(self) -> int:
        """What the stretch added at its peak."""
        return self.peak - self.own


@dataclass
class _Rank:
    process: Any
    pipe: Any
    watched: Watched = field(default_factory=Watched)
    ended: bool = False


def memory(pid: int | str = "self") -> tuple[int, int]:
    """(anonymous and shared, all resident) bytes of a process; zeros where there is no /proc."""
    values: dict[str, int] = {}
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            key, _, rest = line.partition(":")
            if key in ("RssAnon", "RssShmem", "VmRSS"):
                values[key] = int(rest.split()[0]) * 1024
    except OSError:
        pass
    return values.get("RssAnon", 0) + values.get("RssShmem", 0), values.get("VmRSS", 0)


def watched_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    threads: int = 1,
    timeout: float = 900.0,
    preload: tuple[str, ...] = (),
) -> list[Watched]:
    """Runs ``function(*args)`` on every rank and watches their memory while it runs.

    Args:
        function: a generator function at a module's top level. It imports and warms up what is to count as the
            interpreter's own, yields once, does what is measured, and yields its result.
        world_size: the number of ranks.
        args: for the function, picklable.
        threads: of the CPU kernels, per rank.
        timeout: seconds until the ranks are stopped.
        preload: modules to be ready in every rank, beside the usual ones; as in the first call.

    Raises:
        RuntimeError: a rank failed or took too long.
    """
    # Forked from a server that has imported everything once: a fresh process, its imports shared and ready.
    os.environ |= ENVIRONMENT
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["_common", *PRELOAD, *preload])
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        ranks = []
        for number in range(world_size):
            ours, theirs = context.Pipe()
            start = (function, number, world_size, str(Path(folder) / "store"), threads, theirs, args)
            process = context.Process(target=_run, args=start, daemon=True)
            process.start()
            theirs.close()
            ranks.append(_Rank(process, ours))
        try:
            _watch(ranks, time.monotonic() + timeout)
        finally:
            for rank in ranks:
                if rank.process.is_alive():
                    rank.process.join(timeout=5.0)
                if rank.process.is_alive():
                    rank.process.kill()
                rank.process.join()
    return [rank.watched for rank in ranks]


def _watch(ranks: list[_Rank], deadline: float) -> None:
    for rank in ranks:
        _receive(rank, deadline)
        rank.watched.own, rank.watched.own_resident = memory(rank.process.pid)
    for rank in ranks:
        rank.pipe.send("go")
    while not all(rank.ended for rank in ranks):
        for rank in ranks:
            seen = rank.watched
            anonymous, resident = memory(rank.process.pid)
            seen.peak, seen.peak_resident = max(seen.peak, anonymous), max(seen.peak_resident, resident)
            if not rank.ended and rank.pipe.poll():
                seen.result = _receive(rank, deadline)
                rank.ended = True
        if time.monotonic() > deadline:
            raise RuntimeError("the ranks took too long")
        time.sleep(SAMPLE_SECONDS)
    for rank in ranks:
        rank.pipe.send("end")


def _receive(rank: _Rank, deadline: float) -> Any:
    if not rank.pipe.poll(max(0.0, deadline - time.monotonic())):
        raise RuntimeError("a rank took too long")
    try:
        return rank.pipe.recv()
    except EOFError:
        raise RuntimeError(f"a rank ended early (exit code {rank.process.exitcode}); its message is above") from None


def _run(
    function: Callable[..., Any], number: int, world_size: int, store: str, threads: int, pipe: Any, args: Any
) -> None:
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(world_size)}
    torch.set_num_threads(threads)
    from tqdm import tqdm

    from nslora_dist.quiet import quiet

    quiet()
    tqdm.set_lock(threading.RLock())  # its own would be a semaphore that outlives a process ended by os._exit
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(store, world_size), rank=number, world_size=world_size
    )
    stages = function(*args)
    next(stages)
    torch.distributed.barrier()
    pipe.send("ready")
    pipe.recv()
    pipe.send(next(stages))
    # Together, and only once nobody is watched any more: a peer may still be in a collective.
    pipe.recv()
    threading.Timer(5.0, os._exit, (0,)).start()
    torch.distributed.barrier()
    os._exit(0)
