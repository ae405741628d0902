"""The run folder: claimed for one recipe, never shared with another's run or somebody's files."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nslora_dist import artifacts, dist, logs
from nslora_dist.errors import UserError, unwritable
from nslora_dist.recipe import Recipe, without_volatile
from nslora_dist.yaml_file import parse_yaml, read_yaml

PARTIAL = ".recipe.yaml.partial"
"""All that a process leaves which dies while it claims a folder."""

BEGUN = ("checkpoints", "arms", "adapter", "baselines")
"""What training leaves; ``arms/base.json`` is there before its first step."""
AFTER_CALIBRATION = re.compile(
    r"(name|data|train|evaluation|adapter\.(alpha|freeze_a|interference_budget|budget_over))(\.|$)"
)
"""Keys that no null space depends on: another value, and what was calibrated before training began still fits."""


def claim_folder(recipe: Recipe) -> None:
    """Makes the run folder this recipe's own; another recipe's, or somebody's files, are left alone.

    The engine may differ, for everything in the folder can move between engines. Where no training has begun, a null
    space lies there at most, and all may differ that it does not depend on (``AFTER_CALIBRATION``).

    Raises:
        UserError: the folder holds something else, a link to somewhere else, or, with ``resume: never``, anything that
            training left; on every rank.
    """
    with dist.together("claiming the output folder"):
        if dist.is_main():
            _claim(Path(recipe.output_dir), recipe)
    logs.open_at(Path(recipe.output_dir))


def _claim(folder: Path, recipe: Recipe) -> None:
    refuse_links(folder)
    known = folder / "recipe.yaml"
    begun = [name for name in BEGUN if (folder / name).exists()]
    if known.is_file():
        theirs, ours = read_yaml(known), without_volatile(parse_yaml(recipe.to_yaml()))
        different = sorted(_differences(without_volatile(theirs) if isinstance(theirs, dict) else {}, ours))
        if not begun:
            different = [key for key in different if not AFTER_CALIBRATION.match(key)]
        if different:
            raise UserError(
                f"output_dir {folder}: holds another recipe's {'run' if begun else 'calibration'} "
                f"({', '.join(different[:3])} differ); give output_dir=another/folder, or move that one away"
            )
        if begun and recipe.resume == "never":
            raise UserError(
                f"resume never: {folder} holds this recipe's run ({', '.join(begun)}); resume=auto goes on from "
                "there, output_dir=another/folder begins anew"
            )
    elif folder.exists() and (not folder.is_dir() or any(path.name != PARTIAL for path in folder.iterdir())):
        raise UserError(f"output_dir {folder}: holds files of no run; give output_dir=another/folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        artifacts.write_text(known, recipe.to_yaml())
    except OSError as error:
        raise unwritable(f"output_dir {folder}", error) from error


def refuse_links(folder: Path) -> None:
    """Nothing is written through a symbolic link inside a run's folder; the folder itself may be one.

    Raises:
        UserError: there is a link; the message names it.
    """
    for parent, folders, files in os.walk(folder):  # which does not follow links
        for name in sorted(folders + files):
            path = Path(parent, name)
            if path.is_symlink():
                raise UserError(
                    f"output_dir {folder}: {path.relative_to(folder)} in it is a symbolic link, and a run writes to no "
                    "place outside its folder; put a copy there, or remove the link"
                )


def _differences(theirs: Any, ours: Any, path: str = "") -> Iterator[str]:
    if not isinstance(theirs, dict) or not isinstance(ours, dict):
        if theirs != ours:
            yield path
        return
    for key in theirs.keys() | ours.keys():
        here = f"{path}.{key}" if path else str(key)
        yield from _differences(theirs.get(key), ours.get(key), here)
