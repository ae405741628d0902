"""The calibration pass on paper: the streamed texts, and the solves behind them."""

from math import ceil

from nslora_dist.calibration.grams import LEAF
from nslora_dist.plan import memory, traffic
from nslora_dist.plan.cluster import Cluster
from nslora_dist.plan.memory import Batch, CalibrationLoad
from nslora_dist.plan.phase import Phase, gb, on_node, read_seconds, wire_seconds
from nslora_dist.plan.shapes import Group, Shapes
from nslora_dist.recipe import Recipe


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


def calibrating(recipe: Recipe, shapes: Shapes, cluster: Cluster) -> tuple[Phase, Phase]:
    """The streamed pass, and the solves behind it; all sources, held-out texts and probes at full length."""
    section, world = recipe.calibration, cluster.gpus
    texts = traffic.Texts.of(recipe)
    length, samples = section.sequence_length, section.samples
    per_rank = sum(ceil(n / world) for n in sequences(recipe, heldout=True)) * length
    batch = Batch(section.batch_size, length, masked=not section.concatenate and section.batch_size > 1)
    owned = largest_ownership(shapes, world, section.solver.placement)
    native = shapes.compute == 2
    load = CalibrationLoad(
        texts, per_rank, batch, section.hidden_states == "host", section.solver.method, owned, native
    )
    gpu, host = memory.calibration(shapes, load, world)
    host = on_node(host, cluster)
    space = memory.null_space_bytes(shapes, texts)
    host["null space on rank 0"] = space
    wire = traffic.calibration(shapes, texts, world)
    summed = ceil(samples * (1 - section.heldout_fraction) / world) * texts.sources * length
    grams = sum(g.width**2 + LEAF["cuda"] * g.width for g in shapes.groups)  # the lower block triangle (``add_gram``)
    forward = 2.0 * shapes.block_products + shapes.attention_flops(length)
    flops = shapes.layers * (per_rank * forward + summed * grams)
    sources = texts.sources
    costs = [solve_flops(shapes, g, sources=sources, method=section.solver.method) for g in shapes.groups]
    by_width = dict(zip(shapes.groups, costs, strict=True))
    rate = cluster.solver_flops * cluster.solver_efficiency
    slowest = sum(by_width[g] for g in owned) / rate
    read = read_seconds(shapes, cluster) / shapes.layers
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


def sequences(recipe: Recipe, *, heldout: bool) -> list[int]:
    """Sequences of every set: each source's without those held out, these by themselves if wanted, and each probe's."""
    section = recipe.calibration
    held = round(section.samples * section.heldout_fraction)
    of_source = [section.samples - held, held] if heldout else [section.samples - held]
    return of_source * len(section.sources) + [section.samples] * len(section.probes)
