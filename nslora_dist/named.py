"""Whether a name in a recipe means something on this machine or on the hub, said aloud where it could mean both."""

import logging
import re
from functools import cache
from pathlib import Path

from nslora_dist import dist

log = logging.getLogger("nslora_dist")

HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
"""``name`` or ``owner/name``."""
FILES = (".json", ".jsonl", ".ndjson", ".parquet", ".safetensors", ".csv", ".txt")
"""Endings with which a name means a file to everybody."""


def means_local(path: str) -> bool:
    """Whether ``path`` can be nothing but a local one: absolute, or written with a leading dot or tilde."""
    return path.startswith(("/", ".", "~"))


def is_local(path: str, *, key: str) -> bool:
    """Whether ``path`` is taken from this machine; else it is a name on the hub, or nothing at all.

    What exists here is local, and ``./x`` never is anything else. A name that could have meant the other is logged,
    once.

    Args:
        path: as the recipe has it.
        key: its place in the recipe, for the message.
    """
    there = Path(path).exists()
    if not means_local(path) and dist.is_main():
        _say(path, key, there)
    return there or means_local(path)


@cache
def _say(path: str, key: str, there: bool) -> None:
    if HUB_NAME.fullmatch(path) is None or path.endswith(FILES):
        return
    here = Path(path)
    if there:
        log.info(
            "%s %s: taken from this machine (%s), not from the hub, where that could be a name too; write ./%s to say "
            "so, or start from another folder to take the hub's",
            *(key, path, here.resolve(), path),
        )
    elif len(here.parts) > 1 and here.parent.exists():
        log.info(
            "%s %s: taken as a name on the hub, for %s is there and holds no %s; write ./%s for a local path",
            *(key, path, here.parent.resolve(), here.name, path),
        )
