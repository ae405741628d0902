"""An optimizer step on paper."""

from nslora_dist.plan import memory, traffic, zero3
from nslora_dist.plan.cluster import Cluster
from nslora_dist.plan.memory import Batch, Parts
from nslora_dist.plan.phase import Phase, on_node, overlapped_seconds, weight_seconds, wire_seconds
from nslora_dist.plan.shapes import Shapes
from nslora_dist.recipe import Recipe


def training_batch(recipe: Recipe, cluster: Cluster) -> Batch:
    """A micro-batch of rows of ``data.max_length``: the longest there can be. One unpacked row needs no mask."""
    rows = recipe.train.micro_batch_size
    masked = (recipe.data.packing or rows > 1) and recipe.base_model.attention != "flash_attention_2"
    return Batch(rows, recipe.data.max_length, masked, cluster.supervised)


def train_flops(shapes: Shapes, batch: Batch, *, checkpointing: bool) -> float:
    """One micro-batch on one rank: frozen products forward and for the input's gradient, never for a weight's.

    Attention backward is 2.5 times forward; adapters r (d_in + d_out) multiply-adds forward, as many for gradients of
    their inputs and for those of B, and of A where it trains; the head forward and its gradient at labelled tokens.
    """
    rank = shapes.adapter.rank
    linear = 2.0 * shapes.block_products
    of_b = sum(2.0 * rank * m.d_out for m in shapes.linears if m.adapted)
    of_a = sum(2.0 * rank * m.d_in for m in shapes.linears if m.adapted) * shapes.adapter.a_trains
    attention = shapes.attention_flops(batch.length)
    times = 3 if checkpointing else 2
    block = times * (linear + shapes.adapter_flops) + of_b + of_a + attention * (times - 1 + 2.5)
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
    host = on_node(host, cluster)
    return gpu, host


def training(recipe: Recipe, shapes: Shapes, cluster: Cluster, knobs: zero3.Knobs, accumulation: int) -> Phase:
    """One optimizer step."""
    train, engine, world = recipe.train, recipe.engine.name, cluster.gpus
    gpu, host = train_memory(recipe, shapes, cluster, knobs)
    wire = traffic.step_end(shapes, world, engine)
    if recipe.adapter.interference_budget is not None:
        wire += traffic.budget(shapes, world, engine)
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
    compute += accumulation * passes * weight_seconds(shapes, cluster, knobs, engine)
    seconds = overlapped_seconds(compute, wire_seconds(wire, cluster), cluster)
    note = f"one step: {accumulation} micro-batches of {batch.rows} x {batch.length} tokens a rank"
    kept = memory.checkpoint_bytes(shapes)
    # A rank writes its part behind the next steps, while the older ones are still kept.
    host |= {"checkpoint on its way": kept / world * cluster.ranks_per_node}
    disk = kept * (recipe.checkpoint.keep_last + 1)
    return Phase("train", gpu, host, tuple(wire), flops, seconds, disk=disk, note=note)
