"""A worker process of a study: makes a base or runs a cell, as it is told, until nobody tells it any more."""

import fcntl
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from nslora_dist.errors import UserError, storage_error
from nslora_dist.quiet import quiet
from nslora_dist.study.cells import Cell, base_folder, cells_of
from nslora_dist.study.lines import FILE, append_line, of_cells, read_lines
from nslora_dist.study.spec import Study

ORPHAN_SECONDS = 0.5
WORKERS_LOCK = "workers.lock"
"""Held by every worker as long as it lives."""


@dataclass(frozen=True)
class Job:
    """What a worker is told: a base to make, or a cell to run on a base that is there."""

    size: str
    cell: Cell | None = None


@dataclass(frozen=True)
class Told:
    """What a worker answers; ``status`` is 0, or that of the error in ``message``."""

    job: Job
    line: dict[str, Any] | None = None
    status: int = 0
    message: str = ""


def work(conversation: Connection, study: Study, *, threads: int, device: str, number: int, version: str) -> None:
    """The worker's main function.

    Args:
        conversation: with the process that started it; jobs come in, answers go out.
        study: whose cells it runs.
        threads: of PyTorch.
        device: of the cells of sizes that need no GPU.
        number: of this worker, for its log file.
        version: of this code.
    """
    folder = Path(study.output_dir)
    _own_log(folder / "logs" / f"worker-{number}.log")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the one that started us decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    held = (folder / WORKERS_LOCK).open("w")
    fcntl.flock(held, fcntl.LOCK_SH)
    quiet()
    import torch
    from tqdm import tqdm

    tqdm.set_lock(threading.RLock())  # its own is shared between processes, and left behind when one is ended
    torch.set_num_threads(threads)
    benches: dict[str, Any] = {}
    while True:
        try:
            job: Job = conversation.recv()
        except EOFError:
            return
        try:
            told = _do(job, study, folder, benches, device=device, version=version)
        except Exception as error:
            print(f"cell {job}:", file=sys.stderr)  # noqa: T201 (its own log)
            sys.excepthook(type(error), error, error.__traceback__)
            known = storage_error(error) or error
            status = known.status if isinstance(known, UserError) else 1
            said = str(known) if isinstance(known, UserError) else f"{type(error).__name__}: {error}"
            told = Told(job, status=status, message=said)
        conversation.send(told)


def _do(job: Job, study: Study, folder: Path, benches: dict[str, Any], *, device: str, version: str) -> Told:
    import torch

    from nslora_dist.study.bases import make_base
    from nslora_dist.study.bench import Bench
    from nslora_dist.study.cell import run_cell

    own = study.sizes[job.size].device
    if job.cell is None:  # where its size says: another processor rounds otherwise, and it would be another base
        return Told(job, line=make_base(study, job.size, device=torch.device(own)))
    if job.size not in benches:
        benches.clear()  # cells come size by size: the last base's null spaces are not needed again
        bench = Bench(study, job.size, device=torch.device(device if own == "cpu" else own))
        check_base(bench.base_hash, study, job.size)
        benches[job.size] = bench
    line = run_cell(benches[job.size], job.cell, version=version)
    append_line(folder / FILE, line)
    return Told(job, line=line)


def check_base(base_hash: str, study: Study, size: str) -> None:
    """Refuses to add lines to those of another base: the same settings give other weights on another processor.

    Raises:
        UserError: the study's file has cells of this size with another base.
    """
    path = Path(study.output_dir) / FILE
    lines = of_cells(read_lines(path)[0], cells_of(study))
    others = sorted({line["base_hash"] for line in lines if line["size"] == size} - {base_hash})
    if others:
        raise UserError(
            f"{path}: its cells of {size} are of the base {others[0]}, the one in {base_folder(study, size)} is "
            f"{base_hash}; bring that base's folder here, or give another --output"
        )


def _own_log(path: Path) -> None:
    """Sends whatever this process prints, progress bars and all, to a file of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(handle, stream)
    os.close(handle)


def _end_with(parent: int) -> None:
    """Ends this process when the one that started it is gone, however it went: nobody else would."""
    while os.getppid() == parent:
        time.sleep(ORPHAN_SECONDS)
    os._exit(1)
