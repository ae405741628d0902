"""A pass of evaluation on paper: how many there are only the rows could tell, which a plan does not read.

Answers that are known beforehand take one pass a batch (``exact_match``, ``log_likelihoods``), answers that lm-eval
lets the model write one pass a token (``continuations``). In either a sharded engine gathers every weight, but where it
has room to keep them from the first pass on (``Engine.whole``).
"""

from dataclasses import dataclass, replace

from nslora_dist.machine import ROOM
from nslora_dist.plan import memory, zero3
from nslora_dist.plan.cluster import Cluster
from nslora_dist.plan.measuring import pass_traffic
from nslora_dist.plan.phase import overlapped_seconds, weight_seconds, wire_seconds
from nslora_dist.plan.shapes import Shapes
from nslora_dist.plan.traffic import sent_bytes
from nslora_dist.recipe import Recipe


@dataclass(frozen=True)
class EvaluationPass:
    """One forward pass of the adapted model.

    Attributes:
        rows: a rank.
        length: tokens of a row that go through: 1 behind a key-value cache.
        seconds: at the cluster's stated efficiencies.
        sent: bytes that a rank sends, and as many it receives.
        kept: bytes of gathered weights that a rank keeps from the first pass on; 0 where each pass gathers them.
        cache: bytes of keys and values that a rank keeps for each token of its rows, where it writes.
    """

    rows: int
    length: int
    seconds: float
    sent: float
    kept: float
    cache: float


def evaluation_pass(
    recipe: Recipe, shapes: Shapes, cluster: Cluster, knobs: zero3.Knobs, *, rows: int, length: int
) -> EvaluationPass:
    """``rows`` of ``length`` tokens on every rank, logits at ``cluster.supervised`` of them, one a row at least."""
    _, wire = pass_traffic(recipe, shapes, cluster.gpus, knobs)
    kept = _kept(recipe, shapes, cluster, knobs)
    if kept:
        wire, knobs = [], replace(knobs, offload_param=False)
    tokens = rows * length
    logits = max(rows, cluster.supervised * tokens)
    flops = tokens * shapes.layers * shapes.forward_flops(length) + logits * 2.0 * shapes.vocabulary * shapes.hidden
    # A token a row is too little work for a GPU that has to read every weight for it.
    read = shapes.compute * (shapes.layers * shapes.block_products + shapes.vocabulary * shapes.hidden)
    compute = max(flops / (cluster.flops * cluster.efficiency), read / cluster.memory_bandwidth)
    compute += weight_seconds(shapes, cluster, knobs, recipe.engine.name)
    seconds = overlapped_seconds(compute, wire_seconds(wire, cluster), cluster)
    cache = rows * 2.0 * shapes.compute * shapes.layers * shapes.kv_heads * shapes.head_dim
    return EvaluationPass(rows, length, seconds, sent_bytes(wire, cluster.gpus), kept, cache)


def _kept(recipe: Recipe, shapes: Shapes, cluster: Cluster, knobs: zero3.Knobs) -> float:
    if cluster.gpus == 1:
        return 0.0
    device, _ = memory.state(shapes, cluster.gpus, recipe.engine.name, knobs)
    device.pop("gradients", None)
    whole = float(sum(p.numel for p in shapes.params)) * shapes.compute
    return whole if whole <= ROOM * (cluster.usable - sum(device.values())) else 0.0
