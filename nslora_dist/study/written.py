"""How a figure is written in a table or on a page of the study."""

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


def number(value: float | None, digits: int = 3) -> str:
    """.862; a dash for what does not exist."""
    if value is None:
        return "–"
    text = f"{value:.{digits}f}"
    return text[1:] if text.startswith("0.") else text


def rate(value: float) -> str:
    """1.5e-2, as a recipe has it."""
    digits, exponent = f"{value:.1e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"
