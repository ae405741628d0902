"""What a recipe comes to, from its model's config alone: input groups, adapter shapes, parameter counts."""

from collections import Counter
from dataclasses import replace

from nslora_dist.attach import planned_sizes
from nslora_dist.base_config import check_context, planning_config
from nslora_dist.base_model import build_empty
from nslora_dist.frozen import FrozenLinear
from nslora_dist.input_groups import LinearShape, input_groups, target_groups
from nslora_dist.recipe import Recipe
from nslora_dist.recipe_adapter import AdapterSection


def describe(recipe: Recipe) -> str:
    """The resolved recipe and its sizes, for a person to read.

    Raises:
        UserError: the config cannot be had, or the recipe does not fit the model.
    """
    config = planning_config(recipe.base_model)
    check_context(config, "calibration.sequence_length", recipe.calibration.sequence_length)
    if not recipe.data.packing:
        check_context(config, "data.max_length", recipe.data.max_length)
    model = build_empty(recipe.base_model, config)
    groups = target_groups(input_groups(model), recipe.adapter)
    adapter = recipe.adapter
    base = 0
    for module in model.modules():
        if isinstance(module, FrozenLinear):  # a 4-bit weight's own shape counts bytes
            base += module.in_features * module.out_features + (module.out_features if module.bias is not None else 0)
        else:
            base += sum(p.numel() for p in module.parameters(recurse=False))
    if config.tie_word_embeddings:
        base -= model.lm_head.weight.numel()
    kinds: Counter[tuple[str, int, tuple[LinearShape, ...]]] = Counter()
    frozen = trained = 0
    for group in groups:
        members = tuple(replace(m, name=m.name.rsplit(".", 1)[1]) for m in group.modules)
        kinds[group.modules[0].name.split(".")[3], group.in_features, members] += 1
        for member in group.modules:
            counts = _counts(member, adapter)
            frozen, trained = frozen + counts[0], trained + counts[1]
    lines = [recipe.to_yaml().rstrip(), "", f"# {type(model).__name__}, {len(model.model.layers)} blocks", ""]
    null = adapter.method == "null_lora"
    parts = "lora_A, lora_B, null_in, null_out" if null else "lora_A, lora_B"
    lines += [f"{'group':<28}{'times':>6}{'d_in':>8}  adapters: {parts}"]
    for (_, width, members), times in kinds.items():
        names = "/".join(member.name for member in members)
        shapes = ", ".join(f"{member.name} {_shapes(member, adapter)}" for member in members)
        lines.append(f"{names:<28}{times:>6}{width:>8}  {shapes}")
    lines += [
        "",
        f"base parameters      {base:>16,}",
        f"adapter parameters   {frozen + trained:>16,}",
        f"  of these trained   {trained:>16,}  ({trained / base:.3%} of the base)",
    ]
    if null:
        lines += ["", *_structural(kinds)]
    return "\n".join(lines)


def _shapes(member: LinearShape, adapter: AdapterSection) -> str:
    """The shapes of one module's adapter, for null_lora before the weights' nullity is known."""
    sizes = planned_sizes(member, adapter) if adapter.method == "null_lora" else None
    rank = adapter.rank if sizes is None else sizes.half
    shapes = f"({rank}, {member.in_features}) ({member.out_features}, {rank})"
    if sizes is None:
        return shapes
    return f"{shapes} ({member.in_features}, {sizes.right}) ({member.out_features}, {sizes.left})"


def _counts(member: LinearShape, adapter: AdapterSection) -> tuple[int, int]:
    """Frozen and trained parameters of one module's adapter."""
    d_in, d_out = member.in_features, member.out_features
    if adapter.method == "null_lora":
        sizes = planned_sizes(member, adapter)
        return sizes.right * d_in + sizes.left * d_out, sizes.half * (d_in + d_out)
    of_a, of_b = adapter.rank * d_in, adapter.rank * d_out
    return (of_a, of_b) if adapter.a_is_frozen else (0, of_a + of_b)


def _structural(kinds: Counter[tuple[str, int, tuple[LinearShape, ...]]]) -> list[str]:
    """What the shapes alone say of the weights' null spaces."""
    lines = ["null directions that the shape alone gives; the others depend on adapter.null_threshold and the weights,"]
    lines += ["and where they are fewer than the rank, so is the module's rank:"]
    members = {member for _, _, modules in kinds for member in modules}
    for member in sorted(members, key=lambda member: member.name):
        right = max(0, member.in_features - member.out_features)
        left = max(0, member.out_features - member.in_features)
        lines.append(f"  {member.name:<12} right {right:>7,}  left {left:>7,}")
    return lines
