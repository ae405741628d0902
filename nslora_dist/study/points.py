"""A setting's means over seeds, and the choice among an arm's settings."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from nslora_dist.study.settings import Line
from nslora_dist.study.statistics import Array

T = TypeVar("T")


def relative_retention(line: Line) -> float:
    """Retention over the base's own."""
    base = float(line["base"]["retention"])
    return float(line["retention"]) / base if base > 0 else 0.0


def most_retention(line: Line) -> float:
    """What ``relative_retention`` can come to: an adapter may answer what the base could not."""
    base = float(line["base"]["retention"])
    return 1.0 / base if base > 0 else 0.0


def forgetting(line: Line, piece: str | None = None) -> float:
    """The base's retention less the adapter's, of all pieces or of one."""
    if piece is None:
        return float(line["base"]["retention"]) - float(line["retention"])
    return float(line["base"]["retention_by"][piece]) - float(line["retention_by"][piece])


def on_worst_probe(line: Line, kind: str) -> float:
    """``rms`` or ``kl`` on the probe where it is largest."""
    return max(float(values[kind]) for values in line["interference"]["probes"].values())


def variant(line: Line) -> str:
    """The method as a comparison names it: arm and weight decay."""
    return f"{line['arm']}, wd {line['weight_decay']:g}"


def grouped(items: Iterable[T], key: Callable[[T], Any]) -> dict[Any, list[T]]:
    """Lines, or anything else, by a key, in order of appearance."""
    found: dict[Any, list[T]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return found


def points(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """Means over seeds, one a learning rate of a variant and calibration."""
    found = []
    for own in grouped(lines, lambda line: (variant(line), line["calibration"], line["learning_rate"])).values():
        task = np.array([float(line["adaptation"]) for line in own])
        kept = np.array([relative_retention(line) for line in own])
        found.append(
            {
                "learning_rate": float(own[0]["learning_rate"]),
                "weight_decay": float(own[0]["weight_decay"]),
                "seeds": len(own),
                "adaptation": float(task.mean()),
                "retention": float(kept.mean()),
                "adaptation_spread": _spread(task),
                "retention_spread": _spread(kept),
                "interference": float(np.mean([line["interference"]["calibration"]["rms"] for line in own])),
                "retention_by": {
                    piece: float(np.mean([line["retention_by"][piece] for line in own]))
                    for piece in own[0]["retention_by"]
                },
                "diverged": sum(line["diverged"] is not None for line in own),
            }
        )
    return sorted(found, key=lambda point: float(point["learning_rate"]))


def _spread(values: Array) -> float | None:
    """The sample's standard deviation; one seed has none."""
    return float(values.std(ddof=1)) if len(values) > 1 else None


def chosen_of(points: Sequence[Mapping[str, Any]], *, target: float) -> Mapping[str, Any] | None:
    """The setting that keeps most among those that reach the target, and of those that keep all, what learns most."""
    reached = [point for point in points if float(point["adaptation"]) >= target - 1e-12]
    return max(reached, key=lambda point: (float(point["retention"]), float(point["adaptation"])), default=None)


def preferred(points: Sequence[Mapping[str, Any]], *, target: float) -> Mapping[str, Any]:
    """The chosen setting; where none reaches the target, the one that learns most."""
    return chosen_of(points, target=target) or max(points, key=lambda point: float(point["adaptation"]))
