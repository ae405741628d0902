"""What every launch script does around its one call: arguments, recipe, process group, errors, exit status."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from nslora_dist.quiet import quiet  # before anything that loads PyTorch

# isort: split
from nslora_dist import dist, logs
from nslora_dist.dry_run import describe
from nslora_dist.errors import UserError
from nslora_dist.reasons import described
from nslora_dist.recipe_file import load_recipe

COMMON = ("recipe", "dry_run", "local_rank", "overrides")
"""What every script takes; any other flag is its own."""


def run(
    description: str,
    work: Callable[..., None],
    *,
    load: Callable[[str, Sequence[str]], Any] = load_recipe,
    explain: Callable[[Any], str] = describe,
    flags: Callable[[argparse.ArgumentParser], None] | None = None,
) -> int:
    """Parses the command line and runs ``work`` on every rank.

    Args:
        description: of the script, for ``--help``.
        work: what to do with the recipe on this rank's device; the script's own flags are its keyword arguments.
        load: reads the recipe from its name and the overrides.
        explain: the text of ``--dry-run``.
        flags: adds the script's own flags to the command line.

    Returns:
        The exit status: 0, or one of ``errors.py`` after a one-line error, said by one rank.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--recipe", required=True, help="a name in recipes/, or a path to a YAML file")
    parser.add_argument("--dry-run", action="store_true", help="print what the recipe comes to; no weights")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that replace the recipe's")
    if flags is not None:
        flags(parser)
    # Not allow_abbrev and not intermixed by hand: overrides may stand before and after the flags.
    arguments = parser.parse_intermixed_args()
    own = {name: value for name, value in vars(arguments).items() if name not in COMMON}
    quiet()
    main = int(os.environ.get("RANK", "0")) == 0
    try:
        recipe = load(arguments.recipe, arguments.overrides)
        if arguments.dry_run:
            if main:
                print(explain(recipe))
            return 0
    except Exception as error:  # every rank reads the same, and rank 0 says it
        found = described(error)
        if main:
            logs.say(f"error: {found}")
        return found.status
    try:
        with dist.process_group(**_times(recipe)) as device:
            work(recipe, device, **own)
    except UserError as error:
        if not error.silent:
            logs.say(f"error: {error}")
        return _end(error.status)
    return 0


def _times(recipe: Any) -> dict[str, float]:
    """The recipe's time-outs; a merge recipe has its own, and nothing to put on disk before it leaves."""
    engine, checkpoint = getattr(recipe, "engine", recipe), getattr(recipe, "checkpoint", recipe)
    found = {"timeout_seconds": getattr(engine, "timeout_seconds", None)}
    found["grace_seconds"] = getattr(checkpoint, "grace_seconds", None)
    return {name: value for name, value in found.items() if value is not None}


def _end(status: int) -> int:
    """Ends the process at once where its group failed: an orderly end would wait for ranks that are gone."""
    if dist.failed():
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(status)
    return status
