"""The process group, rank-0 logging and the few collectives in use: the same on CPU over gloo and on GPUs over NCCL."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from nslora_dist import watch
from nslora_dist.errors import UserError

log = logging.getLogger("nslora_dist")
T = TypeVar("T")

SMALL_BYTES = 4 * 2**20
"""Up to this size a second copy of a tensor on a CPU does not matter."""


def rank() -> int:
    """This process's rank; 0 outside a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of ranks; 1 outside a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def ranks_per_node() -> int:
    """Ranks on this machine, as ``torchrun`` or ``deepspeed`` has it; all of them where nobody says."""
    told = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")
    return int(told) if told else world_size()


def is_main() -> bool:
    """Whether this rank writes files and talks to the person."""
    return rank() == 0


def device() -> torch.device:
    """This rank's device: its own GPU where CUDA is there, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


@contextmanager
def process_group(*, timeout_seconds: float = 1800.0) -> Iterator[torch.device]:
    """Joins the ranks that ``torchrun`` or ``deepspeed`` started, and leaves them in order.

    A plain ``python`` start makes a group of one, so that every engine runs there too. Yields this rank's device.
    """
    logging.basicConfig(
        level=logging.INFO if int(os.environ.get("RANK", "0")) == 0 else logging.WARNING,
        format="%(asctime)s %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
    )
    here = device()
    if here.type == "cuda":
        torch.cuda.set_device(here)
    backend, timeout = "cuda:nccl,cpu:gloo" if here.type == "cuda" else "gloo", timedelta(seconds=timeout_seconds)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield here
    finally:
        dist.destroy_process_group()


def all_reduce(tensor: Tensor) -> Tensor:
    """Sums ``tensor`` over the ranks in place and returns it."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def broadcast(tensor: Tensor, *, source: int = 0) -> Tensor:
    """Overwrites ``tensor`` with ``source``'s, in place, and returns it."""
    if world_size() > 1:
        dist.broadcast(tensor, src=source)
    return tensor


def start_reduce_to(tensor: Tensor, *, owner: int) -> dist.Work | None:
    """Starts summing ``tensor`` over the ranks into ``owner``'s copy.

    Returns:
        What to ``wait`` for before the tensor is read or freed; None where there is nothing to wait for. The other
        ranks' copies are undefined afterwards.
    """
    return dist.reduce(tensor, dst=owner, async_op=True) if world_size() > 1 else None


def rows_of(count: int) -> slice:
    """This rank's share of ``count`` rows: runs of equal length by rank, shorter or empty at the end."""
    each = -(-count // world_size())
    start = min(rank() * each, count)
    return slice(start, min(start + each, count))


def rows_buffer(shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Room for all rows of a tensor, their number padded to a multiple of the ranks, for ``complete_rows``."""
    each = -(-shape[0] // world_size())
    return torch.empty(each * world_size(), *shape[1:], dtype=dtype, device=device)


def complete_rows(whole: Tensor, *, count: int) -> Tensor:
    """Exchanges the rows of a ``rows_buffer`` in which every rank has filled those that ``rows_of`` gives it, in place.

    They travel as bytes, so that no dtype's rules touch them.
    """
    parts = whole.view(-1).view(torch.uint8).view(world_size(), -1)
    if whole.is_cuda or whole.nbytes <= SMALL_BYTES:
        dist.all_gather_into_tensor(parts.view(-1), parts[rank()])
    else:
        # gloo gathers into a copy of its own of everything; it broadcasts in place.
        for owner, part in enumerate(parts):
            dist.broadcast(part, src=owner)
    # A copy where rows were added, or the tensor would keep their room.
    return whole if len(whole) == count else whole[:count].clone()


def gather_rows(part: Tensor, *, count: int) -> Tensor:
    """All ``count`` rows of a tensor of which every rank has those that ``rows_of`` gives it."""
    if world_size() == 1:
        return part
    whole = rows_buffer((count, *part.shape[1:]), dtype=part.dtype, device=part.device)
    whole[rows_of(count)] = part
    return complete_rows(whole, count=count)


def share(value: object) -> object:
    """Rank 0's ``value``, on every rank; for small Python values."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather(value: T) -> list[T]:
    """Every rank's ``value``, by rank, on every rank; for small Python values."""
    everyone: list[Any] = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(everyone, value)
    return everyone


def everywhere(mine: bool) -> bool:
    """Whether something holds on every rank; one number over gloo, so that a GPU is not waited for."""
    if world_size() == 1:
        return mine
    holds = torch.tensor([int(mine)], dtype=torch.int32)
    dist.all_reduce(holds, op=dist.ReduceOp.MIN)
    return bool(holds.item())


def barrier() -> None:
    """Waits for every rank."""
    if world_size() > 1:
        dist.barrier()


def stopping() -> bool:
    """Whether any rank was asked to stop; collective, for boundaries where all of them can."""
    mine = watch.stop_asked()
    if world_size() == 1:
        return mine
    asked = torch.tensor([int(mine)], dtype=torch.int32)  # on the CPU, over gloo, whatever the device
    dist.all_reduce(asked, op=dist.ReduceOp.MAX)
    if asked.item() and not mine:
        watch.ask_stop("another rank")
    return bool(asked.item())


@contextmanager
def together(what: str) -> Iterator[None]:
    """Runs a stretch without collectives; if it fails on one rank, every rank ends with that rank's message.

    Without it one rank would raise while the others wait in their next collective until its time-out.

    Raises:
        UserError: on every rank, with the message of the lowest rank that failed.
        Exception: what this rank raised itself, where it was no UserError.
    """
    failure: BaseException | None = None
    try:
        yield
    except Exception as error:
        failure = error
    if world_size() == 1:
        if failure is not None:
            raise failure
        return
    mine = None if failure is None else (isinstance(failure, UserError), f"{failure}")
    failed = [(number, said) for number, said in enumerate(gather(mine)) if said is not None]
    if not failed:
        return
    if failure is not None and not isinstance(failure, UserError):
        raise failure
    number, (expected, message) = failed[0]
    if expected:
        raise UserError(message) from failure
    raise UserError(f"{what}: rank {number} failed: {message}") from failure
