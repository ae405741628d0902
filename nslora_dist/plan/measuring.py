"""What is measured with the calibration texts by the sharded model itself, on paper (``effects``)."""

from math import ceil

from nslora_dist.linear import HEAD_CHUNK_BYTES
from nslora_dist.plan import memory, traffic, zero3
from nslora_dist.plan.calibrating import sequences
from nslora_dist.plan.cluster import Cluster
from nslora_dist.plan.memory import Batch, Parts
from nslora_dist.plan.phase import Phase, on_node, overlapped_seconds, weight_seconds, wire_seconds
from nslora_dist.plan.shapes import Shapes
from nslora_dist.plan.traffic import FLOAT32, Traffic
from nslora_dist.recipe import Recipe

CHUNK = 5
"""Float32 copies of a chunk of logits while two distributions are compared (``head_divergence``)."""


def measuring(recipe: Recipe, shapes: Shapes, cluster: Cluster, knobs: zero3.Knobs) -> Phase:
    """The base and the adapted model once over every text, when training is over, for interference and divergence.

    And for a budget on a random A the base once more, before training (``measure_frozen_a``). All texts at full length.
    """
    section, world = recipe.calibration, cluster.gpus
    rows, length = section.batch_size, section.sequence_length
    own = [ceil(n / world) for n in sequences(recipe, heldout=False)]
    batches, tokens = sum(ceil(n / rows) for n in own), sum(own) * length
    passes = 3 if recipe.adapter.measures_a else 2
    texts = traffic.Texts.of(recipe)
    base, adapted = pass_traffic(recipe, shapes, world, knobs)
    wire = traffic.times(base + adapted, batches) + traffic.effects(shapes, texts, world)
    if recipe.adapter.measures_a:
        wire += traffic.times(base, batches) + traffic.effects(shapes, texts, world, with_grams=True)
    wire = traffic.total(wire)

    heads = 2 * 2.0 * shapes.vocabulary * shapes.hidden  # the logits of both, in the second pass
    flops = tokens * (passes * shapes.layers * shapes.forward_flops(length) + heads)
    compute = flops / (cluster.flops * cluster.efficiency)
    compute += batches * passes * weight_seconds(shapes, cluster, knobs, recipe.engine.name)
    seconds = overlapped_seconds(compute, wire_seconds(wire, cluster), cluster)

    gpu, host = measuring_memory(recipe, shapes, cluster, knobs)
    note = f"{passes} forward passes over {tokens:,.0f} tokens a rank, {rows} x {length} at once"
    return Phase("measure", gpu, host, tuple(wire), flops, seconds, note=note)


def pass_traffic(recipe: Recipe, shapes: Shapes, world_size: int, knobs: zero3.Knobs) -> list[list[Traffic]]:
    """One batch through the base and the adapted model; logits, which the second asks for, need the head."""
    match recipe.engine.name:
        case "fsdp2":
            both = (traffic.fsdp2_measured(shapes, world_size, with_head=with_head) for with_head in (False, True))
        case "zero3":
            steady = zero3.steady(shapes, knobs, checkpointing=recipe.train.activation_checkpointing)
            both = (steady.traffic(which, world_size) for which in ("hidden", "forward"))
        case "single":
            return [[], []]
    return list(both)


def measuring_memory(recipe: Recipe, shapes: Shapes, cluster: Cluster, knobs: zero3.Knobs) -> tuple[Parts, Parts]:
    """The highest of a pass: (on the GPU, in a node's host memory).

    Beside the base's hidden states that the adapted model is compared with: at a block's up_proj the embeddings, the
    block's input, its rows before and after the norm, silu(gate), the module's product and its update twice (before and
    after the scale); or the logits of both models.
    """
    section, engine, world = recipe.calibration, recipe.engine.name, cluster.gpus
    gpu, host = memory.state(shapes, world, engine, knobs)
    if engine != "zero3":
        gpu.pop("gradients")
    gpu |= memory.gathered(shapes, world, engine, knobs, checkpointing=recipe.train.activation_checkpointing)
    gpu.pop("gradient buffers", None)
    batch = Batch(section.batch_size, section.sequence_length)
    c, h, wide = shapes.compute, shapes.hidden, shapes.intermediate
    block = float(batch.tokens * (4 * c * h + 4 * c * wide))
    block += shapes.dense_block if shapes.quantized else 0
    rows = min(batch.tokens, max(1, HEAD_CHUNK_BYTES // (2 * FLOAT32 * shapes.vocabulary)))
    head = float(2 * c * h * batch.tokens + CHUNK * FLOAT32 * rows * shapes.vocabulary)
    gpu["the base's hidden states"] = float(c * h * batch.tokens)
    gpu["activations" if block > head else "logits"] = max(block, head)
    return gpu, on_node(host, cluster)
