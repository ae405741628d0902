"""A plan for a person to read."""

from nslora_dist.plan import memory
from nslora_dist.plan.advice import advise, changed, largest_micro_batch
from nslora_dist.plan.evaluating import EvaluationPass, evaluation_pass
from nslora_dist.plan.phase import Phase, Plan, gb, knobs_of
from nslora_dist.plan.phases import make_plan
from nslora_dist.plan.shapes import Shapes


def describe(plan: Plan) -> str:
    """The whole plan: what is short first, then each phase, the largest micro-batch, and every assumption."""
    recipe, shapes, cluster = plan.recipe, plan.shapes, plan.cluster
    short = plan.short_of()
    base = recipe.base_model
    lines = [
        f"{recipe.name}: {recipe.engine.name} on {cluster.gpus} GPUs of {gb(cluster.gpu_memory)} "
        f"({gb(cluster.usable)} usable), {base.dtype}, quantization {base.quantization}",
        f"{shapes.layers} blocks of {gb(shapes.block.base_bytes)}, base {gb(sum(u.base_bytes for u in shapes.units))}, "
        f"trained {sum(p.numel for p in shapes.trained):,} parameters",
        "",
    ]
    lines += [f"TOO LITTLE: {line}" for _, line in short] or ["Every phase fits."]
    if short:
        lines += ["What to change, each on top of the ones before:", *(f"  {line}" for line in advise(plan))]
    lines += ["", f"{'phase':<10}{'GPU':>10}{'host/node':>11}{'sent/rank':>11}{'PFLOP/rank':>12}{'time':>10}"]
    for phase in plan.phases:
        lines.append(
            f"{phase.name:<10}{gb(phase.gpu_bytes):>10}{gb(phase.host_bytes):>11}{gb(phase.sent(cluster.gpus)):>11}"
            f"{phase.flops / 1e15:>12.3g}{_time(phase.seconds):>10}"
        )
    for phase in plan.phases:
        lines += ["", f"{phase.name}: {phase.note}", *_parts(phase, cluster.gpus)]
    rows = largest_micro_batch(recipe, shapes, cluster)
    lines += [
        "",
        f"largest train.micro_batch_size that fits: {rows or 'none'} (rows of {recipe.data.max_length} tokens; "
        f"global batch {recipe.train.global_batch_size})",
        *_faster(plan, rows),
        f"training: {plan.tokens_per_second:,.0f} tokens/s over all GPUs at full length"
        + (f", {_time(plan.steps * plan.phase('train').seconds)} for {plan.steps} steps" if plan.steps else ""),
        f"on disk: null space {gb(memory.null_space_bytes(shapes, _texts(plan)))}, "
        f"adapter {gb(memory.adapter_bytes(shapes))}, a checkpoint {gb(memory.checkpoint_bytes(shapes))} "
        f"({recipe.checkpoint.keep_last} are kept)",
        *_evaluation(plan),
        *_unplanned(shapes),
        "",
        "Assumed (every line is a flag, - for _; bytes, bytes/s, FLOP/s, seconds):",
        *(f"  {line}" for line in cluster.assumptions()),
        "Every row of training and calibration counts at its full length. Sent: ring algorithms; as much is received.",
        "Not counted: evaluation, whose rows are not read here, but for the time of a pass; baselines, each of which "
        "loads and trains anew.",
    ]
    return "\n".join(lines)


def _unplanned(shapes: Shapes) -> list[str]:
    """What a plan of Null-LoRA leaves out."""
    if not shapes.adapter.null_lora:
        return []
    return [
        "null_lora: counted with null_dim directions a side and the whole rank in every module, which weights may not",
        "have; not counted: the pass that decomposes them (a block's weights and two float64 Gram matrices at a time),",
        "and its result in rank 0's host memory for the whole run",
    ]


def _evaluation(plan: Plan) -> list[str]:
    """What one pass of the recipe's evaluation takes: under sharding it may take longer than the training."""
    section, world = plan.recipe.evaluation, plan.cluster.gpus
    lines = []

    def planned(rows: int, length: int) -> EvaluationPass:
        knobs = knobs_of(plan.recipe)
        return evaluation_pass(plan.recipe, plan.shapes, plan.cluster, knobs, rows=rows, length=length)

    if section.adaptation is not None or section.retention:
        one = planned(section.batch_size, min(section.max_length, plan.recipe.data.max_length))
        lines.append(
            f"evaluation: {_time(one.seconds)} for {one.rows * world:,} questions of {one.length} tokens, {one.rows} a "
            f"rank; {_gathered(one)}"
        )
    if section.lm_eval is not None:
        one = planned(section.lm_eval.batch_size, 1)
        lines.append(
            f"evaluation.lm_eval: {_time(one.seconds)} for each token that is written, in {one.rows * world:,} answers "
            f"at once, {one.rows} a rank; {_gathered(one)}; {gb(one.cache)} of keys and values a rank for every token "
            "of these"
        )
    return lines


def _gathered(one: EvaluationPass) -> str:
    return f"{gb(one.kept)} of weights stay gathered" if one.kept else f"{gb(one.sent)} sent by a rank"


def _faster(plan: Plan, rows: int) -> list[str]:
    """What the largest micro-batch would change: every weight is gathered once a micro-batch, whatever its rows."""
    if rows <= plan.recipe.train.micro_batch_size:
        return []
    now, world = plan.phase("train"), plan.cluster.gpus
    then = make_plan(changed(plan.recipe, train__micro_batch_size=rows), plan.shapes, plan.cluster).phase("train")
    return [
        f"  train.micro_batch_size={rows} instead of {plan.recipe.train.micro_batch_size}: a step in "
        f"{_time(then.seconds)} instead of {_time(now.seconds)}, {gb(then.sent(world))} sent by a rank instead of "
        f"{gb(now.sent(world))}"
    ]


def _texts(plan: Plan) -> memory.Texts:
    return memory.Texts.of(plan.recipe)


def _parts(phase: Phase, world_size: int) -> list[str]:
    lines = []
    for where, parts in (("GPU", phase.gpu), ("host", phase.host)):
        large = [f"{name} {gb(size)}" for name, size in sorted(parts.items(), key=lambda p: -p[1]) if size >= 1e6]
        if large:
            lines.append(f"  {where:<5} {', '.join(large)}")
    for one in phase.wire:
        lines.append(
            f"  wire  {one.collective}: {one.calls:,.0f} calls, payload {gb(one.bytes)}, "
            f"{gb(one.sent(world_size))} sent and received by a rank"
        )
    return lines


def _time(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"
