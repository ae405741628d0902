"""``launch/plan.py``: arguments → plan, sweep, plot."""

import argparse
import sys
from dataclasses import fields
from pathlib import Path

from nslora_dist.errors import EXIT_USER_ERROR, UserError
from nslora_dist.plan.cluster import Cluster, quantity
from nslora_dist.plan.phases import make_plan
from nslora_dist.plan.shapes import shapes_of
from nslora_dist.plan.sweep import sweep, write_csv, write_plot
from nslora_dist.plan.text import describe
from nslora_dist.quiet import quiet
from nslora_dist.recipe_file import load_recipe


def parser() -> argparse.ArgumentParser:
    """One flag a field of ``Cluster``, beside the recipe and where a sweep goes."""
    made = argparse.ArgumentParser(description="Memory, traffic and time of a recipe on a cluster, on paper.")
    made.add_argument("--recipe", required=True, help="a name in recipes/, or a path to a YAML file")
    for one in fields(Cluster):
        flag, text = one.name.replace("_", "-"), f"{one.metadata['help']}; {one.default:g}"
        made.add_argument(f"--{flag}", metavar="N", help=text)
    made.add_argument("--steps", type=int, help="optimizer steps, where the recipe gives epochs")
    made.add_argument("--sweep", type=Path, metavar="CSV", help="writes 1 to 1,024 GPUs there")
    made.add_argument("--plot", type=Path, metavar="PNG", help="draws the same")
    made.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that replace the recipe's")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Prints the plan.

    Returns:
        The exit status: 0, or 2 after a one-line error that the user can mend.
    """
    given = parser().parse_intermixed_args(arguments)
    quiet()
    try:
        recipe = load_recipe(given.recipe, given.overrides)
        asked = {f.name: getattr(given, f.name) for f in fields(Cluster)}
        values = {name: quantity(text) for name, text in asked.items() if text is not None}
        for name in ("gpus", "gpus_per_node"):
            if name in values:
                if values[name] < 1 or values[name] % 1:
                    raise UserError(f"--{name.replace('_', '-')} {values[name]:g}: a whole number from 1")
                values[name] = int(values[name])
        cluster = Cluster(**values)  # type: ignore[arg-type]
        shapes = shapes_of(recipe)
        print(describe(make_plan(recipe, shapes, cluster, steps=given.steps)))  # noqa: T201
        if given.sweep or given.plot:
            plans = sweep(recipe, shapes, cluster)
            if given.sweep:
                write_csv(given.sweep, plans)
            if given.plot:
                write_plot(given.plot, plans)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)  # noqa: T201
        return EXIT_USER_ERROR
    return 0
