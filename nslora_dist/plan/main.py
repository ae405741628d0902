"""``launch/plan.py``: arguments → plan, sweep, plot."""

import argparse
import sys
from dataclasses import fields
from pathlib import Path

from nslora_dist.errors import UserError, unwritable
from nslora_dist.plan.cluster import Cluster, quantity
from nslora_dist.plan.phases import make_plan
from nslora_dist.plan.shapes import shapes_of
from nslora_dist.plan.sweep import sweep, write_csv, write_plot
from nslora_dist.plan.text import describe
from nslora_dist.quiet import quiet
from nslora_dist.recipe_file import load_recipe

PLOTS = (".png", ".pdf", ".svg")


def parser() -> argparse.ArgumentParser:
    """One flag a field of ``Cluster``, beside the recipe and where a sweep goes."""
    made = argparse.ArgumentParser(description="Memory, traffic and time of a recipe on a cluster, on paper.")
    made.add_argument("--recipe", required=True, help="a name in recipes/, or a path to a YAML file")
    for one in fields(Cluster):
        flag, text = one.name.replace("_", "-"), f"{one.metadata['help']}; {one.default:g}"
        made.add_argument(f"--{flag}", metavar="N", help=text)
    made.add_argument("--steps", metavar="N", help="optimizer steps, where the recipe gives epochs")
    made.add_argument("--sweep", type=Path, metavar="CSV", help="writes 1 to 1,024 GPUs there")
    made.add_argument("--plot", type=Path, metavar="PNG", help="draws the same")
    made.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that replace the recipe's")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Prints the plan.

    Returns:
        The exit status: 0, or one of ``errors.py`` after a one-line error.
    """
    given = parser().parse_intermixed_args(arguments)
    quiet()
    try:
        recipe = load_recipe(given.recipe, given.overrides)
        asked = {f.name: getattr(given, f.name) for f in fields(Cluster)}
        asked["steps"] = given.steps
        values = {}
        for name, text in asked.items():
            if text is not None:
                try:
                    values[name] = quantity(text)
                except UserError as error:
                    raise UserError(f"--{name.replace('_', '-')}: {error}") from error
        for name in ("gpus", "gpus_per_node", "steps"):
            if name in values:
                if values[name] < 1 or values[name] % 1:
                    raise UserError(f"--{name.replace('_', '-')} {values[name]:g}: a whole number from 1")
                values[name] = int(values[name])
        steps = int(values.pop("steps")) if "steps" in values else None
        for flag, path in (("--sweep", given.sweep), ("--plot", given.plot)):
            if path is not None and not path.absolute().parent.is_dir():
                raise UserError(f"{flag} {path}: there is no folder {path.absolute().parent}; make it first")
        if given.plot is not None and given.plot.suffix not in PLOTS:
            raise UserError(f"--plot {given.plot}: wanted is a name that ends in {', '.join(PLOTS)}")
        cluster = Cluster(**values)  # type: ignore[arg-type]
        shapes = shapes_of(recipe)
        print(describe(make_plan(recipe, shapes, cluster, steps=steps)))  # noqa: T201
        if given.sweep or given.plot:
            plans = sweep(recipe, shapes, cluster)
            for flag, path, write in (("--sweep", given.sweep, write_csv), ("--plot", given.plot, write_plot)):
                if path is not None:
                    try:
                        write(path, plans)
                    except OSError as error:
                        raise unwritable(f"{flag} {path}", error) from error
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)  # noqa: T201
        return error.status
    return 0
