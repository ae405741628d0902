"""The run folder: claimed for one recipe, never shared with another's run or somebody's files."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nslora_dist import artifacts, dist
from nslora_dist.errors import UserError
from nslora_dist.recipe import Recipe
from nslora_dist.yaml_file import parse_yaml, read_yaml

VOLATILE = ("engine", "checkpoint", "resume", "output_dir", "train.log_every", "base_model.config")
"""What may differ between two starts of one run: none of it changes a number."""


def claim_folder(recipe: Recipe) -> None:
    """Makes the run folder this recipe's own; another recipe's, or somebody's files, are left alone.

    The engine may differ, for everything in the folder can move between engines.

    Raises:
        UserError: the folder holds something else, or a link to somewhere else; on every rank.
    """
    folder = Path(recipe.output_dir)
    with dist.together("claiming the output folder"):
        if not dist.is_main():
            return
        refuse_links(folder)
        known = folder / "recipe.yaml"
        if known.is_file():
            theirs, ours = read_yaml(known), parse_yaml(recipe.to_yaml())
            different = sorted(_differences(theirs, ours))
            if different:
                raise UserError(
                    f"output_dir {folder}: holds another recipe's run ({', '.join(different[:3])} differ); "
                    "give output_dir=another/folder, or move that one away"
                )
        elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"output_dir {folder}: holds files of no run; give output_dir=another/folder")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            artifacts.write_text(known, recipe.to_yaml())
        except OSError as error:
            raise UserError(f"output_dir {folder}: cannot be written ({error.strerror})") from error


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
        if here not in VOLATILE:
            yield from _differences(theirs.get(key), ours.get(key), here)
