"""The run folder: claimed for one recipe, never shared with another's run or somebody's files."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from nslora_dist import artifacts, dist
from nslora_dist.errors import StorageError, UserError
from nslora_dist.recipe import Recipe

VOLATILE = ("engine", "checkpoint", "resume", "output_dir", "train.log_every", "base_model.config")
"""What may differ between two starts of one run: none of it changes a number."""


def claim_folder(recipe: Recipe) -> None:
    """Makes the run folder this recipe's own; another recipe's, or somebody's files, are left alone.

    The engine may differ, for everything in the folder can move between engines.

    Raises:
        UserError: the folder holds something else; on every rank.
    """
    folder = Path(recipe.output_dir)
    with dist.together("claiming the output folder"):
        if not dist.is_main():
            return
        known = folder / "recipe.yaml"
        if known.is_file():
            theirs, ours = yaml.safe_load(known.read_text(encoding="utf-8")), yaml.safe_load(recipe.to_yaml())
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
            raise StorageError(f"output_dir {folder}: cannot be written ({error.strerror})") from error


def _differences(theirs: Any, ours: Any, path: str = "") -> Iterator[str]:
    if not isinstance(theirs, dict) or not isinstance(ours, dict):
        if theirs != ours:
            yield path
        return
    for key in theirs.keys() | ours.keys():
        here = f"{path}.{key}" if path else str(key)
        if here not in VOLATILE:
            yield from _differences(theirs.get(key), ours.get(key), here)
