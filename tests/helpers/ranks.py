"""Groups of real ranks over gloo on this machine.

Ranks are forked from one server process that has imported everything once, so a group starts in well under a second;
each group has fresh processes, for DeepSpeed and the default process group are state of a process.
"""

import datetime
import multiprocessing
import multiprocessing.connection
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
PRELOAD = (
    "torch",
    "transformers",
    "peft",
    "datasets",
    "bitsandbytes",
    "nslora_dist.pipeline",
    "nslora_dist.engines.zero3",
)


class RankFailed(AssertionError):
    """A rank raised or died; the message holds its traceback."""


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 900.0, cuda: bool = False
) -> list[Any]:
    """Runs ``function(*args)`` on every rank of a fresh group.

    Args:
        function: at module level, so that the ranks can import it; it finds the default process group ready.
        world_size: the number of ranks.
        args: for the function, picklable.
        timeout: seconds until the ranks are stopped.
        cuda: whether the ranks may see GPUs; over gloo on the CPU otherwise.

    Returns:
        What each rank returned, by rank; tensors come back as they are.

    Raises:
        RankFailed: a rank raised, died or took too long.
    """
    context = context_for(cuda)
    with tempfile.TemporaryDirectory(prefix="ranks-") as name:
        folder = Path(name)
        ranks = [
            context.Process(target=_rank, args=(function, rank, world_size, folder, args, cuda), daemon=True)
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        deadline = time.monotonic() + timeout
        try:
            waiting = list(ranks)
            while waiting and time.monotonic() < deadline and not any(p.exitcode for p in ranks):
                multiprocessing.connection.wait([p.sentinel for p in waiting], timeout=1.0)
                waiting = [p for p in waiting if p.exitcode is None]
            if any(p.exitcode for p in ranks):  # the others wait for the one that failed: a moment for their own words
                for process in ranks:
                    process.join(timeout=2.0)
        finally:
            stuck = [rank for rank, process in enumerate(ranks) if process.exitcode is None]
            for process in ranks:
                if process.exitcode is None:
                    process.kill()
                process.join()
        said = [f"rank {path.stem}:\n{path.read_text()}" for path in sorted(folder.glob("*.error"))]
        silent = [rank for rank in range(world_size) if not (folder / f"{rank}.pt").is_file()]
        if said or silent:
            codes = [process.exitcode for process in ranks]
            raise RankFailed("\n".join([f"{function.__name__}: exit codes {codes}, stopped {stuck}", *said]))
        return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def context_for(cuda: bool) -> Any:
    if cuda:
        os.environ.pop("DS_ACCELERATOR", None)  # of an earlier group on the CPU
        return multiprocessing.get_context("spawn")  # a GPU's driver does not survive a fork
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "DS_ACCELERATOR": "cpu"}
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as quiet.py has it
    context = multiprocessing.get_context("forkserver")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    folder = Path.cwd()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.chdir(ROOT)  # the server imports from where it is started
    try:
        context.set_forkserver_preload(list(PRELOAD))
        from multiprocessing.forkserver import ensure_running

        ensure_running()
    finally:
        os.chdir(folder)
        os.environ.pop("CUDA_VISIBLE_DEVICES")
        if hidden is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = hidden
    return context


def _rank(
    function: Callable[..., Any], rank: int, world_size: int, folder: Path, args: tuple[Any, ...], cuda: bool
) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    if cuda:
        torch.cuda.set_device(rank)
    torch.distributed.init_process_group(
        "cuda:nccl,cpu:gloo" if cuda else "gloo",
        store=torch.distributed.FileStore(str(folder / "store"), world_size),
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=120),
    )
    try:
        result = function(*args)
        partial = folder / f"{rank}.partial"
        torch.save(result, partial)
        partial.rename(folder / f"{rank}.pt")
        torch.distributed.barrier()
    except BaseException:
        (folder / f"{rank}.error").write_text(traceback.format_exc())
        os._exit(1)  # not waiting for peers in a collective
    os._exit(0)  # daemon threads of the backends have nothing left to say
