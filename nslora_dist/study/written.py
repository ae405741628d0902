"""How a figure is written in a table of the study."""

from collections.abc import Mapping
from typing import Any

NONE = "–"


def score(value: float | None) -> str:
    """0.862; a dash for what could not be computed."""
    return NONE if value is None else f"{value:.3f}"


def small(found: Mapping[str, Any]) -> str:
    """As ``interval``, of values over decades."""
    return interval(found, form=".2g")


def interval(found: Mapping[str, Any], *, form: str = ".3f") -> str:
    """A ``statistics.Interval``: 0.862 [0.648, 1.000]; or, where a resample could not be computed, 0.270 (67%)."""
    value, low, high = found["value"], found["low"], found["high"]
    if value is None:
        return NONE
    if low is None:
        return f"{value:{form}}" if found["share"] == 1 else f"{value:{form}} ({found['share']:.0%})"
    return f"{value:{form}} [{low:{form}}, {high:{form}}]"
