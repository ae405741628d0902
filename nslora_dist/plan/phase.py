"""What a plan is made of: phases, and what every one of them reckons with."""

from dataclasses import dataclass, field
from math import ceil, log2

from nslora_dist.plan import traffic, zero3
from nslora_dist.plan.cluster import Cluster
from nslora_dist.plan.memory import Parts
from nslora_dist.plan.shapes import Shapes
from nslora_dist.plan.traffic import Traffic
from nslora_dist.recipe import Recipe, check_zero_config


@dataclass(frozen=True)
class Phase:
    """One phase on one rank.

    Attributes:
        name: load, calibrate, solve, train, measure or export.
        gpu: parts of its highest GPU memory, bytes.
        host: parts of a *node's* host memory, bytes.
        wire: payloads by collective.
        flops: of one rank.
        seconds: at the cluster's stated efficiencies.
        disk: bytes it writes into ``output_dir``.
        note: what the figures are for.
    """

    name: str
    gpu: Parts = field(default_factory=dict)
    host: Parts = field(default_factory=dict)
    wire: tuple[Traffic, ...] = ()
    flops: float = 0.0
    seconds: float = 0.0
    disk: float = 0.0
    note: str = ""

    @property
    def gpu_bytes(self) -> float:
        """The highest GPU memory."""
        return sum(self.gpu.values())

    @property
    def host_bytes(self) -> float:
        """A node's host memory."""
        return sum(self.host.values())

    def sent(self, world_size: int) -> float:
        """Bytes one rank sends, and as many it receives."""
        return traffic.sent_bytes(self.wire, world_size)


@dataclass(frozen=True)
class Plan:
    """All phases of a recipe on a cluster.

    Attributes:
        tokens_per_second: of all ranks in training.
        steps: optimizer steps, None where ``train.epochs`` of an unknown number of rows decides.
    """

    recipe: Recipe
    shapes: Shapes
    cluster: Cluster
    phases: tuple[Phase, ...]
    accumulation: int
    tokens_per_second: float
    steps: int | None

    def phase(self, name: str) -> Phase:
        """The phase of that name."""
        return next(phase for phase in self.phases if phase.name == name)

    def short_of(self) -> list[tuple[Phase, str]]:
        """Phases that do not fit, with a line that names the figure."""
        found = []
        for phase in self.phases:
            limits = (
                ("GPU memory", phase.gpu_bytes, self.cluster.usable),
                ("host memory of a node", phase.host_bytes, self.cluster.host_memory),
                ("disk in output_dir", phase.disk, self.cluster.disk),
            )
            for what, wanted, there in limits:
                if there and wanted > there:
                    found.append((phase, f"{phase.name}: {what} {gb(wanted)} of {gb(there)}"))
        return found


def gb(size: float) -> str:
    """Bytes for a person, in powers of ten."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= 0.995 * scale:
            return f"{size / scale:.3g} {unit}" if size < 995 * scale else f"{size / scale:,.0f} {unit}"
    return f"{size / 1e3:.3g} kB"


def knobs_of(recipe: Recipe) -> zero3.Knobs:
    """The ZeRO settings of ``engine.config``, DeepSpeed's defaults where there is none."""
    return zero3.Knobs() if recipe.engine.config is None else zero3.Knobs.of(check_zero_config(recipe))


def on_node(host: Parts, cluster: Cluster) -> Parts:
    """A rank's host memory as a node's, with its processes."""
    held = {name: size * cluster.ranks_per_node for name, size in host.items()}
    return held | {"processes": cluster.interpreter * cluster.ranks_per_node}


def weight_seconds(shapes: Shapes, cluster: Cluster, knobs: zero3.Knobs, engine: str) -> float:
    """What one pass over all weights takes beside its products: unpacking 4 bits, and fetching what is offloaded."""
    seconds = 0.0
    if shapes.quantized:  # half a byte read and the dense weight written
        seconds += shapes.layers * shapes.block_products * (0.5 + shapes.compute) / cluster.memory_bandwidth
    if engine == "zero3" and knobs.offload_param:
        seconds += sum(p.bytes for p in shapes.params) / cluster.gpus / cluster.host_bandwidth
    return seconds


def wire_seconds(wire: list[Traffic] | tuple[Traffic, ...], cluster: Cluster) -> float:
    """Ring time of the payloads and the latency of every call."""
    if cluster.gpus == 1:
        return 0.0
    calls = sum(one.calls for one in wire)
    return traffic.sent_bytes(wire, cluster.gpus) / cluster.link + calls * cluster.latency * ceil(log2(cluster.gpus))


def read_seconds(shapes: Shapes, cluster: Cluster) -> float:
    """The checkpoint off the disks of all nodes, each of which reads its ranks' rows alone."""
    return shapes.checkpoint * cluster.ranks_per_node / cluster.gpus / cluster.disk_bandwidth


def overlapped_seconds(compute: float, wire: float, cluster: Cluster) -> float:
    """Seconds of computing and communicating that overlap in part."""
    return max(compute, wire) + (1 - cluster.overlap) * min(compute, wire)
