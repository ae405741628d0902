"""The phases of a run on a cluster: memory, traffic, work and time of each (load, calibrate, solve, train, export)."""

from dataclasses import dataclass, field
from math import ceil, log2

from nslora_dist.calibration.grams import LEAF
from nslora_dist.plan import memory, traffic, zero3
from nslora_dist.plan.cluster import Cluster
from nslora_dist.plan.memory import Batch, CalibrationLoad, Parts
from nslora_dist.plan.shapes import Group, Shapes
from nslora_dist.plan.traffic import Traffic
from nslora_dist.recipe import Recipe, check_zero_config

__all__ = ["Phase", "Plan", "make_plan"]


@dataclass(frozen=True)
class Phase:
    """One phase on one rank.

    Attributes:
        name: load, calibrate, solve, train or export.
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


def training_batch(recipe: Recipe, cluster: Cluster) -> Batch:
    """A micro-batch of rows of ``data.max_length``: the longest there can be. One unpacked row needs no mask."""
    rows = recipe.train.micro_batch_size
    masked = (recipe.data.packing or rows > 1) and recipe.base_model.attention != "flash_attention_2"
    return Batch(rows, recipe.data.max_length, masked, cluster.supervised)


def _hidden(compute: float, wire: float, cluster: Cluster) -> float:
    """Seconds of computing and communicating that overlap in part."""
    return max(compute, wire) + (1 - cluster.overlap) * min(compute, wire)


def wire_seconds(wire: list[Traffic] | tuple[Traffic, ...], cluster: Cluster) -> float:
    """Ring time of the payloads and the latency of every call."""
    if cluster.gpus == 1:
        return 0.0
    calls = sum(one.calls for one in wire)
    return traffic.sent_bytes(wire, cluster.gpus) / cluster.link + calls * cluster.latency * ceil(log2(cluster.gpus))


def _read_seconds(shapes: Shapes, cluster: Cluster) -> float:
    """The checkpoint off the disks of all nodes, each of which reads its ranks' rows alone."""
    return shapes.checkpoint * cluster.ranks_per_node / cluster.gpus / cluster.disk_bandwidth


def _load(recipe: Recipe, shapes: Shapes, cluster: Cluster, knobs: zero3.Knobs) -> Phase:
    """Ranks read a share of every unit, exchange them and keep their part (``prepare``); rank 0 sends the starts.

    Memory: what stays, the largest unit with this rank's rows of it, and one linear's rows in the compute dtype while
    they are packed.
    """
    engine, world = recipe.engine.name, cluster.gpus
    gpu, host = memory.state(shapes, world, engine, knobs)
    gpu = {name: size for name, size in gpu.items() if name.endswith(("weights", "scales"))}
    unit = max(traffic.exchanged_units(shapes, engine), key=lambda u: u.bytes)
    gpu["one whole unit"] = float(unit.bytes) if engine != "single" else 0.0
    if world > 1:
        gpu["own rows of a unit"] = unit.base_bytes / world
    if shapes.quantized:
        gpu["rows to pack"] = shapes.dense_block / world
    texts = traffic.Texts.of(recipe)
    wire = traffic.start_broadcasts(shapes, texts, world)
    wire += traffic.exchange(traffic.exchanged_units(shapes, engine), shapes, world)
    if engine == "zero3":
        wire += zero3.start(shapes, world)
    host = {name: size * cluster.ranks_per_node for name, size in host.items()}
    host |= {
        "processes": cluster.interpreter * cluster.ranks_per_node,
        "null space on rank 0": memory.null_space_bytes(shapes, texts),
        "tensors being read": cluster.ranks_per_node * shapes.compute * shapes.vocabulary * shapes.hidden / world,
    }
    copied = shapes.checkpoint / world / cluster.host_bandwidth
    seconds = max(_read_seconds(shapes, cluster), copied) + wire_seconds(wire, cluster)
    note = f"each rank reads {gb(shapes.checkpoint / world)} of the checkpoint's {gb(shapes.checkpoint)}"
    return Phase("load", gpu, host, tuple(traffic.total(wire)), seconds=seconds, note=note)


def owned_groups(shapes: Shapes, world_size: int, placement: str) -> list[float]:
    """Cubed widths that each rank solves over the whole run, dealt as ``Calibration._owner`` deals them."""
    loads = [0.0] * world_size
    for _ in range(shapes.layers):
        for group in sorted(shapes.groups, key=lambda g: -g.width):
            owner = 0 if placement == "rank0" else min(range(world_size), key=loads.__getitem__)
            loads[owner] += float(group.width) ** 3
    return loads


def largest_ownership(shapes: Shapes, world_size: int, placement: str) -> tuple[Group, ...]:
    """The groups of one block that the busiest rank holds at once."""
    if placement == "rank0" or world_size == 1:
        return shapes.groups
    loads = [0.0] * world_size
    worst: tuple[Group, ...] = ()
    for _ in range(shapes.layers):
        mine: dict[int, list[Group]] = {}
        for group in sorted(shapes.groups, key=lambda g: -g.width):
            owner = min(range(world_size), key=loads.__getitem__)
            loads[owner] += float(group.width) ** 3
            mine.setdefault(owner, []).append(group)
        worst = max([worst, *map(tuple, mine.values())], key=lambda owned: sum(g.width**2 for g in owned))
    return worst


def solve_flops(shapes: Shapes, group: Group, *, sources: int, method: str) -> float:
    """One group (``solve_group``).

    eigh: about 9 d³. fast: a float32 Cholesky factorisation d³/3 and some five block steps of two triangular solves, a
    product and orthogonalisation. Either: a leak, a random one, the small Grams; the projected start's W U.
    """
    d, rank = float(group.width), shapes.adapter.rank
    block = memory.block_size(rank)
    work = 9 * d**3 if method == "eigh" or d < 512 else d**3 / 3 + 5 * (4 * d * d * block + 8 * d * block * block)
    if d <= traffic.SPECTRUM_WIDTH:
        work += 4 / 3 * d**3
    work += 2 * d * d * rank * (2 + sources + 1)
    if shapes.adapter.projected:
        work += sum(2 * d * d_out * rank + 6 * d_out * rank**2 for d_out in group.outputs)
    return work


def attention_flops(shapes: Shapes, length: int) -> float:
    """Causal scores and values of one token in one block, forward: 2 · s · heads · head_dim."""
    return 2.0 * length * shapes.heads * shapes.head_dim


def _calibrate(recipe: Recipe, shapes: Shapes, cluster: Cluster) -> tuple[Phase, Phase]:
    """The streamed pass, and the solves behind it; all sources, held-out texts and probes at full length."""
    section, world = recipe.calibration, cluster.gpus
    texts = traffic.Texts.of(recipe)
    length, samples = section.sequence_length, section.samples
    per_rank = sum(ceil(n / world) for n in _sequences(recipe)) * length
    batch = Batch(section.batch_size, length, masked=not section.concatenate and section.batch_size > 1)
    owned = largest_ownership(shapes, world, section.solver.placement)
    native = shapes.compute == 2
    load = CalibrationLoad(
        texts, per_rank, batch, section.hidden_states == "host", section.solver.method, owned, native
    )
    gpu, host = memory.calibration(shapes, load, world)
    host = {name: size * cluster.ranks_per_node for name, size in host.items()}
    host["processes"] = cluster.interpreter * cluster.ranks_per_node
    space = memory.null_space_bytes(shapes, texts)
    host["null space on rank 0"] = space
    wire = traffic.calibration(shapes, texts, world)
    summed = ceil(samples * (1 - section.heldout_fraction) / world) * texts.sources * length
    grams = sum(g.width**2 + LEAF["cuda"] * g.width for g in shapes.groups)  # the lower block triangle (``add_gram``)
    forward = 2.0 * shapes.block_products + attention_flops(shapes, length)
    flops = shapes.layers * (per_rank * forward + summed * grams)
    sources = texts.sources
    costs = [solve_flops(shapes, g, sources=sources, method=section.solver.method) for g in shapes.groups]
    by_width = dict(zip(shapes.groups, costs, strict=True))
    rate = cluster.solver_flops * cluster.solver_efficiency
    slowest = sum(by_width[g] for g in owned) / rate
    read = _read_seconds(shapes, cluster) / shapes.layers
    running = flops / shapes.layers / (cluster.flops * cluster.efficiency) + read
    if load.on_host:
        running += 2 * per_rank * shapes.hidden * shapes.compute / cluster.host_bandwidth
    # A block's solves hide behind the next block's forward pass, and its bases are waited for before the one after.
    seconds = shapes.layers * max(running, slowest) + slowest + wire_seconds(wire, cluster)
    note = f"{per_rank:,.0f} tokens a rank; {gb(sum(4.0 * g.width**2 for g in shapes.groups))} of Grams a block"
    solved = owned_groups(shapes, world, section.solver.placement)
    share = max(solved) / sum(solved) if sum(solved) else 0.0
    widest = max(owned, key=lambda g: g.width)
    retry = f"a fall-back to eigh would take {gb(32.0 * widest.width**2)} instead"
    solve = Phase(
        "solve",
        {"solver": memory.solver_workspace(shapes, widest, sources=sources, method=load.method)},
        flops=share * sum(costs) * shapes.layers,
        seconds=share * sum(costs) * shapes.layers / rate,
        note="in a thread behind calibrate, whose memory and time include it"
        + (f"; {retry}" if load.method == "fast" else ""),
    )
    return Phase("calibrate", gpu, host, tuple(wire), flops, seconds, 2 * space, note), solve


def _sequences(recipe: Recipe) -> list[int]:
    """Sequences of every set: each source's in two parts, each probe's."""
    section = recipe.calibration
    held = round(section.samples * section.heldout_fraction)
    return [section.samples - held, held] * len(section.sources) + [section.samples] * len(section.probes)


def train_flops(shapes: Shapes, batch: Batch, *, checkpointing: bool) -> float:
    """One micro-batch on one rank: frozen products forward and for the input's gradient, never for a weight's.

    Attention backward is 2.5 times forward; adapters r (d_in + d_out) multiply-adds forward, as many for gradients of
    their inputs and for those of B, and of A where it trains; the head forward and its gradient at labelled tokens.
    """
    rank = shapes.adapter.rank
    linear = 2.0 * shapes.block_products
    adapters = sum(2.0 * rank * (m.d_in + m.d_out) for m in shapes.linears if m.adapted)
    of_b = sum(2.0 * rank * m.d_out for m in shapes.linears if m.adapted)
    of_a = sum(2.0 * rank * m.d_in for m in shapes.linears if m.adapted) * shapes.adapter.a_trains
    attention = attention_flops(shapes, batch.length)
    times = 3 if checkpointing else 2
    block = times * (linear + adapters) + of_b + of_a + attention * (times - 1 + 2.5)
    head = 4.0 * shapes.vocabulary * shapes.hidden * batch.supervised
    return batch.tokens * (shapes.layers * block + head)


def train_memory(recipe: Recipe, shapes: Shapes, cluster: Cluster, knobs: zero3.Knobs) -> tuple[Parts, Parts]:
    """The highest of training: (on the GPU, in a node's host memory)."""
    train, engine, world = recipe.train, recipe.engine.name, cluster.gpus
    checkpointing, attention = train.activation_checkpointing, recipe.base_model.attention
    batch = training_batch(recipe, cluster)
    gpu, host = memory.state(shapes, world, engine, knobs)
    kept = memory.saved(shapes, batch, attention=attention, checkpointing=checkpointing, engine=engine)
    gpu["kept activations"] = sum(kept.values())
    gpu |= memory.transient(shapes, batch, attention=attention, checkpointing=checkpointing)
    gpu |= memory.gathered(shapes, world, engine, knobs, checkpointing=checkpointing)
    host = {name: size * cluster.ranks_per_node for name, size in host.items()}
    host["processes"] = cluster.interpreter * cluster.ranks_per_node
    return gpu, host


def _train(recipe: Recipe, shapes: Shapes, cluster: Cluster, knobs: zero3.Knobs, accumulation: int) -> Phase:
    """One optimizer step."""
    train, engine, world = recipe.train, recipe.engine.name, cluster.gpus
    gpu, host = train_memory(recipe, shapes, cluster, knobs)
    wire = traffic.step_end(shapes, world, engine)
    if engine == "fsdp2":
        wire += traffic.times(traffic.fsdp2_micro_batch(shapes, world), accumulation)
    elif engine == "zero3":
        checkpointing = train.activation_checkpointing
        wire += zero3.step(shapes, knobs, world, accumulation=accumulation, checkpointing=checkpointing)
    wire = traffic.total(wire)
    batch = training_batch(recipe, cluster)
    flops = accumulation * train_flops(shapes, batch, checkpointing=train.activation_checkpointing)
    compute = flops / (cluster.flops * cluster.efficiency)
    passes = 3 if train.activation_checkpointing else 2
    if shapes.quantized:  # half a byte read and the dense weight written, once a pass
        dense = shapes.layers * shapes.block_products * (0.5 + shapes.compute)
        compute += accumulation * passes * dense / cluster.memory_bandwidth
    if engine == "zero3" and knobs.offload_param:
        mine = sum(p.bytes for p in shapes.params) / world
        compute += accumulation * passes * mine / cluster.host_bandwidth
    seconds = _hidden(compute, wire_seconds(wire, cluster), cluster)
    note = f"one step: {accumulation} micro-batches of {batch.rows} x {batch.length} tokens a rank"
    kept = memory.checkpoint_bytes(shapes)
    # A rank writes its part behind the next steps, while the older ones are still kept.
    host |= {"checkpoint on its way": kept / world * cluster.ranks_per_node}
    disk = kept * (recipe.checkpoint.keep_last + 1)
    return Phase("train", gpu, host, tuple(wire), flops, seconds, disk=disk, note=note)


def _export(recipe: Recipe, shapes: Shapes, cluster: Cluster, knobs: zero3.Knobs) -> Phase:
    """The factors gathered one by one; rank 0 keeps all of them in the compute dtype and writes them."""
    engine, world = recipe.engine.name, cluster.gpus
    gpu, host = memory.state(shapes, world, engine, knobs)
    if engine != "zero3":
        gpu.pop("gradients")
    largest = max((p.numel for p in shapes.trained), default=0)
    gpu["one factor"] = 4.0 * largest
    size = memory.adapter_bytes(shapes)
    host = {name: value * cluster.ranks_per_node for name, value in host.items()}
    host |= {"processes": cluster.interpreter * cluster.ranks_per_node, "factors on rank 0": size}
    wire = traffic.export(shapes, world, engine, resident=knobs.persistence)
    seconds = wire_seconds(wire, cluster) + size / cluster.disk_bandwidth
    return Phase("export", gpu, host, tuple(wire), seconds=seconds, disk=2 * size, note=f"adapter of {gb(size)}")


def make_plan(recipe: Recipe, shapes: Shapes, cluster: Cluster, *, steps: int | None = None) -> Plan:
    """All phases. ``steps`` is for recipes that give epochs.

    Raises:
        UserError: the global batch does not divide over the GPUs.
    """
    knobs = knobs_of(recipe)
    accumulation = recipe.train.accumulation(cluster.gpus)
    phases = [_load(recipe, shapes, cluster, knobs)]
    if shapes.adapter.null_space:
        phases += _calibrate(recipe, shapes, cluster)
    phases.append(_train(recipe, shapes, cluster, knobs, accumulation))
    phases.append(_export(recipe, shapes, cluster, knobs))
    tokens = recipe.train.global_batch_size * recipe.data.max_length
    rate = tokens / phases[-2].seconds
    return Plan(recipe, shapes, cluster, tuple(phases), accumulation, rate, recipe.train.max_steps or steps)
