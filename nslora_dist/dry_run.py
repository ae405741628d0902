"""What a recipe comes to, from its model's config alone: input groups, adapter shapes, parameter counts."""

from collections import Counter

from nslora_dist.base_config import planning_config
from nslora_dist.base_model import build_empty
from nslora_dist.frozen import FrozenLinear
from nslora_dist.input_groups import input_groups, target_groups
from nslora_dist.recipe import Recipe


def describe(recipe: Recipe) -> str:
    """The resolved recipe and its sizes, for a person to read.

    Raises:
        UserError: the config cannot be had, or the recipe does not fit the model.
    """
    config = planning_config(recipe.base_model)
    model = build_empty(recipe.base_model, config)
    groups = target_groups(input_groups(model), recipe.adapter)
    rank = recipe.adapter.rank
    base = 0
    for module in model.modules():
        if isinstance(module, FrozenLinear):  # a 4-bit weight's own shape counts bytes
            base += module.in_features * module.out_features + (module.out_features if module.bias is not None else 0)
        else:
            base += sum(p.numel() for p in module.parameters(recurse=False))
    if config.tie_word_embeddings:
        base -= model.lm_head.weight.numel()
    kinds: Counter[tuple[str, int, tuple[tuple[str, int], ...]]] = Counter()
    a_count = b_count = 0
    for group in groups:
        members = tuple((m.name.rsplit(".", 1)[1], m.out_features) for m in group.modules)
        kinds[group.modules[0].name.split(".")[3], group.in_features, members] += 1
        a_count += sum(rank * m.in_features for m in group.modules)
        b_count += sum(rank * m.out_features for m in group.modules)
    trained = b_count if recipe.adapter.a_is_frozen else a_count + b_count
    lines = [recipe.to_yaml().rstrip(), "", f"# {type(model).__name__}, {len(model.model.layers)} blocks", ""]
    lines += [f"{'group':<28}{'times':>6}{'d_in':>8}  adapters: lora_A, lora_B"]
    for (_, width, members), times in kinds.items():
        names = "/".join(name for name, _ in members)
        shapes = ", ".join(f"{name} ({rank}, {width}) ({out}, {rank})" for name, out in members)
        lines.append(f"{names:<28}{times:>6}{width:>8}  {shapes}")
    lines += [
        "",
        f"base parameters      {base:>16,}",
        f"adapter parameters   {a_count + b_count:>16,}",
        f"  of these trained   {trained:>16,}  ({trained / base:.3%} of the base)",
    ]
    return "\n".join(lines)
