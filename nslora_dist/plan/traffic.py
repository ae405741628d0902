"""Bytes on the wire, collective by collective, as the implementation issues them.

``Traffic.bytes`` is the payload as a counter at the collective sees it: the whole gathered output of an all-gather, the
whole input of a reduce-scatter, the tensor of an all-reduce, reduce or broadcast. What a rank then sends and receives
follows from the ring algorithms (``sent``). Small Python objects (``dist.share``, ``dist.together``) and single
flags (``dist.stopping``, ``dist.everywhere``) are not counted.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from nslora_dist.calibration.solve import SPECTRUM_WIDTH
from nslora_dist.nf4 import BLOCK as NF4_BLOCK
from nslora_dist.plan.shapes import Param, Shapes, Unit, is_adapter, is_null_basis
from nslora_dist.recipe import Recipe

FLOAT32, FLOAT64 = 4, 8


@dataclass(frozen=True)
class Traffic:
    """All calls of one collective in a stretch of the run.

    Attributes:
        collective: ``all_gather``, ``reduce_scatter``, ``all_reduce``, ``reduce`` or ``broadcast``.
        calls: number of calls.
        bytes: payload of all calls together.
    """

    collective: str
    calls: float
    bytes: float

    def sent(self, world_size: int) -> float:
        """Bytes a rank sends in a ring, and as many it receives.

        All-gather and reduce-scatter (n − 1)/n of the payload, an all-reduce both; a reduce or broadcast is a chain in
        which every rank but the last passes the whole payload on.
        """
        share = (world_size - 1) / world_size
        match self.collective:
            case "all_reduce":
                return 2 * share * self.bytes
            case "all_gather" | "reduce_scatter":
                return share * self.bytes
            case _:
                return self.bytes if world_size > 1 else 0.0


def total(traffic: Iterable[Traffic]) -> list[Traffic]:
    """The same, one entry a collective."""
    sums: dict[str, tuple[float, float]] = {}
    for one in traffic:
        calls, size = sums.get(one.collective, (0, 0))
        sums[one.collective] = calls + one.calls, size + one.bytes
    return [Traffic(name, calls, size) for name, (calls, size) in sums.items() if calls]


def times(traffic: Iterable[Traffic], count: float) -> list[Traffic]:
    """``count`` repetitions."""
    return [Traffic(one.collective, one.calls * count, one.bytes * count) for one in traffic]


def sent_bytes(traffic: Iterable[Traffic], world_size: int) -> float:
    """Bytes a rank sends over all collectives."""
    return sum(one.sent(world_size) for one in traffic)


def padded(numel: int, world_size: int) -> int:
    """``numel`` rounded up to a multiple of the ranks."""
    return -(-numel // world_size) * world_size


def padded_rows(param: Param, world_size: int) -> int:
    """Elements of a parameter whose first dimension is rounded up to a multiple of the ranks (FSDP2's ``Shard(0)``)."""
    return padded(param.shape[0], world_size) * (param.numel // param.shape[0])


@dataclass(frozen=True)
class Texts:
    """How many sets of texts calibration runs: ``held`` of the sources keep some back (``heldout_fraction``)."""

    sources: int
    held: int
    probes: int

    @classmethod
    def of(cls, recipe: Recipe) -> "Texts":
        """By the recipe, assuming that every source has at least two sequences."""
        section = recipe.calibration
        sources = len(section.sources)
        return cls(sources, sources if section.heldout_fraction else 0, len(section.probes))

    @property
    def grams(self) -> int:
        """Small Grams a group keeps: every source, their mixture, every probe."""
        return self.sources + 1 + self.probes


def solution_sizes(shapes: Shapes, width: int, outputs: Sequence[int], sources: int) -> list[int]:
    """Bytes of each tensor that a group's owner sends round (``Solution.tensors``), in order, empty ones left out."""
    adapter = shapes.adapter
    rank = adapter.rank
    sizes = [
        width * rank * FLOAT32,  # basis
        (3 + rank) * FLOAT64,  # facts
        (sources + 1) * rank * rank * FLOAT32,  # update_grams
        (len(outputs) if adapter.projected else 0) * rank * rank * FLOAT32,  # mixes
        (width if width <= SPECTRUM_WIDTH else 0) * FLOAT64,  # spectrum
        *(d_out * rank * FLOAT32 for d_out in outputs if adapter.residual),  # start_b
    ]
    return [size for size in sizes if size]


def calibration(shapes: Shapes, texts: Texts, world_size: int) -> list[Traffic]:
    """The whole calibration pass (``Calibration``), exact.

    Per block, group and set of texts one all-reduce of 1 + modules float64 (``_pass``); per source one reduce of the
    packed triangle d(d + 1)/2 in float32 to the owner (``_sources``); the solution's tensors broadcast (``_finish``);
    an all-reduce of the (r, r) Gram per probe and of one float32 per held-out set (``_record_measured``). Embedding and
    blocks are read by shares and exchanged (``exchange``).
    """
    if world_size == 1 or not shapes.adapter.null_space:
        return []
    passes = texts.sources + texts.held + texts.probes
    rank = shapes.adapter.rank
    read = [u for u in shapes.units if u.name == "model.embed_tokens" or u.name.startswith("model.layers.")]
    found: list[Traffic] = []
    for group in shapes.groups:
        triangle = group.width * (group.width + 1) // 2 * FLOAT32
        solution = solution_sizes(shapes, group.width, group.outputs, texts.sources)
        found += [
            Traffic("all_reduce", passes, passes * (1 + len(group.outputs)) * FLOAT64),
            Traffic("reduce", texts.sources, texts.sources * triangle),
            Traffic("broadcast", len(solution), sum(solution)),
            Traffic("all_reduce", texts.probes, texts.probes * rank * rank * FLOAT32),
            Traffic("all_reduce", texts.held, texts.held * FLOAT32),
        ]
    return total(times(found, shapes.layers) + exchange(read, shapes, world_size))


def start_broadcasts(shapes: Shapes, texts: Texts, world_size: int) -> list[Traffic]:
    """Rank 0 sends every group's basis and small Grams, and each module's own start (``NullSpace.starts``), exact."""
    adapter = shapes.adapter
    if world_size == 1 or not adapter.null_space:
        return []
    square = adapter.rank * adapter.rank * FLOAT32
    found = []
    for group in shapes.groups:
        found.append(Traffic("broadcast", 1 + texts.grams, group.width * adapter.rank * FLOAT32 + texts.grams * square))
        for d_out in group.outputs:
            if adapter.projected:
                found.append(Traffic("broadcast", 1, square))
            if adapter.residual:
                found.append(Traffic("broadcast", 1, d_out * adapter.rank * FLOAT32))
    return total(times(found, shapes.layers))


def exchange(units: Sequence[Unit], shapes: Shapes, world_size: int) -> list[Traffic]:
    """Ranks exchange the rows of every base tensor of which each has read a share (``fill_unit``), exact.

    Rows are padded to the ranks. A 4-bit weight travels as its codes and a float32 scale for every block of values.
    """
    if world_size == 1:
        return []
    linears = {linear.name: linear for linear in shapes.linears}
    sizes = []
    for unit in units:
        for param in unit.params:
            if is_adapter(param.name):
                continue
            if shapes.quantized and param.shape[1:] == (1,):
                inside = param.name.removeprefix(f"{unit.name}.").removesuffix(".weight").removesuffix(".base")
                linear = linears[inside]
                values = padded(linear.d_out, world_size) * linear.d_in
                sizes += [values // 2, FLOAT32 * values // NF4_BLOCK]
            else:
                sizes.append(padded_rows(param, world_size) * param.itemsize)
    return [Traffic("all_gather", len(sizes), sum(sizes))]


def exchanged_units(shapes: Shapes, engine: str) -> list[Unit]:
    """Units that are whole on a rank before they are sharded: all but FSDP2's embedding and head (``Fsdp2Engine``)."""
    own = {"lm_head"} if shapes.tied else {"lm_head", "model.embed_tokens"}
    return [unit for unit in shapes.units if engine != "fsdp2" or unit.name not in own]


def fsdp2_units(shapes: Shapes) -> list[Unit]:
    """FSDP2's parameter groups: every unit on its own, but the final norm and a tied embedding with the root's."""
    root = [u for u in shapes.units if u.name == "model.norm" or (shapes.tied and u.name == "model.embed_tokens")]
    rest = [u for u in shapes.units if u not in root]
    return [Unit("", tuple(p for u in root for p in u.params)), *rest]


def fsdp2_gather(unit: Unit, shapes: Shapes, world_size: int) -> int:
    """Bytes of one unit's all-gather: every row-padded parameter in the compute dtype (``MixedPrecisionPolicy``).

    Beside 4-bit weights trained parameters stay float32 (``Fsdp2Engine``).
    """
    trained = FLOAT32 if shapes.quantized else shapes.compute
    return sum(padded_rows(p, world_size) * (trained if p.trained else shapes.compute) for p in unit.params)


def fsdp2_measured(shapes: Shapes, world_size: int, *, with_head: bool) -> list[Traffic]:
    """One more forward pass without a backward pass in between: the root's group is there since the first."""
    if world_size == 1:
        return []
    units = [u for u in fsdp2_units(shapes)[1:] if with_head or u.name != "lm_head"]
    return [Traffic("all_gather", len(units), sum(fsdp2_gather(u, shapes, world_size) for u in units))]


def fsdp2_micro_batch(shapes: Shapes, world_size: int) -> list[Traffic]:
    """Forward and backward of one micro-batch, exact.

    The root's group stays gathered through backward and the blocks are gathered again; embedding and head are not, for
    no gradient needs their weights (``Fsdp2Engine``). Gradients of each unit with trained parameters are reduced in
    float32, rows padded.
    """
    if world_size == 1:
        return []
    units = fsdp2_units(shapes)
    again = [u for u in units if u.name.startswith("model.layers.")]
    reduced = [u for u in units if any(p.trained for p in u.params)]
    return [
        Traffic("all_gather", len(units), sum(fsdp2_gather(u, shapes, world_size) for u in units)),
        Traffic("all_gather", len(again), sum(fsdp2_gather(u, shapes, world_size) for u in again)),
        Traffic(
            "reduce_scatter",
            len(reduced),
            sum(padded_rows(p, world_size) for u in reduced for p in u.params if p.trained) * FLOAT32,
        ),
    ]


def step_end(shapes: Shapes, world_size: int, engine: str) -> list[Traffic]:
    """What an optimizer step adds: the trainer's token counts and loss, and the gradient norm.

    FSDP2 reduces the norms of all parameters in one vector; ZeRO-3 one float64. Its persistent parameters come on top
    (``zero3.Steady``).
    """
    if world_size == 1:
        return []
    norm = len(shapes.trained) * FLOAT32 if engine == "fsdp2" else FLOAT64
    return [Traffic("all_reduce", 3, 2 * FLOAT64 + FLOAT64 + norm)]


def effects(shapes: Shapes, texts: Texts, world_size: int, *, with_grams: bool = False) -> list[Traffic]:
    """What ``effects.measure`` sums over the ranks beside its forward passes, exact.

    A text three energies a module and two numbers of its divergence, in float64; for a random A that is measured C of
    every module as well.
    """
    if world_size == 1:
        return []
    modules, rank = shapes.layers * sum(linear.adapted for linear in shapes.linears), shapes.adapter.rank
    size = (3 * modules + 2 + (modules * rank * rank if with_grams else 0)) * FLOAT64
    passes = texts.sources + texts.probes
    return [Traffic("all_reduce", passes * (3 if with_grams else 2), passes * size)]


def budget(shapes: Shapes, world_size: int, engine: str) -> list[Traffic]:
    """A step's share in keeping an interference budget (``Budget.measure``), exact.

    One float64 a module; and where ranks divide a matrix within a row, which FSDP2 never does, that row in float32.
    """
    if world_size == 1:
        return []
    split = 0
    for param in shapes.trained if engine == "zero3" else ():
        width, share = param.shape[1], padded(param.numel, world_size) // world_size
        ends = (share * rank for rank in range(1, world_size))
        split += width * len({end // width for end in ends if end < param.numel and end % width})
    sizes = [FLOAT64 * len(shapes.trained), FLOAT32 * split]
    return [Traffic("all_reduce", sum(map(bool, sizes)), sum(sizes))]


def export(shapes: Shapes, world_size: int, engine: str) -> list[Traffic]:
    """Every adapter parameter gathered on its own (``Engine.gather``): in float32 where it trains.

    FSDP2 pads rows, ZeRO-3 elements. What ZeRO-3 kept whole on every rank it has let go of in evaluation.
    """
    if world_size == 1:
        return []
    found = []
    for param in shapes.params:
        if is_null_basis(param.name):
            continue
        if is_adapter(param.name):
            rows = padded_rows(param, world_size) if engine == "fsdp2" else padded(param.numel, world_size)
            found.append(Traffic("all_gather", 1, rows * (FLOAT32 if param.trained else param.itemsize)))
    return total(found)
