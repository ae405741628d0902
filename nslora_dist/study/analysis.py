"""From cells' lines to the figures of the summary: frontiers by method, and forgetting against interference."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from nslora_dist.study.spec import AGGREGATES, PIECES
from nslora_dist.study.statistics import (
    Array,
    Interval,
    area_under_frontier,
    over_pairs,
    over_seeds,
    retention_at,
    safe_band,
    safe_below,
    spearman,
)

Line = dict[str, Any]
SHARES = (0.95, 0.99)
LOST = 0.01
"""Of relative retention: more than this is a loss."""
ALLOWED = (0.0, 0.05)
KEEPS = 0.95


def relative_retention(line: Line) -> float:
    """Retention over the base's own."""
    base = float(line["base"]["retention"])
    return float(line["retention"]) / base if base > 0 else 0.0


def forgetting(line: Line, piece: str | None = None) -> float:
    """The base's retention less the adapter's, of all pieces or of one."""
    if piece is None:
        return float(line["base"]["retention"]) - float(line["retention"])
    return float(line["base"]["retention_by"][piece]) - float(line["retention_by"][piece])


def variant(line: Line) -> str:
    """The method as a comparison names it: arm and weight decay."""
    return f"{line['arm']}, wd {line['weight_decay']:g}"


def grouped(lines: Iterable[Line], key: Callable[[Line], Any]) -> dict[Any, list[Line]]:
    """Lines by a key, in order of appearance."""
    found: dict[Any, list[Line]] = {}
    for line in lines:
        found.setdefault(key(line), []).append(line)
    return found


def analyse(lines: Sequence[Line], *, draws: int = 1000) -> dict[str, Any]:
    """Every figure of the summary, as plain JSON.

    Args:
        lines: of all cells.
        draws: bootstrap resamples.

    Returns:
        ``cells``; ``settings``, one entry a size, task and calibration (an arm that no calibration shapes stands in
        each), with the best adaptation of all and every variant's figures; ``prediction``.
    """
    settings = []
    for (size, task), own in grouped(lines, lambda line: (line["size"], line["task"])).items():
        calibrations = list(dict.fromkeys(line["calibration"] for line in own))
        # One yardstick for all calibrations of a task: the best that any arm learned, on average over its seeds.
        best = max(float(m["adaptation"]) for m in _points(own))
        for calibration in calibrations:
            chosen = of_calibration(own, calibration)
            settings.append(
                {
                    "size": size,
                    "task": task,
                    "calibration": calibration,
                    "best_adaptation": best,
                    "base": own[0]["base"],
                    "variants": {
                        name: _variant(found, best=best, draws=draws)
                        for name, found in sorted(grouped(chosen, variant).items())
                    },
                }
            )
    return {"cells": len(lines), "settings": settings, "prediction": predict(lines, draws=draws)}


def of_calibration(lines: Iterable[Line], calibration: str) -> list[Line]:
    """The lines of a calibration, and of the arms that none shapes one line a rate and seed, whatever was measured."""
    found: dict[tuple[Any, ...], Line] = {}
    for line in lines:
        here = line["calibration"] == calibration
        if not here and shaped(line):
            continue
        key = (variant(line), line["learning_rate"], line["seed"])
        if here or key not in found:
            found[key] = line
    return list(found.values())


def shaped(line: Line) -> bool:
    """Whether the calibration texts shaped the adapter."""
    return line["method"] in ("lora_null", "corda")


def _points(lines: Sequence[Line]) -> list[dict[str, float]]:
    """Means over seeds, one a learning rate of a variant and calibration."""
    found = []
    for own in grouped(lines, lambda line: (variant(line), line["calibration"], line["learning_rate"])).values():
        task = np.array([float(line["adaptation"]) for line in own])
        kept = np.array([relative_retention(line) for line in own])
        found.append(
            {
                "learning_rate": float(own[0]["learning_rate"]),
                "seeds": len(own),
                "adaptation": float(task.mean()),
                "retention": float(kept.mean()),
                "adaptation_spread": float(task.std()),
                "retention_spread": float(kept.std()),
                "interference": float(np.mean([line["interference"]["calibration"]["rms"] for line in own])),
                "diverged": sum(line["diverged"] is not None for line in own),
            }
        )
    return sorted(found, key=lambda point: float(point["learning_rate"]))


def _variant(lines: Sequence[Line], *, best: float, draws: int) -> dict[str, Any]:
    base = lines[0]["base"]
    start = float(base["adaptation"])
    points = _points(lines)
    values = _by_seed(lines)  # (seeds, 2, rates): whole seeds alone

    def area(mean: Array) -> float:
        return area_under_frontier([start, *mean[0]], [1.0, *mean[1]])  # not to train at all is a setting, too

    def kept_at(target: float) -> Interval:
        return over_seeds(values, lambda mean: retention_at(mean[0], mean[1], target=target), draws=draws)

    figures: dict[str, Any] = {
        "points": points,
        "seeds": len(values),
        "method": lines[0]["method"],
        "matched": lines[0]["matched"],
        "rank": lines[0]["rank"],
        "trained_parameters": lines[0]["trained_parameters"],
        "seconds": float(np.mean([line["seconds"] for line in lines])),
        "processor_seconds": float(np.mean([line["processor_seconds"] for line in lines])),
        "best_adaptation": max(float(point["adaptation"]) for point in points),
        "area": asdict(over_seeds(values, area, draws=draws)),
        "retention_at": {f"{share:g}": asdict(kept_at(share * best)) for share in SHARES},
        "band": safe_band(
            sorted({float(line["learning_rate"]) for line in lines if line["seed"] in _seeds(lines)}),
            *values.mean(0),
            learns=SHARES[0] * best,
            keeps=KEEPS,
        ),
    }
    chosen = _chosen(points, target=SHARES[0] * best)
    figures["chosen"] = chosen
    if chosen is not None:
        own = [line for line in lines if float(line["learning_rate"]) == chosen["learning_rate"]]
        figures["chosen_by_piece"] = {
            piece: float(np.mean([line["retention_by"][piece] for line in own])) for piece in lines[0]["retention_by"]
        }
        figures["covered"] = own[0]["covered"] if shaped(own[0]) else []
    return figures


def _seeds(lines: Sequence[Line]) -> list[int]:
    """The seeds with every learning rate that any seed has; where there is none, the fullest one."""
    rates = {line["learning_rate"] for line in lines}
    by_seed = {
        seed: {line["learning_rate"] for line in own} for seed, own in grouped(lines, lambda x: x["seed"]).items()
    }
    whole = [seed for seed, own in by_seed.items() if own == rates]
    return whole or [max(by_seed, key=lambda seed: len(by_seed[seed]))]


def _by_seed(lines: Sequence[Line]) -> Array:
    """(seeds, 2, rates): adaptation and relative retention."""
    found = []
    for seed in _seeds(lines):
        own = sorted((line for line in lines if line["seed"] == seed), key=lambda line: float(line["learning_rate"]))
        found.append([[float(x["adaptation"]) for x in own], [relative_retention(x) for x in own]])
    return np.array(found)


def _chosen(points: Sequence[Mapping[str, Any]], *, target: float) -> Mapping[str, Any] | None:
    """The setting that keeps most among those that reach the target."""
    reached = [point for point in points if float(point["adaptation"]) >= target - 1e-12]
    return max(reached, key=lambda point: float(point["retention"])) if reached else None


def predict(lines: Sequence[Line], *, draws: int) -> dict[str, Any]:
    """How interference on calibration texts goes with forgetting, by aggregate; and probe by probe.

    Only cells whose texts exercise every piece that is asked take part in ``aggregates``: interference on text about
    something else cannot tell. ``probes`` takes all cells, each probe with its own piece.
    """
    whole = [line for line in lines if set(line["covered"]) == set(PIECES)]
    return {
        "cells": len(whole),
        "aggregates": {name: _aggregate(whole, name, draws=draws) for name in AGGREGATES} if whole else {},
        "probes": _probes(lines, draws=draws),
    }


def _aggregate(lines: Sequence[Line], name: str, *, draws: int) -> dict[str, Any]:
    lines = [line for line in lines if line["interference"]["calibration"][name] is not None]
    x = [float(line["interference"]["calibration"][name]) for line in lines]
    y = [forgetting(line) for line in lines]
    where = [f"{line['size']}/{line['task']}/{line['arm']}/{line['weight_decay']}" for line in lines]
    within = {}
    for arm in dict.fromkeys(line["arm"] for line in lines):
        own = [place for place, line in enumerate(lines) if line["arm"] == arm]
        within[arm] = spearman(np.array(x)[own], np.array(y)[own])
    known = [value for value in within.values() if value is not None]

    def safe(allowed: float) -> Interval:
        return over_pairs(x, y, lambda a, b: safe_below(a, b, lost=LOST, allowed=allowed), draws=draws, clusters=where)

    return {
        # Cells of one variant are alike: whole variants are drawn, or the interval would be too narrow.
        "across": asdict(over_pairs(x, y, spearman, draws=draws, clusters=where)),
        "within": within,
        "within_mean": float(np.mean(known)) if known else None,
        "safe_below": {f"{allowed:g}": asdict(safe(allowed)) for allowed in ALLOWED},
    }


def _probes(lines: Sequence[Line], *, draws: int) -> dict[str, Any]:
    pairs = [
        (piece, float(line["interference"]["probes"][piece]["rms"]), forgetting(line, piece), line["id"])
        for line in lines
        for piece in line["interference"]["probes"]
    ]
    everything = over_pairs(
        [p[1] for p in pairs], [p[2] for p in pairs], spearman, draws=draws, clusters=[p[3] for p in pairs]
    )
    by_piece: dict[str, Any] = {}
    for piece in dict.fromkeys(p[0] for p in pairs):
        x, y = [p[1] for p in pairs if p[0] == piece], [p[2] for p in pairs if p[0] == piece]
        by_piece[piece] = {
            "spearman": asdict(over_pairs(x, y, spearman, draws=draws)),
            "safe_below": asdict(
                over_pairs(x, y, lambda a, b: safe_below(a, b, lost=LOST, allowed=ALLOWED[-1]), draws=draws)
            ),
        }
    return {"all": asdict(everything), "by_piece": by_piece}
