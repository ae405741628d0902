"""What every launch script does around its one call: arguments, recipe, process group, errors, exit status."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from nslora_dist import dist
from nslora_dist.dry_run import describe
from nslora_dist.errors import EXIT_USER_ERROR, UserError
from nslora_dist.quiet import quiet
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
        The exit status: 0, or 2 after a one-line error that the user can mend.
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
        with dist.process_group() as device:
            work(recipe, device, **own)
    except UserError as error:
        if main:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_USER_ERROR
    return 0
