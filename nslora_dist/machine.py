"""Memory of this machine, on the GPU and of the host: what is left of it now, and what this process held at most."""

import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch

from nslora_dist import dist


def gpu_memory(device: torch.device) -> tuple[float, float, float]:
    """Bytes that this process can have more, that its tensors hold, and of the whole GPU.

    What PyTorch's allocator keeps for later is free.
    """
    free, whole = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_allocated(device)
    return float(free + torch.cuda.memory_reserved(device) - held), float(held), float(whole)


def host_memory() -> tuple[float, float] | None:
    """Bytes that can be had without swapping, and that this process holds; None where the system does not tell."""
    try:
        held = float(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return 1024.0 * int(line.split()[1]), held
    except (OSError, ValueError):
        return None
    return None


def forget_peak() -> None:
    """What ``peak_memory`` gives counts from now on, where the system can do that."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    with suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")  # Linux: the highest resident size is what it is now


def peak_memory() -> int:
    """Bytes this process held at most: on the GPU where there is one, else resident in host memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    with suppress(OSError, ValueError, StopIteration), open("/proc/self/status", encoding="ascii") as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith("VmHWM:"))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


ROOM = 2 / 3
"""Share of the free memory that gathered weights may take; the rest is for activations, logits, keys and values."""


def may_keep(size: int, device: torch.device) -> bool:
    """Whether there are several ranks, and each has room to keep so many bytes more gathered; collective."""
    fits = size <= ROOM * room(device, ranks=dist.ranks_per_node())
    return dist.everywhere(fits) and dist.world_size() > 1


def room(device: torch.device, *, ranks: int) -> float:
    """Bytes that one of this machine's ``ranks`` can have more on its device; 0 where the system does not tell."""
    if device.type == "cuda":
        return gpu_memory(device)[0]
    found = host_memory()
    return 0.0 if found is None else found[0] / ranks
