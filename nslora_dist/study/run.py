"""Runs a study's missing cells over worker processes; whatever stops it, the same command goes on."""

import fcntl
import multiprocessing
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from nslora_dist import artifacts
from nslora_dist.errors import EXIT_STORAGE, Fault, Preempted, StorageError, UserError
from nslora_dist.study.cells import Cell, is_made
from nslora_dist.study.lines import FILE, close_torn_line, read_lines
from nslora_dist.study.spec import Study
from nslora_dist.study.worker import WORKERS_LOCK, Job, Told, work

MOST_FAILURES = 3
"""Cells that may fail before the study stops: one may be odd, several are a fault of the set-up."""
LOOK_SECONDS = 0.5


class _Worker:
    """A worker process and what it is doing."""

    def __init__(self, start: Callable[[Connection], Any]) -> None:
        self.end, other = multiprocessing.Pipe()
        self.process = start(other)
        self.process.start()
        other.close()  # ours alone is left here: when the worker dies, this end says so
        self.job: Job | None = None

    def give(self, job: Job) -> None:
        self.job = job
        self.end.send(job)


def missing(study: Study, cells: Sequence[Cell]) -> list[Cell]:
    """The cells that ``cells.jsonl`` has no line of."""
    done = {line["id"] for line in read_lines(Path(study.output_dir) / FILE)[0]}
    return [cell for cell in cells if cell.id not in done]


def run_cells(
    study: Study,
    cells: Sequence[Cell],
    *,
    processes: int,
    threads: int,
    device: str,
    version: str,
    minutes: float | None,
    say: Callable[[str], None],
) -> int:
    """Runs those of ``cells`` that have no line yet.

    Args:
        study: the study.
        cells: of it.
        processes: how many work at once.
        threads: of PyTorch, in each.
        device: of the cells of sizes that need no GPU.
        version: of this code, for the lines.
        minutes: after which no further cell is begun; None for no end.
        say: takes each line of progress.

    Returns:
        The number of cells that are still missing for want of time.

    Raises:
        Preempted: asked to stop; whole lines are on disk.
        UserError: the folder is another process's or cells failed; a full disk is a ``StorageError``.
    """
    folder = Path(study.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder), _stoppable() as asked:
        close_torn_line(folder / FILE)
        artifacts.write_json(folder / "study.json", study.model_dump(mode="json"))
        todo = missing(study, cells)
        if todo:
            say(f"{len(todo)} of {len(cells)} cells to do in {folder}, {processes} at a time")
        context = multiprocessing.get_context("spawn")  # a forked PyTorch hangs in its thread pools
        numbers = iter(range(10**9))

        def start(end: Connection) -> Any:
            settings = {"threads": threads, "device": device, "number": next(numbers), "version": version}
            return context.Process(target=work, args=(end, study), kwargs=settings, daemon=True)

        deadline = None if minutes is None else time.monotonic() + 60 * minutes
        return _Pool(study, todo, start=start, processes=processes, deadline=deadline, asked=asked, say=say).run()


class _Pool:
    """The loop that gives out bases and cells and takes answers."""

    def __init__(
        self,
        study: Study,
        todo: Sequence[Cell],
        *,
        start: Callable[[Connection], Any],
        processes: int,
        deadline: float | None,
        asked: list[int],
        say: Callable[[str], None],
    ) -> None:
        self.study, self.todo, self.start, self.say = study, deque(todo), start, say
        self.deadline, self.asked = deadline, asked
        sizes = list(dict.fromkeys(cell.size for cell in todo))
        self.bases = deque(size for size in sizes if not is_made(study, size))
        self.ready = {size for size in sizes if size not in self.bases}
        self.processes = min(processes, len(todo) + len(self.bases))
        self.count, self.total = 0, len(todo)
        self.failures: list[str] = []
        self.workers: list[_Worker] = []

    def run(self) -> int:
        """Until all is done, time is over, or somebody asks to stop."""
        try:
            self.workers = [_Worker(self.start) for _ in range(self.processes)]
            while not self.asked:
                for worker in self.workers:
                    if worker.job is None and (job := self._next()) is not None:
                        worker.give(job)
                if all(worker.job is None for worker in self.workers):
                    break
                ends: Any = [worker.end for worker in self.workers if worker.job is not None]
                for end in wait(ends, timeout=LOOK_SECONDS):
                    self._hear(next(worker for worker in self.workers if worker.end is end))
        finally:
            # A cell that is under way has left nothing yet, and a line is one write: there is no half to save.
            for worker in self.workers:
                worker.end.close()  # which ends one that waits
                if worker.job is not None:
                    worker.process.terminate()
            for worker in self.workers:
                worker.process.join()
        if self.asked:
            left = self.total - self.count
            raise Preempted(f"study: stopped as asked, {left} cells are missing; the same command continues")
        if self.failures:
            logs = Path(self.study.output_dir) / "logs"
            raise Fault(f"study: {len(self.failures)} cells failed, the first {self.failures[0]} (see {logs})")
        return self.total - self.count

    def _next(self) -> Job | None:
        """What is to be begun now; None where time is over or a base has to be waited for."""
        late = self.deadline is not None and time.monotonic() > self.deadline
        if late or len(self.failures) >= MOST_FAILURES:
            return None
        if self.bases:
            return Job(self.bases.popleft())
        for place, cell in enumerate(self.todo):
            if cell.size in self.ready:
                del self.todo[place]
                return Job(cell.size, cell)
        return None

    def _hear(self, worker: _Worker) -> None:
        job = worker.job
        assert job is not None
        try:
            told: Told = worker.end.recv()
        except (EOFError, OSError):
            worker.process.join()
            told = Told(job, status=1, message=f"its process ended with status {worker.process.exitcode}")
            self.workers[self.workers.index(worker)] = worker = _Worker(self.start)
        worker.job = None
        if told.status == EXIT_STORAGE:
            raise StorageError(told.message)
        name = f"base {job.size}" if job.cell is None else _named(job.cell)
        if told.status:
            if job.cell is None:
                raise UserError(f"{name}: {told.message}")
            self.failures.append(f"{name}: {told.message}")
            self.say(f"failed: {self.failures[-1]}")
            return
        assert told.line is not None
        if job.cell is None:
            self.ready.add(job.size)
            recall = ", ".join(f"{piece} {value:.3f}" for piece, value in told.line["recall"].items())
            self.say(f"{name}: {told.line['parameters']:,} parameters, {told.line['seconds']} s; recall {recall}")
            return
        self.count += 1
        figures = f"task {told.line['adaptation']:.3f} retention {told.line['retention']:.3f}"
        self.say(f"{self.count}/{self.total} {name}: {figures} {told.line['seconds']:.1f} s")


def _named(cell: Cell) -> str:
    what = f"{cell.size} {cell.task} {cell.calibration} {cell.arm}"
    return f"{what} lr {cell.learning_rate:g} wd {cell.weight_decay:g} seed {cell.seed}"


def usable(study: Study, cells: Sequence[Cell], *, device: str) -> tuple[list[Cell], list[str]]:
    """The cells that this machine can run, and the sizes that it cannot: those that want a GPU.

    Raises:
        UserError: ``device``, where the other sizes are to run, is a GPU and there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no CUDA GPU here; leave it out to run on the CPU")
    without = [] if torch.cuda.is_available() else [n for n, size in study.sizes.items() if size.device == "cuda"]
    return [cell for cell in cells if cell.size not in without], [n for n in without if any(c.size == n for c in cells)]


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Holds the study's folder: two at work would run every cell twice."""
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"{folder}: another process works on this study; wait for it, or give --output") from error
        # Workers of a process that was killed end within moments; a line that they still write has to be seen.
        with (folder / WORKERS_LOCK).open("w") as workers:
            fcntl.flock(workers, fcntl.LOCK_EX)
        yield


@contextmanager
def _stoppable() -> Iterator[list[int]]:
    """While open, SIGTERM, SIGUSR1 and Ctrl-C are noted in the list that it yields, and end nothing themselves."""
    asked: list[int] = []
    before = {
        number: signal.signal(number, lambda got, frame: asked.append(got))
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    }
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
