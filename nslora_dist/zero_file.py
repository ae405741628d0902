"""A DeepSpeed file holds ZeRO knobs alone: what the recipe says stands in the recipe."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

WRITERS = ("tensorboard", "csv_monitor", "wandb", "comet", "flops_profiler", "autotuning", "nebula")
"""Parts of DeepSpeed that write to places, or send to services, that the file names."""


DECIDED_BY = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size",
    "gradient_clipping": "train.max_grad_norm",
    "bf16": "base_model.dtype",
    "fp16": "base_model.dtype",
    "zero_optimization": "engine.name",
    "optimizer": "train.learning_rate, train.betas and train.weight_decay",
    "scheduler": "train.schedule and train.warmup_ratio",
    "steps_per_print": "train.log_every",
}
"""DeepSpeed section or key → what in the recipe decides it."""


def read_zero_config(name: str, decided: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the file and refuses what contradicts the recipe, or would be replaced without a word.

    Args:
        name: the file.
        decided: DeepSpeed key, dotted where the rest of its section is the file's → the value that it has whatever the
            file says; a mapping is its whole section.

    Returns:
        The DeepSpeed settings of the file.

    Raises:
        ValueError: no such file, no JSON object, another stage than 3, or a value that is decided otherwise.
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
    for key, value, wanted in _decided_values(settings, decided):
        if value is None or value == wanted:
            continue
        by = DECIDED_BY.get(key.partition(".")[0])
        if wanted is None:
            said = "which is no ZeRO knob"
        else:
            said = f"the recipe says {wanted!r}" if by else f"and is always {wanted!r} here"
        decides = f" ({by} decides it)" if by else ""
        raise ValueError(f"engine.config {path}: {key} is {value!r}, {said}{decides}; take it out there")
    for key in WRITERS:
        if key in settings:
            raise ValueError(
                f"engine.config {path}: '{key}' writes files of its own outside output_dir; take it out there"
            )
    for key in ("optimizer", "scheduler", "gradient_accumulation_steps", "steps_per_print"):
        if key in settings:
            raise ValueError(
                f"engine.config {path}: '{key}' is set by the recipe's train section ({DECIDED_BY[key]}); "
                "take it out there"
            )
    return settings


def _decided_values(settings: Mapping[str, Any], decided: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, the file's value, the decided one); None where either says nothing."""
    for key, wanted in decided.items():
        value: Any = settings
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if isinstance(value, dict) and isinstance(wanted, dict):
            yield from ((f"{key}.{part}", found, wanted.get(part)) for part, found in value.items())
        else:
            yield key, value, wanted
