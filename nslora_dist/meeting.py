"""How the ranks that a launcher started find each other, on CPU over gloo and on GPUs over NCCL with gloo beside it."""

import os
import time
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from nslora_dist.errors import RankLost, UserError


def join(here: torch.device, timeout_seconds: float) -> None:
    """Makes the process group.

    Raises:
        RankLost: the ranks did not meet in time, or cannot reach each other.
        UserError: more processes than GPUs on this machine.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    backend = "gloo"
    if here.type == "cuda":
        if here.index >= torch.cuda.device_count():
            raise UserError(
                f"LOCAL_RANK {here.index}: this machine shows {torch.cuda.device_count()} GPUs, one a process; start "
                "fewer processes on it (--nproc-per-node, --num_gpus), or look at CUDA_VISIBLE_DEVICES"
            )
        torch.cuda.set_device(here)
        backend = "cuda:nccl,cpu:gloo"
        if world > 1:
            # NCCL would abort the process, without a word of ours; the guard ends it, after the same time.
            # Not as a default: torchrun sets 1 for every rank that it starts.
            os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
    if "WORLD_SIZE" not in os.environ:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return
    try:
        store, number, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout_seconds)))
        if launcher_keeps_store():
            store = _of_this_start(store, number, world, timeout_seconds)
        waits = timedelta(seconds=timeout_seconds)
        dist.init_process_group(backend, store=store, rank=number, world_size=world, timeout=waits)
    except RuntimeError as error:
        us = f"rank {os.environ.get('RANK')}: the {world} ranks"
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        said = str(error).strip().partition("\n")[0]
        if "gloo" in str(error).lower():  # they have met, and told each other where gloo listens
            raise RankLost(
                f"{us} met at {where} and cannot reach each other ({said}); "
                "name the network interface between the machines in GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME (ip -br "
                "address lists them): /etc/hosts may lead from this machine's name to its loopback (127.0.1.1)"
            ) from error
        raise RankLost(
            f"{us} did not meet at {where} ({said}); look whether all were "
            "started, reach that address, and find the port free"
        ) from error


def _of_this_start(store: dist.Store, number: int, world: int, timeout_seconds: float) -> dist.Store:
    """The part of a launcher's store that belongs to this start of the ranks alone.

    ``torchrun`` keeps one store for as long as it lives, and its restarted ranks would find the addresses of those
    before them there. Its count of restarts does not tell them apart: a machine that comes later counts from 0.

    Raises:
        RuntimeError: not all ranks came in time.
    """
    store = dist.PrefixStore("nslora", store)
    if number != 0:
        name = store.get(f"start of {store.add('came', 1)}").decode()
        store.add(f"{name} met", 1)
        return dist.PrefixStore(name, store)
    name, answered, deadline = os.urandom(8).hex(), 0, time.monotonic() + timeout_seconds
    while (met := store.add(f"{name} met", 0)) < world - 1:
        came = store.add("came", 0)
        for one in range(answered + 1, came + 1):  # those of earlier starts are among them, and gone
            store.set(f"start of {one}", name)
        answered = came
        if time.monotonic() > deadline:
            raise RuntimeError(f"{met + 1} of them came within {timeout_seconds:.0f} s")
        time.sleep(0.02)
    return dist.PrefixStore(name, store)


def launcher_keeps_store() -> bool:
    """Whether the ranks meet in a store of their launcher's, not of rank 0's."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def same_kind(ranks: Sequence[tuple[str, str]]) -> None:
    """Refuses ranks of which some see a GPU and others do not: NCCL would wait for the latter, which ask over gloo.

    Args:
        ranks: every rank's kind of device and machine, by rank.

    Raises:
        UserError: naming ranks and machines without.
    """
    without = {number: machine for number, (kind, machine) in enumerate(ranks) if kind == "cpu"}
    if 0 < len(without) < len(ranks):
        which = ", ".join(f"{number} ({machine})" for number, machine in list(without.items())[:8])
        more = "" if len(without) <= 8 else f" and {len(without) - 8} more"
        raise UserError(
            f"{len(without)} of {len(ranks)} ranks see no GPU, the others do: rank {which}{more}; look at nvidia-smi "
            "and the job's request for GPUs there"
        )
