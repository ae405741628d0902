"""The machines a plan is for, and all it assumes about them: each assumption is a field and a command-line flag."""

import math
import re
from dataclasses import dataclass, field, fields
from typing import Any

from nslora_dist.errors import UserError

PREFIXES = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
BINARY = {"K": 2.0**10, "M": 2.0**20, "G": 2.0**30, "T": 2.0**40}


def quantity(text: str) -> float:
    """``80GB`` → 8e10 bytes, ``24GiB``, ``400Gb/s`` → 5e10 bytes/s (b is bits), ``900GB/s``, ``989T``, ``0.4``.

    Raises:
        UserError: no number with such a unit.
    """
    match = re.fullmatch(r"\s*([0-9.]+(?:e[+-]?[0-9]+)?)\s*([kKMGTP]?)(i?)(B|b|bit|FLOPS|FLOP/s)?(/s)?\s*", text)
    try:
        if match is None:
            raise ValueError
        number, prefix, binary, unit = float(match[1]), match[2].upper(), match[3], match[4]
        scale = BINARY[prefix] if binary else PREFIXES[prefix]
    except (ValueError, KeyError) as error:
        raise UserError(f"'{text}' is no quantity; write 80GB, 24GiB, 400Gb/s, 900GB/s, 989T or 0.4") from error
    return number * scale / (8 if unit in ("b", "bit") else 1)


def _flag(default: Any, text: str, *, zero: bool = False, most: float = math.inf) -> Any:
    """A field and flag of a number up to ``most``, above 0; ``zero``: or 0, as where that stands for unset."""
    return field(default=default, metadata={"help": text, "zero": zero or default == 0, "most": most})


@dataclass(frozen=True)
class Cluster:
    """What runs the recipe. Bytes, bytes/s, FLOP/s, seconds.

    Raises:
        UserError: a value that no cluster can have.
    """

    gpus: int = _flag(1, "GPUs in all, one rank each")
    gpu_memory: float = _flag(80e9, "memory of one GPU")
    interconnect: float = _flag(50e9, "what one node sends to the others, per direction, all its cards together")
    intra_node: float = _flag(0.0, "what one GPU sends inside its node (NVLink, PCIe); unset: the interconnect")
    gpus_per_node: int = _flag(8, "GPUs in a node")
    flops: float = _flag(989e12, "dense matrix rate of a GPU in the compute dtype, per second")
    efficiency: float = _flag(0.4, "share of that rate the model's products reach", most=1.0)
    solver_flops: float = _flag(60e12, "float32 and float64 matrix rate of a GPU, for factorisations")
    solver_efficiency: float = _flag(0.2, "share of that rate the factorisations reach", most=1.0)
    memory_bandwidth: float = _flag(3.35e12, "of a GPU's memory, for unpacking 4-bit weights")
    network_efficiency: float = _flag(0.8, "share of the links' rates that collectives reach", most=1.0)
    overlap: float = _flag(
        0.8, "share of the shorter of computing and communicating that hides behind the other", zero=True, most=1.0
    )
    latency: float = _flag(20e-6, "of one collective, times log2 of the ranks", zero=True)
    host_memory: float = _flag(0.0, "memory of a node; unset: not checked")
    host_bandwidth: float = _flag(25e9, "between a GPU and its host, per direction")
    disk: float = _flag(0.0, "free bytes in output_dir; unset: not checked")
    disk_bandwidth: float = _flag(2e9, "a node's reading rate of the checkpoint")
    fragmentation: float = _flag(0.06, "share of GPU memory the allocator cannot use", zero=True, most=1.0)
    context: float = _flag(1.5e9, "GPU memory of CUDA and the communicators before any tensor", zero=True)
    interpreter: float = _flag(3e9, "host memory of one process before any tensor", zero=True)
    supervised: float = _flag(1.0, "share of training tokens with a label; 1 is the most memory", most=1.0)

    def __post_init__(self) -> None:
        for one in fields(self):
            value, zero, most = getattr(self, one.name), one.metadata["zero"], one.metadata["most"]
            if not 0 <= value <= most or (value == 0 and not zero) or math.isinf(value):
                allowed = f"{'from' if zero else 'above'} 0" + ("" if math.isinf(most) else f", at most {most:g}")
                raise UserError(
                    f"--{one.name.replace('_', '-')} {value:g}: {one.metadata['help']}; wanted is {allowed}"
                )
        if self.usable <= 0:
            raise UserError(
                f"--gpu-memory {self.gpu_memory:g}: nothing is left of it beside --context {self.context:g} and "
                f"--fragmentation {self.fragmentation:g}; give a GPU's memory, as 80GB"
            )

    @property
    def usable(self) -> float:
        """Bytes of a GPU that tensors can have."""
        return self.gpu_memory * (1 - self.fragmentation) - self.context

    @property
    def ranks_per_node(self) -> int:
        """Ranks that share a host."""
        return min(self.gpus, self.gpus_per_node)

    @property
    def link(self) -> float:
        """Bytes/s a ring over all ranks moves: a ring crosses a node's border once, on all its cards together."""
        inside = self.intra_node or self.interconnect
        rate = inside if self.gpus <= self.gpus_per_node else min(inside, self.interconnect)
        return rate * self.network_efficiency

    def assumptions(self) -> list[str]:
        """One line a field: its name, value and meaning."""
        return [f"{f.name:<20} {getattr(self, f.name):>10.4g}  {f.metadata['help']}" for f in fields(self)]
