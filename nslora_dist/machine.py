"""What this machine has left, now: GPU memory and host memory, on which its ranks have to agree themselves."""

import resource
from pathlib import Path

import torch


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


def room(device: torch.device, *, ranks: int) -> float:
    """Bytes that one of this machine's ``ranks`` can have more on its device; 0 where the system does not tell."""
    if device.type == "cuda":
        return gpu_memory(device)[0]
    found = host_memory()
    return 0.0 if found is None else found[0] / ranks
