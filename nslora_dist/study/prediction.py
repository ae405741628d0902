"""How interference, measured before any evaluation, goes with forgetting (METHODS.md §1c, §1d)."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from nslora_dist.study.analysis import forgetting, grouped
from nslora_dist.study.settings import Line
from nslora_dist.study.spec import AGGREGATES, FEW, PIECES
from nslora_dist.study.statistics import Array, Interval, over_pairs, safe_below, spearman

LOST = 0.01
"""Of all answers: forgetting above this is a loss."""
ALLOWED = (0.0, 0.05)
MISSING = "all that leave a piece out"
LEAST = 8
"""Cells that a rank correlation is taken over: of fewer it says nothing."""


def predict(lines: Sequence[Line], *, draws: int) -> dict[str, Any]:
    """How interference on calibration texts goes with forgetting.

    Returns:
        ``cells`` whose texts exercise every piece that is asked, with as many sequences as most have. Of these
        ``aggregates`` (each with its correlation across and within arms, and the value it is safe below), ``settings``
        (``rms`` and ``kl``, a size and task at a time) and ``few`` (``rms``, by sequences a source). Of all cells:
        ``probes``, each with its own piece, and ``calibrations``, where the texts may be about something else than
        what is asked.
    """
    covering = [line for line in lines if set(line["covered"]) == set(PIECES)]
    whole = max(grouped(covering, lambda line: line["sequences"]).values(), key=len, default=[])
    by_setting = grouped(whole, lambda line: f"{line['size']}, {line['task']}")
    return {
        "cells": len(whole),
        "aggregates": {name: _aggregate(whole, _measured("calibration", name), draws=draws) for name in AGGREGATES}
        if whole
        else {},
        "settings": {
            name: {"cells": len(own)}
            | {kind: _aggregate(own, _measured("calibration", kind), draws=draws) for kind in ("rms", "kl")}
            for name, own in by_setting.items()
        },
        "few": _few(whole, draws=draws),
        "probes": _probes(lines, draws=draws),
        "calibrations": _calibrations(lines, draws=draws),
    }


def _measured(kind: str, name: str) -> Callable[[Line], float | None]:
    def of(line: Line) -> float | None:
        value: float | None = line["interference"][kind][name]
        return value

    return of


def _clusters(lines: Sequence[Line]) -> list[str]:
    """Cells of one variant are alike: whole variants are drawn, or an interval would be too narrow."""
    return [f"{line['size']}/{line['task']}/{line['arm']}/{line['weight_decay']}" for line in lines]


def _aggregate(lines: Sequence[Line], of: Callable[[Line], float | None], *, draws: int) -> dict[str, Any]:
    lines = [line for line in lines if of(line) is not None]
    x = [float(of(line) or 0.0) for line in lines]
    y = [forgetting(line) for line in lines]
    where = _clusters(lines)
    within = {}
    for arm in dict.fromkeys(line["arm"] for line in lines):
        own = [place for place, line in enumerate(lines) if line["arm"] == arm]
        if len(own) >= LEAST:
            within[arm] = spearman(np.array(x)[own], np.array(y)[own])
    known = [value for value in within.values() if value is not None]

    def safe(allowed: float) -> Interval:
        return over_pairs(x, y, lambda a, b: safe_below(a, b, lost=LOST, allowed=allowed), draws=draws, clusters=where)

    return {
        "across": asdict(over_pairs(x, y, spearman, draws=draws, clusters=where)),
        "within": within,
        "within_mean": float(np.mean(known)) if known else None,
        "safe_below": {f"{allowed:g}": asdict(safe(allowed)) for allowed in ALLOWED},
    }


def _few(lines: Sequence[Line], *, draws: int) -> dict[str, Any]:
    """Sequences a source → how well interference on the first so many tells, of the same cells each time."""
    same = [line for line in lines if len(line["interference"]["few"]) == len(FEW)]
    if not same:
        return {}
    found = {str(count): _aggregate(same, _measured("few", str(count)), draws=draws) for count in FEW}
    return found | {str(same[0]["sequences"]): _aggregate(same, _measured("calibration", "rms"), draws=draws)}


def _calibrations(lines: Sequence[Line], *, draws: int) -> dict[str, Any]:
    """Each calibration with cells enough; and all together that leave out a piece of what is asked."""
    by_name = grouped(lines, lambda line: line["calibration"])
    by_name[MISSING] = [line for line in lines if set(line["covered"]) != set(PIECES)]
    return {name: _calibration(own, draws=draws) for name, own in by_name.items() if len(own) >= LEAST}


def _calibration(lines: Sequence[Line], *, draws: int) -> dict[str, Any]:
    """Of the cells of one calibration: what interference on its texts says of all that is asked, and what probes do."""
    where = _clusters(lines)
    y = [forgetting(line) for line in lines]
    own = [float(line["interference"]["calibration"]["rms"]) for line in lines]

    def probes(kind: str) -> list[float]:
        return [float(np.mean([probe[kind] for probe in line["interference"]["probes"].values()])) for line in lines]

    return {
        "cells": len(lines),
        "covered": sorted({piece for line in lines for piece in line["covered"]}, key=PIECES.index),
        "calibration": asdict(over_pairs(own, y, spearman, draws=draws, clusters=where)),
        "probes": asdict(over_pairs(probes("rms"), y, spearman, draws=draws, clusters=where)),
        "probes_kl": asdict(over_pairs(probes("kl"), y, spearman, draws=draws, clusters=where)),
    }


def _probes(lines: Sequence[Line], *, draws: int) -> dict[str, Any]:
    """Each probe with the forgetting of its own piece, over all cells: by interference (rms) and by divergence."""
    pieces = list(lines[0]["interference"]["probes"])

    def pairs(kind: str, own: Sequence[str]) -> tuple[list[float], list[float], list[str]]:
        of_line = [(line, piece) for line in lines for piece in own]
        x = [float(line["interference"]["probes"][piece][kind]) for line, piece in of_line]
        return x, [forgetting(line, piece) for line, piece in of_line], [line["id"] for line, _ in of_line]

    def correlation(kind: str, own: Sequence[str]) -> dict[str, Any]:
        x, y, where = pairs(kind, own)
        return asdict(over_pairs(x, y, spearman, draws=draws, clusters=where))

    def safe(a: Array, b: Array) -> float | None:
        return safe_below(a, b, lost=LOST, allowed=ALLOWED[-1])

    by_piece: dict[str, Any] = {}
    for piece in pieces:
        x, y, _ = pairs("rms", [piece])
        by_piece[piece] = {
            "spearman": correlation("rms", [piece]),
            "kl": correlation("kl", [piece]),
            "safe_below": asdict(over_pairs(x, y, safe, draws=draws)),
        }
    return {"all": correlation("rms", pieces), "all_kl": correlation("kl", pieces), "by_piece": by_piece}
