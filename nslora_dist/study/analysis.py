"""From cells' lines to the figures of the summary: frontiers by method, and curves along anything else."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from nslora_dist.study.cells import cells_of
from nslora_dist.study.spec import Study
from nslora_dist.study.statistics import (
    Array,
    area_under_frontier,
    over_seeds,
    retention_at,
    safe_band,
)

Line = dict[str, Any]
SHARES = (0.95, 0.99)
KEEPS = 0.95
DECAY = "weight_decay"


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


def analyse(lines: Sequence[Line], study: Study, *, draws: int = 1000) -> dict[str, Any]:
    """Every figure of the summary, as plain JSON.

    Args:
        lines: of all cells, with their ``grids``.
        study: whose cells they are.
        draws: bootstrap resamples.

    Returns:
        ``cells``; ``settings``, one entry a size, task and calibration (an arm that no calibration shapes stands in
        each), with the best adaptation of all and the figures of every arm and variant; ``sweeps``, one entry a grid
        along weight decay, size and task, with those of its variants; ``curves``, one entry a grid that varies
        something else than the method, size and task.
    """
    methods, planned = of_methods(lines, study), planned_settings(study)
    settings = []
    for (size, task), own in grouped(methods, lambda line: (line["size"], line["task"])).items():
        calibrations = list(dict.fromkeys(line["calibration"] for line in own))
        # One yardstick for all calibrations of a task: the best that any arm learned, on average over its seeds.
        best = _best_adaptation(own)
        for calibration in calibrations:
            chosen = of_calibration(own, calibration)
            settings.append(
                {
                    "size": size,
                    "task": task,
                    "calibration": calibration,
                    "best_adaptation": best,
                    "base": own[0]["base"],
                    "arms": {
                        name: _arm(found, best=best, draws=draws)
                        | {"planned": planned.get((size, task, calibration, name)) or planned[size, task, None, name]}
                        for name, found in sorted(grouped(chosen, lambda line: line["arm"]).items())
                    },
                    "variants": {
                        name: _variant(found, best=best, draws=draws)
                        for name, found in sorted(grouped(chosen, variant).items())
                    },
                }
            )
    return {
        "cells": len(lines),
        "settings": settings,
        "sweeps": sweeps(lines, study, draws=draws),
        "curves": curves(lines, study),
    }


def of_methods(lines: Iterable[Line], study: Study) -> list[Line]:
    """The lines of the grids that compare methods, and run along nothing else."""
    return [line for line in lines if any(study.grids[grid].along is None for grid in line["grids"])]


def planned_settings(study: Study) -> dict[tuple[str, str, str | None, str], int]:
    """(size, task, calibration, arm) → how many settings the study tunes an arm over; calibration None: any of them."""
    found: dict[tuple[str, str, str | None, str], set[tuple[float, float]]] = {}
    for cell in cells_of(study):
        if any(study.grids[grid].along is None for grid in cell.grids):
            for calibration in (cell.calibration, None):
                own = found.setdefault((cell.size, cell.task, calibration, cell.arm), set())
                own.add((cell.weight_decay, cell.learning_rate))
    return {key: len(settings) for key, settings in found.items()}


def of_first_calibration(settings: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The entries that the headline is about, one a base and task."""
    return [setting for setting in settings if setting["calibration"] == settings[0]["calibration"]]


def whole_arms(setting: Mapping[str, Any]) -> dict[str, Any]:
    """Of one entry of ``settings``, the arms of which all was run: tuned over less, one looks worse than it is."""
    return {name: own for name, own in setting["arms"].items() if own["settings"] >= own["planned"]}


def sweeps(lines: Sequence[Line], study: Study, *, draws: int) -> list[dict[str, Any]]:
    """Of each grid along weight decay: what tuning the learning rate gets out of every decay of every arm."""
    found = []
    for name, (size, task), own in _along(lines, study, lambda along: along == DECAY):
        # The frontiers' yardstick, or more where a decay that only the sweep has learned more.
        all_of_task = [x for x in of_methods(lines, study) if (x["size"], x["task"]) == (size, task)]
        best = max(_best_adaptation(all_of_task), _best_adaptation(own))
        in_order = sorted(own, key=lambda line: (list(study.arms).index(line["arm"]), line["weight_decay"]))
        found.append(
            {"grid": name, "size": size, "task": task, "best_adaptation": best}
            | {
                "variants": {
                    name: _variant(of, best=best, draws=draws) for name, of in grouped(in_order, variant).items()
                }
            }
        )
    return found


def plot_of(found: Mapping[str, Any]) -> str:
    """The file name of a sweep's or a curve's plot."""
    return f"{found['grid']}_{found['size']}_{found['task']}.png"


def curves(lines: Sequence[Line], study: Study) -> list[dict[str, Any]]:
    """Of each grid that runs along anything else: its ``points``, and for a dial how ``monotone`` it is."""
    return [
        {"grid": name} | _curve(own, str(study.grids[name].along))
        for name, _, own in _along(lines, study, lambda along: along not in (None, DECAY))
    ]


def _along(
    lines: Sequence[Line], study: Study, wanted: Callable[[str | None], bool]
) -> Iterator[tuple[str, tuple[str, str], list[Line]]]:
    """Grid, size and task, and lines, of the grids whose ``along`` is wanted."""
    for name, grid in study.grids.items():
        if wanted(grid.along):
            here = [line for line in lines if name in line["grids"]]
            for where, own in grouped(here, lambda line: (line["size"], line["task"])).items():
                yield name, where, own


def _curve(lines: Sequence[Line], along: str) -> dict[str, Any]:
    of_value = grouped(lines, lambda line: value_along(line, along))
    inner = [
        {"value": value} | point
        for value in sorted(of_value, key=lambda value: (isinstance(value, str), value))
        for point in points(of_value[value])
    ]
    curve = {"along": along, "points": inner} | {key: lines[0][key] for key in ("size", "task", "base")}
    if along == "budget":
        of_rate = grouped(inner, lambda point: point["learning_rate"]).values()
        curve["monotone"] = {
            score: max(reversals(own, score) for own in of_rate) for score in ("retention", "adaptation")
        }
    return curve


def value_along(line: Line, along: str) -> Any:
    """Where a line stands in its grid; no budget is an endless one."""
    return (line["budget"] or float("inf")) if along == "budget" else line[along]


def reversals(along: Sequence[Mapping[str, Any]], score: str) -> float:
    """The most by which a score moves against a growing budget: retention up, or adaptation down; 0 is monotone."""
    values = [float(point[score]) for point in along]
    sign = 1.0 if score == "retention" else -1.0
    pairs = [sign * (later - first) for place, first in enumerate(values) for later in values[place + 1 :]]
    return max([0.0, *pairs])


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
                "adaptation_spread": float(task.std()),
                "retention_spread": float(kept.std()),
                "interference": float(np.mean([line["interference"]["calibration"]["rms"] for line in own])),
                "retention_by": {
                    piece: float(np.mean([line["retention_by"][piece] for line in own]))
                    for piece in own[0]["retention_by"]
                },
                "diverged": sum(line["diverged"] is not None for line in own),
            }
        )
    return sorted(found, key=lambda point: float(point["learning_rate"]))


def _best_adaptation(lines: Sequence[Line]) -> float:
    """The most that any setting learned, on average over its seeds."""
    return max((float(point["adaptation"]) for point in points(lines)), default=0.0)


def _arm(lines: Sequence[Line], *, best: float, draws: int) -> dict[str, Any]:
    """An arm with all its settings, learning rates and weight decays alike: what tuning gets out of it."""
    start = float(lines[0]["base"]["adaptation"])
    values = _by_seed(lines)
    chosen = _chosen(points(lines), target=SHARES[0] * best)
    return {
        "seeds": len(values),
        "settings": values.shape[-1],
        "method": lines[0]["method"],
        "matched": lines[0]["matched"],
        "rank": lines[0]["rank"],
        "trained_parameters": lines[0]["trained_parameters"],
        "area": asdict(over_seeds(values, lambda mean: _area(mean, start), draws=draws)),
        "retention_at": {
            f"{share:g}": asdict(over_seeds(values, _kept_at(share * best), draws=draws)) for share in SHARES
        },
        "chosen": chosen,
        "covered": lines[0]["covered"] if shaped(lines[0]) else [],
    }


def _kept_at(target: float) -> Callable[[Array], float | None]:
    return lambda mean: retention_at(mean[0], mean[1], target=target)


def _area(mean: Array, start: float) -> float:
    return area_under_frontier([start, *mean[0]], [1.0, *mean[1]])  # not to train at all is a setting, too


def _variant(lines: Sequence[Line], *, best: float, draws: int) -> dict[str, Any]:
    own_points = points(lines)
    values = _by_seed(lines)  # (seeds, 2, rates): whole seeds alone
    return _arm(lines, best=best, draws=draws) | {
        "arm": lines[0]["arm"],
        "weight_decay": float(lines[0]["weight_decay"]),
        "points": own_points,
        "seconds": float(np.mean([line["seconds"] for line in lines])),
        "processor_seconds": float(np.mean([line["processor_seconds"] for line in lines])),
        "best_adaptation": max(float(point["adaptation"]) for point in own_points),
        "band": safe_band(
            sorted({float(line["learning_rate"]) for line in lines if line["seed"] in _seeds(lines)}),
            *values.mean(0),
            learns=SHARES[0] * best,
            keeps=KEEPS,
        ),
    }


def setting_of(line: Line) -> tuple[float, float]:
    """What is tuned: weight decay and learning rate."""
    return float(line["weight_decay"]), float(line["learning_rate"])


def _seeds(lines: Sequence[Line]) -> list[int]:
    """The seeds with every setting that any seed has; where there is none, the fullest one."""
    settings = {setting_of(line) for line in lines}
    by_seed = {seed: {setting_of(line) for line in own} for seed, own in grouped(lines, lambda x: x["seed"]).items()}
    whole = [seed for seed, own in by_seed.items() if own == settings]
    return whole or [max(by_seed, key=lambda seed: len(by_seed[seed]))]


def _by_seed(lines: Sequence[Line]) -> Array:
    """(seeds, 2, settings): adaptation and relative retention."""
    found = []
    for seed in _seeds(lines):
        own = sorted((line for line in lines if line["seed"] == seed), key=setting_of)
        found.append([[float(x["adaptation"]) for x in own], [relative_retention(x) for x in own]])
    return np.array(found)


def _chosen(points: Sequence[Mapping[str, Any]], *, target: float) -> Mapping[str, Any] | None:
    """The setting that keeps most among those that reach the target."""
    reached = [point for point in points if float(point["adaptation"]) >= target - 1e-12]
    return max(reached, key=lambda point: float(point["retention"])) if reached else None
