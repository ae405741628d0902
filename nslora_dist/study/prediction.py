"""How interference, measured before any evaluation, goes with forgetting (docs/methods.md §1c, §1d)."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from nslora_dist.study.elsewhere import LEFT_OUT
from nslora_dist.study.points import forgetting, grouped, on_worst_probe
from nslora_dist.study.settings import Line
from nslora_dist.study.spec import AGGREGATES, FEW, PIECES, Study, StudyArm
from nslora_dist.study.statistics import Array, Interval, over_pairs, safe_below, spearman

LOST = 0.01
"""Of all answers: forgetting above this is a loss."""
ALLOWED = (0.0, 0.05)
MISSING = "all that leave a piece out"
KEYS = ("size", "task", "arm")
LEAST = 8
"""Cells that a rank correlation is taken over: of fewer it says nothing."""


def predict(lines: Sequence[Line], study: Study, *, draws: int) -> dict[str, Any]:
    """How interference on calibration texts goes with forgetting.

    Returns:
        ``cells`` whose texts exercise every piece that is asked, with as many sequences as most have. Of these
        ``aggregates`` (each with its correlation across and within arms, and the value it is safe below), ``settings``
        (``rms`` and ``kl``, a size and task at a time) and ``few`` (``rms``, by sequences a source). Of all cells:
        ``probes``, each with its own piece, ``limit``, the divergence on the probes below which nothing is lost, and
        ``calibrations``, where the texts may be about something else than what is asked.
    """
    whole = exercising(lines)
    by_setting = grouped(whole, lambda line: f"{line['size']}, {line['task']}")
    apart = {name for name, arm in study.arms.items() if in_null_space(arm)}

    def aggregate(own: Sequence[Line], kind: str) -> dict[str, Any]:
        return _aggregate(own, _over_all_modules(whole, kind), apart, draws=draws)

    return {
        "cells": len(whole),
        "aggregates": {name: aggregate(whole, name) for name in AGGREGATES} if whole else {},
        "settings": {
            name: {"cells": len(own)} | {kind: aggregate(own, kind) for kind in ("rms", "kl")}
            for name, own in by_setting.items()
        },
        "few": _few(whole, apart, draws=draws),
        "probes": _probes(lines, draws=draws),
        "limit": _limit(lines),
        "calibrations": _calibrations(lines, draws=draws),
    }


def exercising(lines: Sequence[Line]) -> list[Line]:
    """Those whose texts exercise every piece that is asked, with as many sequences a source as most of them have."""
    covering = [line for line in lines if set(line["covered"]) == set(PIECES)]
    return max(grouped(covering, lambda line: line["sequences"]).values(), key=len, default=[])


def in_null_space(arm: StudyArm) -> bool:
    """Whether all that an arm may learn lies in a null space, of activations or of weights."""
    return arm.section.method == "null_lora" or (arm.section.method == "lora_null" and arm.section.a_is_frozen)


def _over_all_modules(lines: Sequence[Line], name: str) -> Callable[[Line], float | None]:
    """An aggregate of a line's interference, ``rms`` and ``mean`` over every module that arms of its base adapt.

    Null-LoRA leaves out the modules whose weights have no null space: it disturbs nothing there, and that counts.
    """
    most: dict[str, int] = {}
    for line in lines:
        most[line["size"]] = max(most.get(line["size"], 0), line["adapted_modules"])
    power = {"rms": 0.5, "mean": 1.0}.get(name, 0.0)

    def of(line: Line) -> float | None:
        value = line["interference"]["calibration"][name]
        share = float(line["adapted_modules"] / most[line["size"]])
        return None if value is None else float(value) * share**power

    return of


def _of_few(count: int) -> Callable[[Line], float | None]:
    return lambda line: float(line["interference"]["few"][str(count)])


def _clusters(lines: Sequence[Line]) -> list[str]:
    """Cells of one variant are alike: whole variants are drawn, or an interval would be too narrow."""
    return [f"{line['size']}/{line['task']}/{line['arm']}/{line['weight_decay']}" for line in lines]


def _aggregate(
    lines: Sequence[Line], of: Callable[[Line], float | None], apart: Collection[str], *, draws: int
) -> dict[str, Any]:
    """Rank correlations and safe values; ``apart`` are the arms that the others are also looked at without.

    *Within* is one base, task and arm at a time, so that neither tells anything: an arm's own is the mean over bases
    and tasks, and ``within_mean`` the mean over all of these.
    """
    lines = [line for line in lines if of(line) is not None]
    x = np.array([float(of(line) or 0.0) for line in lines])
    y = np.array([forgetting(line) for line in lines])
    where = np.array(_clusters(lines))
    kept = np.array([line["arm"] in apart for line in lines], dtype=bool)
    every = np.ones(len(lines), dtype=bool)
    found: dict[str, list[float]] = {}
    for own in grouped(range(len(lines)), lambda place: tuple(lines[place][key] for key in KEYS)).values():
        value = spearman(x[own], y[own]) if len(own) >= LEAST else None
        if value is not None:
            found.setdefault(lines[own[0]]["arm"], []).append(value)
    pooled = [value for values in found.values() for value in values]

    def over(chosen: Array, figure: Callable[[Array, Array], float | None]) -> dict[str, Any]:
        return asdict(over_pairs(x[chosen], y[chosen], figure, draws=draws, clusters=where[chosen].tolist()))

    def safe(allowed: float) -> Callable[[Array, Array], float | None]:
        return lambda a, b: safe_below(a, b, lost=LOST, allowed=allowed)

    return {
        "across": over(every, spearman),
        "across_others": over(~kept, spearman),
        "within": {arm: float(np.mean(values)) for arm, values in found.items()},
        "within_mean": float(np.mean(pooled)) if pooled else None,
        # The first cell that loses is the least of a sample: drawn again it can only lie higher, and has no interval.
        "safe_below": {
            f"{allowed:g}": over(every, safe(allowed)) if allowed else asdict(Interval(safe(allowed)(x, y), None, None))
            for allowed in ALLOWED
        },
        "safe_below_in_null_space": over(kept, safe(ALLOWED[-1])),
        "safe_below_others": over(~kept, safe(ALLOWED[-1])),
    }


def _limit(lines: Sequence[Line]) -> dict[str, Any]:
    """The least divergence, on the probe where it is largest, at which a cell lost more than ``LOST``.

    None below it did, by its definition. What such a limit is worth where it was not set: on each base and task the
    cells below the limit of the others.

    Returns:
        ``below`` it, in nats a token, are these ``cells``; ``harmless``, how many lost no more than ``LOST`` at any
        divergence; ``elsewhere``, by what has no say in a table's limit: the least and the greatest of the ``limits``,
        the ``cells`` below them, how many of these ``lost`` more, and the ``most`` that one did. A table for which the
        others set none is passed over.
    """
    x = np.array([on_worst_probe(line, "kl") for line in lines])
    y = np.array([forgetting(line) for line in lines])
    tables = [(str(line["size"]), str(line["task"])) for line in lines]

    def limit(chosen: Any) -> float:
        return float(np.min(x[chosen & (y > LOST)], initial=np.inf))

    elsewhere = {}
    for way, is_out in LEFT_OUT.items():
        lost: list[float] = []
        limits = []
        for own in dict.fromkeys(tables):
            set_there = limit(np.array([not is_out(own, table) for table in tables]))
            if np.isfinite(set_there):
                limits.append(set_there)
                lost += y[np.array([table == own for table in tables]) & (x < set_there)].tolist()
        elsewhere[way] = {
            "limits": [min(limits), max(limits)] if limits else None,
            "cells": len(lost),
            "lost": sum(v > LOST for v in lost),
            "most": max(lost, default=None),
        }
    value = limit(np.ones(len(lines), dtype=bool))
    return {
        "below": asdict(Interval(value if value < np.inf else None, None, None)),
        "cells": int((x < value).sum()),
        "harmless": int((y <= LOST).sum()),
        "elsewhere": elsewhere,
    }


def _few(lines: Sequence[Line], apart: Collection[str], *, draws: int) -> dict[str, Any]:
    """Sequences a source → how well interference on the first so many tells, of the same cells each time."""
    same = [line for line in lines if len(line["interference"]["few"]) == len(FEW)]
    if not same:
        return {}
    kinds = {str(count): _of_few(count) for count in FEW}
    kinds[str(same[0]["sequences"])] = lambda line: float(line["interference"]["calibration"]["rms"])
    return {count: _aggregate(same, of, apart, draws=draws) for count, of in kinds.items()}


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
        return x, [forgetting(line, piece) for line, piece in of_line], _clusters([line for line, _ in of_line])

    def correlation(kind: str, own: Sequence[str]) -> dict[str, Any]:
        x, y, where = pairs(kind, own)
        return asdict(over_pairs(x, y, spearman, draws=draws, clusters=where))

    def safe(a: Array, b: Array) -> float | None:
        return safe_below(a, b, lost=LOST, allowed=ALLOWED[-1])

    by_piece: dict[str, Any] = {}
    for piece in pieces:
        x, y, where = pairs("rms", [piece])
        by_piece[piece] = {
            "spearman": correlation("rms", [piece]),
            "kl": correlation("kl", [piece]),
            "safe_below": asdict(over_pairs(x, y, safe, draws=draws, clusters=where)),
        }
    return {"all": correlation("rms", pieces), "all_kl": correlation("kl", pieces), "by_piece": by_piece}
