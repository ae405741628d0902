"""Which of DeepSpeed's ZeRO-3 settings a recipe may take: those with which training is known to be right here."""

from collections.abc import Mapping
from typing import Any

from nslora_dist.explain import nearest

SIZES = {
    "reduce_bucket_size": 1,
    "sub_group_size": 0,
    "stage3_prefetch_bucket_size": 0,
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
}
"""In elements → the least."""
SWITCHES = ("overlap_comm", "contiguous_gradients")
OFFLOADS = ("offload_param", "offload_optimizer")
DEVICES = ("cpu", "none")
KNOWN = ("stage", *SWITCHES, *SIZES, *OFFLOADS)
HARMFUL = {
    "stage3_use_all_reduce_for_fetch_params": "gathers by adding shards up, where 4-bit bytes that read as -0.0 change",
    "zero_quantized_weights": "rounds every weight, 4-bit bytes too, on its way to the other ranks",
    "zero_quantized_nontrainable_weights": "rounds the base a second time, 4-bit bytes too",
    "zero_quantized_gradients": "rounds gradients on their way to the other ranks",
    "zero_hpz_partition_size": "keeps a second copy of every shard, for which loading unit by unit has no place",
    "memory_efficient_linear": "replaces PyTorch's linear in the whole process",
}
"""Setting → what it does that must not be."""


def check_knobs(name: str, settings: Mapping[str, Any]) -> None:
    """Refuses every ZeRO setting that is not known to be right, for most of the others train wrongly without a word.

    Args:
        name: the file, for the message.
        settings: what it holds.

    Raises:
        ValueError: an unknown or harmful setting, or a value that is none of its kind.
    """
    where = f"engine.config {name}: zero_optimization"
    section = settings.get("zero_optimization", {})
    if not isinstance(section, dict):
        raise ValueError(f"{where} is {section!r}; it must hold an object")
    for key, value in section.items():
        here = f"{where}.{key}"
        if key in HARMFUL:
            raise ValueError(f"{here} {HARMFUL[key]}; take it out there")
        if key not in KNOWN:
            known = nearest(key, KNOWN) or f"; known are {', '.join(KNOWN)}"
            raise ValueError(f"{here}: training is not known to be right with it; take it out there{known}")
        if key in OFFLOADS and value is not None:
            _check_offload(here, value)
        elif key in SWITCHES:
            _check_switch(here, value)
        elif key in SIZES:
            whole = isinstance(value, int | float) and not isinstance(value, bool) and float(value).is_integer()
            if not whole or value < SIZES[key]:
                raise ValueError(f"{here} is {value!r}; it must be a number of elements from {SIZES[key]}")


def _check_offload(where: str, section: Any) -> None:
    if not isinstance(section, dict):
        raise ValueError(f"{where} is {section!r}; it must hold an object")
    for key, value in section.items():
        if key == "pin_memory":
            _check_switch(f"{where}.{key}", value)
        elif key != "device":
            raise ValueError(f"{where}.{key}: only device and pin_memory are known to be right; take it out there")
        elif value not in DEVICES:
            # Of what DeepSpeed swaps to disk neither checkpoints nor the interference budget get hold.
            raise ValueError(f"{where}.device is {value!r}; it must be {' or '.join(map(repr, DEVICES))}")


def _check_switch(where: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{where} is {value!r}; it must be true or false")
