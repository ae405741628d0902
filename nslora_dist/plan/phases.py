"""The phases of a run on a cluster: memory, traffic, work and time of each (load to export), and the whole plan."""

from nslora_dist.plan import memory, traffic, zero3
from nslora_dist.plan.calibrating import calibrating
from nslora_dist.plan.cluster import Cluster
from nslora_dist.plan.measuring import measuring
from nslora_dist.plan.phase import Phase, Plan, gb, knobs_of, on_node, read_seconds, wire_seconds
from nslora_dist.plan.shapes import Shapes
from nslora_dist.plan.training import training
from nslora_dist.recipe import Recipe


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
    host = on_node(host, cluster) | {
        "null space on rank 0": memory.null_space_bytes(shapes, texts),
        "tensors being read": cluster.ranks_per_node * shapes.compute * shapes.vocabulary * shapes.hidden / world,
    }
    copied = shapes.checkpoint / world / cluster.host_bandwidth
    seconds = max(read_seconds(shapes, cluster), copied) + wire_seconds(wire, cluster)
    note = f"each rank reads {gb(shapes.checkpoint / world)} of the checkpoint's {gb(shapes.checkpoint)}"
    return Phase("load", gpu, host, tuple(traffic.total(wire)), seconds=seconds, note=note)


def _export(recipe: Recipe, shapes: Shapes, cluster: Cluster, knobs: zero3.Knobs) -> Phase:
    """The factors gathered one by one; rank 0 keeps all of them in the compute dtype and writes them."""
    engine, world = recipe.engine.name, cluster.gpus
    gpu, host = memory.state(shapes, world, engine, knobs)
    if engine != "zero3":
        gpu.pop("gradients")
    largest = max((p.numel for p in shapes.trained), default=0)
    gpu["one factor"] = 4.0 * largest
    size = memory.adapter_bytes(shapes)
    host = on_node(host, cluster) | {"factors on rank 0": size}
    wire = traffic.export(shapes, world, engine)
    seconds = wire_seconds(wire, cluster) + size / cluster.disk_bandwidth
    return Phase("export", gpu, host, tuple(wire), seconds=seconds, disk=2 * size, note=f"adapter of {gb(size)}")


def make_plan(recipe: Recipe, shapes: Shapes, cluster: Cluster, *, steps: int | None = None) -> Plan:
    """All phases. ``steps`` is for recipes that give epochs.

    Raises:
        UserError: the engine shards nothing and there are several GPUs; the global batch does not divide over them.
    """
    recipe.engine.check_ranks(cluster.gpus)
    knobs = knobs_of(recipe)
    accumulation = recipe.train.accumulation(cluster.gpus)
    phases = [_load(recipe, shapes, cluster, knobs)]
    if shapes.adapter.null_space:
        phases += calibrating(recipe, shapes, cluster)
    phases.append(step := training(recipe, shapes, cluster, knobs, accumulation))
    phases.append(measuring(recipe, shapes, cluster, knobs))
    phases.append(_export(recipe, shapes, cluster, knobs))
    rate = recipe.train.global_batch_size * recipe.data.max_length / step.seconds
    return Plan(recipe, shapes, cluster, tuple(phases), accumulation, rate, recipe.train.max_steps or steps)
