"""The process group, rank-0 logging and the few collectives in use: the same on CPU over gloo and on GPUs over NCCL."""

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from nslora_dist import logs, watch
from nslora_dist.errors import BY_STATUS, EXIT_BUG, Preempted, UserError, known_error
from nslora_dist.guard import HEARTBEAT_SECONDS, Guard
from nslora_dist.meeting import join, launcher_keeps_store, same_kind
from nslora_dist.peers import Peers

log = logging.getLogger("nslora_dist")
T = TypeVar("T")

SMALL_BYTES = 4 * 2**20
"""Up to this size a second copy of a tensor on a CPU does not matter."""
PATIENCE = timedelta(days=365)


class _Groups:
    patient: dist.ProcessGroup | None = None
    """All ranks once more, over gloo without a time-out, for waits behind unequal work; None where no guard looks."""


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
def process_group(
    *, timeout_seconds: float = 1800.0, grace_seconds: float = 25.0, heartbeat_seconds: float = HEARTBEAT_SECONDS
) -> Iterator[torch.device]:
    """Joins the ranks that ``torchrun`` or ``deepspeed`` started, guards them, and leaves them in order.

    A plain ``python`` start makes a group of one, so that every engine runs there too. Yields this rank's device.

    Args:
        timeout_seconds: without any progress, after which a rank counts as missing.
        grace_seconds: from SIGTERM until the process ends, boundary or not.
        heartbeat_seconds: between two lines of a long phase.

    Raises:
        UserError: whatever the ranks end with, on every rank; ``silent`` where another rank says it. A rank that is
            gone or stalled is a ``RankLost``, a full disk a ``StorageError``, any unexpected exception a ``Fault``.
            A group that failed is not destroyed, for that can hang: the process is meant to end.
    """
    logs.start(int(os.environ.get("RANK", "0")))
    watch.reset()
    guard = Guard(timeout_seconds=timeout_seconds, grace_seconds=grace_seconds, heartbeat_seconds=heartbeat_seconds)
    try:
        here = device()
        join(here, timeout_seconds)
        guard.peers = _peers()
        if guard.peers is not None:
            _Groups.patient = dist.new_group(backend="gloo", timeout=PATIENCE)
            same_kind(gather((here.type, socket.gethostname())))
        yield here
        _meet()  # nobody leaves, nor takes the store along, while another is at work
        guard.finish()
    except Exception as error:
        ended = guard.settle(error)
        if world_size() == 1 and dist.is_initialized():
            dist.destroy_process_group()
        raise ended from error
    else:
        dist.destroy_process_group()
    finally:
        _Groups.patient = None
        if not failed():  # else this process is about to end, and a launcher's SIGTERM must not change its status
            guard.stop()
        logs.stop()


def failed() -> bool:
    """After ``process_group``: whether its ranks failed, so that an orderly end of this process may hang."""
    return dist.is_initialized()


def _peers() -> Peers | None:
    """This rank's and the others' signs of life; None where there are no others."""
    run = torch.frombuffer(bytearray(os.urandom(8)), dtype=torch.uint8)
    if world_size() > 1:
        dist.broadcast(run, src=0)
    name = run.numpy().tobytes().hex()
    logs.begin_run(name, world_size())
    if world_size() == 1:
        return None
    store = dist.PrefixStore(f"watch/{name}", dist.distributed_c10d._get_default_store())
    peers = Peers(store, rank=rank(), world_size=world_size(), keeper=None if launcher_keeps_store() else 0)
    _meet()
    peers.start()
    return peers


def _meet() -> None:
    """Waits for every rank, on the CPU whatever the device."""
    if world_size() > 1:
        dist.all_reduce(torch.zeros(1))


@contextmanager
def _sendable(tensor: Tensor) -> Iterator[Tensor]:
    """What stands for ``tensor`` in a collective: itself, or its copy on this rank's GPU, which is copied back.

    Somebody else's group may have NCCL alone (``init_process_group("nccl")``), which sends nothing from a CPU.
    """
    if not tensor.is_cpu or torch.device("cpu") in dist.distributed_c10d._get_default_group()._device_types:
        yield tensor
        return
    sent = tensor.to(_current_gpu(), copy=True)
    yield sent
    tensor.copy_(sent)


def _current_gpu() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def all_reduce(tensor: Tensor, *, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """Sums ``tensor`` over the ranks in place, or what ``op`` says, and returns it."""
    if world_size() > 1:
        with _sendable(tensor) as sent:
            dist.all_reduce(sent, op=op)
    return tensor


def numbers(tensor: Tensor) -> Any:
    """``tensor.tolist()`` of what collectives have made: there a rank on a GPU waits for a rank that has not come."""
    with watch.waiting():
        return tensor.tolist()


def all_reduce_max(tensor: Tensor) -> Tensor:
    """Takes the largest of the ranks' elements in place and returns it."""
    return all_reduce(tensor, op=dist.ReduceOp.MAX)


def broadcast(tensor: Tensor, *, source: int = 0) -> Tensor:
    """Overwrites ``tensor`` with ``source``'s, in place, and returns it."""
    if world_size() > 1:
        with _sendable(tensor) as sent:
            dist.broadcast(sent, src=source)
    return tensor


def start_reduce_to(tensor: Tensor, *, owner: int) -> dist.Work | None:
    """Starts summing ``tensor`` over the ranks into ``owner``'s copy.

    Returns:
        What to ``wait`` for before the tensor is read or freed; None where there is nothing to wait for. The other
        ranks' copies are undefined afterwards.
    """
    if world_size() == 1:
        return None
    with _sendable(tensor) as sent:
        work = dist.reduce(sent, dst=owner, async_op=True)
        if sent is tensor:
            return work
        work.wait()
    return None


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


def share(value: object, *, patient: bool = False) -> object:
    """Rank 0's ``value``, on every rank; for small Python values.

    ``patient`` ranks wait for rank 0 for as long as it shows progress: the guard ends what stalls.
    """
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=_Groups.patient if patient else None)
    return box[0]


def gather(value: T, *, group: dist.ProcessGroup | None = None) -> list[T]:
    """Every rank's ``value``, by rank, on every rank; for small Python values."""
    everyone: list[Any] = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(everyone, value, group=group)
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
    asked = not everywhere(not watch.stop_asked())
    if asked and not watch.stop_asked():
        watch.ask_stop("another rank")
    return asked


def stop_if_asked(what: str) -> None:
    """Leaves at a boundary where any rank was asked to stop; collective.

    Args:
        what: it is that stops here, as in ``evaluation: stopped before french``.

    Raises:
        Preempted: one was.
    """
    if stopping():
        raise Preempted(f"{what}, as asked; the same command continues from {watch.continues_from()}")


@contextmanager
def together(what: str) -> Iterator[None]:
    """Runs a stretch without collectives; if it fails on one rank, every rank ends with that rank's message.

    Without it one rank would raise while the others wait in their next collective until its time-out. Ranks with less
    to do wait for the others for as long as these show progress (``watch.progress``): the guard ends what stalls.

    Raises:
        UserError: on every rank, with the message, class and status of the lowest rank that failed; a disk that is
            full or forbids writing is a ``StorageError``.
        Exception: what this rank raised itself, where that was unexpected; the others get a ``Fault``.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = known_error(error, what) or error
        if failure is not error:
            failure.__cause__ = error
    if world_size() == 1:
        if failure is not None:
            raise failure
        return
    mine = None
    if failure is not None:
        mine = (failure.status if isinstance(failure, UserError) else EXIT_BUG, f"{failure}")
    failed = [(number, said) for number, said in enumerate(gather(mine, group=_Groups.patient)) if said is not None]
    if not failed:
        return
    if failure is not None and not isinstance(failure, UserError):
        raise failure
    number, (status, message) = failed[0]
    if status == EXIT_BUG:
        message = f"{what}: rank {number} failed: {message}"
    raise BY_STATUS.get(status, UserError)(message) from failure
