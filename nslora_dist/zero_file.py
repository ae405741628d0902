"""A DeepSpeed file holds ZeRO knobs alone: what the recipe says stands in the recipe."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

WRITERS = ("tensorboard", "csv_monitor", "wandb", "comet", "flops_profiler", "autotuning", "nebula")
"""Parts of DeepSpeed that write to places, or send to services, that the file names."""


def read_zero_config(name: str, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the file and refuses what contradicts the recipe.

    Args:
        name: the file.
        recipe: dotted DeepSpeed key → the value that the recipe comes to.

    Returns:
        The DeepSpeed settings of the file.

    Raises:
        ValueError: no such file, no JSON object, another stage than 3, or a value that the recipe sets otherwise.
    """
    path = Path(name)
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"engine.config {path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"engine.config {path}: not JSON ({error})") from error
    if not isinstance(settings, dict):
        raise ValueError(f"engine.config {path}: must hold a JSON object")
    for key, wanted in recipe.items():
        value: Any = settings
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None and value != wanted:
            raise ValueError(f"engine.config {path}: {key} is {value!r}, the recipe says {wanted!r}; take it out there")
    for key in WRITERS:
        if key in settings:
            raise ValueError(
                f"engine.config {path}: '{key}' writes files of its own outside output_dir; take it out there"
            )
    for key in ("optimizer", "scheduler", "gradient_accumulation_steps"):
        if key in settings:
            raise ValueError(f"engine.config {path}: '{key}' is set by the recipe's train section; take it out there")
    return settings
