"""Reads a recipe from YAML with ``section.key=value`` overrides.

Relative paths written ``./x`` or ``../x`` count from the recipe's folder, on the command line from the working folder;
any other name is a local path where one exists and a hub name otherwise.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from nslora_dist.errors import UserError
from nslora_dist.explain import explain, nearest
from nslora_dist.recipe import Recipe
from nslora_dist.yaml_file import parse_yaml, read_yaml

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
PATH_KEYS = {"path", "config", "output_dir", "include_path"}
FILLED = {"name": "the file's name", "output_dir": "`runs/` and the name"}
"""Keys that a file may leave out though a recipe has no default for them → what they get, in words."""
R = TypeVar("R", bound=BaseModel)


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe by its name in ``recipes/`` or by its path, and applies ``section.key=value`` overrides.

    Raises:
        UserError: no such recipe, broken YAML, an unknown key, a wrong type or an impossible combination; the message
            names the value, where it came from and what to do.
    """
    tree, origin, keys = _read_tree(name, overrides)
    if "engine.name" in keys and "engine.config" not in keys:
        engine = tree["engine"]
        if isinstance(engine, dict) and engine.get("name") != "zero3":
            engine.pop("config", None)  # the recipe's file was for the engine that the command line replaces
    return _validated(Recipe, tree, origin, keys)


def load_recipe_as(kind: type[R], name: str, overrides: Sequence[str] = ()) -> R:
    """Reads a recipe of another kind of job, found and overridden as ``load_recipe`` does; raises what it raises."""
    return _validated(kind, *_read_tree(name, overrides))


def _read_tree(name: str, overrides: Sequence[str]) -> tuple[dict[str, Any], str, list[str]]:
    """The YAML with overrides and paths in place, where it was read, and the keys from the command line."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else RECIPES / f"{name}.yaml"
    try:
        found = path.is_file()
    except OSError:  # a name too long for the system
        found = False
    if not found:
        known = sorted(p.stem for p in RECIPES.glob("*.yaml"))
        raise UserError(f"--recipe {name}: no such recipe{nearest(name, known)}; recipes/ has {', '.join(known)}")
    tree = read_yaml(path)
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a recipe is a mapping of sections, this is {type(tree).__name__}")
    _resolve_paths(tree, path.resolve().parent)
    tree.setdefault("name", re.sub(r"[^\w.-]", "_", path.stem).lstrip(".") or "recipe")
    for override in overrides:
        _apply(tree, override)
    tree.setdefault("output_dir", f"runs/{tree['name']}")
    return tree, str(path), [override.split("=", 1)[0] for override in overrides]


def _validated(kind: type[R], tree: dict[str, Any], origin: str, keys: Sequence[str]) -> R:
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise UserError(explain(error, kind, origin=origin, overridden=keys)) from error


def _resolve_paths(tree: Any, folder: Path) -> None:
    """Makes ``./`` and ``../`` paths absolute in place, counted from ``folder``."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            tree[key] = _resolve_path(key, value, folder)
            _resolve_paths(tree[key], folder)


def _resolve_path(key: Any, value: Any, folder: Path) -> Any:
    if key in PATH_KEYS and isinstance(value, str):
        if value.startswith(("./", "../")):
            return str((folder / value).resolve())
        if value.startswith("~"):
            try:
                return str(Path(value).expanduser())
            except RuntimeError as error:
                raise UserError(f"{key} {value}: {error}; give a path without ~") from error
    return value


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise UserError(f"'{override}': an override is written section.key=value")
    try:
        value = parse_yaml(text)
    except ValueError as error:
        raise UserError(f"{override!r}: the value is not readable as YAML ({error}); put it in quotes") from error
    for depth, part in enumerate(parts[:-1], start=1):
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise UserError(f"'{override}': {'.'.join(parts[:depth])} is a value, not a section")
    given = {parts[-1]: value}
    _resolve_paths(given, Path.cwd())
    tree |= given
