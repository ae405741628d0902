"""What fits, and what to change when nothing does."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from pydantic import ValidationError

from nslora_dist.errors import UserError
from nslora_dist.explain import explain
from nslora_dist.plan.cluster import Cluster
from nslora_dist.plan.phase import Plan, knobs_of
from nslora_dist.plan.phases import make_plan
from nslora_dist.plan.shapes import Shapes, shapes_of
from nslora_dist.plan.training import train_memory
from nslora_dist.recipe import Recipe

OFFLOAD = Path(__file__).resolve().parents[2] / "ds_configs" / "zero3_offload.json"


def changed(recipe: Recipe, **changes: object) -> Recipe:
    """A copy with values replaced, ``section__key=value``, checked as a recipe is.

    Raises:
        UserError: no such recipe may be.
    """
    tree = recipe.model_dump()
    for key, value in changes.items():
        *sections, last = key.split("__")
        place = tree
        for section in sections:
            place = place[section]
        place[last] = value
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise UserError(explain(error, Recipe)) from error


def largest_micro_batch(recipe: Recipe, shapes: Shapes, cluster: Cluster) -> int:
    """Rows of the largest micro-batch whose training fits and that the recipe allows, or 0."""
    knobs = knobs_of(recipe)
    best = 0
    for rows in range(1, recipe.train.global_batch_size // cluster.gpus + 1):
        if recipe.train.global_batch_size % (rows * cluster.gpus):
            continue
        try:
            tried = changed(recipe, train__micro_batch_size=rows)
        except UserError:  # a baseline's batch does not divide by it, or a packed one must have one row
            continue
        if sum(train_memory(tried, shapes, cluster, knobs)[0].values()) > cluster.usable:
            break
        best = rows
    return best


def remedies(recipe: Recipe, cluster: Cluster) -> Iterator[tuple[str, Recipe, Cluster]]:
    """Changes to try, each on top of those before: cheap in time first, more machines late, offloading last."""
    train, base, section = recipe.train, recipe.base_model, recipe.calibration
    if not train.activation_checkpointing:
        recipe = changed(recipe, train__activation_checkpointing=True)
        yield "train.activation_checkpointing=true", recipe, cluster
    if train.micro_batch_size > 1:
        recipe = changed(recipe, train__micro_batch_size=1)
        yield "train.micro_batch_size=1", recipe, cluster
    if section.batch_size > 1:
        recipe = changed(recipe, calibration__batch_size=1)
        yield "calibration.batch_size=1", recipe, cluster
    if section.hidden_states == "device":
        recipe = changed(recipe, calibration__hidden_states="host")
        yield "calibration.hidden_states=host", recipe, cluster
    if section.solver.placement == "rank0" and cluster.gpus > 1:
        recipe = changed(recipe, calibration__solver__placement="spread")
        yield "calibration.solver.placement=spread", recipe, cluster
    if base.quantization == "none":
        with suppress(UserError):  # not every adapter can stand on a packed base
            recipe = changed(recipe, base_model__quantization="nf4")
            yield "base_model.quantization=nf4", recipe, cluster
    gpus = cluster.gpus
    if recipe.engine.name != "single":
        while gpus < 1024 and gpus < 8 * cluster.gpus and recipe.train.global_batch_size % (2 * gpus) == 0:
            gpus *= 2
            yield f"--gpus {gpus}", recipe, replace(cluster, gpus=gpus)
        cluster = replace(cluster, gpus=gpus)
    try:
        recipe = changed(recipe, engine__name="zero3", engine__config=str(OFFLOAD))
    except UserError:
        return
    yield f"engine.name=zero3 engine.config={OFFLOAD}", recipe, cluster


def advise(plan: Plan) -> list[str]:
    """Lines: each remedy on top of the ones before and what it leaves short, up to the first that fits."""
    lines: list[str] = []
    for what, recipe, cluster in remedies(plan.recipe, plan.cluster):
        try:
            tried = make_plan(recipe, shapes_of(recipe), cluster)
        except UserError as error:
            lines.append(f"{what}: not possible here ({error})")
            continue
        short = tried.short_of()
        lines.append(f"{what}: " + ("; ".join(line for _, line in short) if short else "fits"))
        if not short:
            return lines
    return [*lines, "nothing tried fits: shorter data.max_length or calibration.sequence_length, or larger GPUs"]
