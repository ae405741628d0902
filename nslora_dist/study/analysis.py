"""From cells' lines to the figures of the summary: frontiers by method, and curves along anything else."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from nslora_dist.study.coverage import coverage
from nslora_dist.study.elsewhere import on_other_tables
from nslora_dist.study.fresh import on_fresh_seeds
from nslora_dist.study.points import chosen_of, grouped, most_retention, points, relative_retention, variant
from nslora_dist.study.settings import Line, Planned, Setting, over_same_seeds, planned_settings, setting_of
from nslora_dist.study.spec import Study
from nslora_dist.study.statistics import (
    Array,
    area_under_frontier,
    over_seeds,
    retention_at,
    safe_band,
)

SHARES = (0.95, 0.99)
KEEPS = 0.95
DECAY = "weight_decay"
COSTS = ("seconds", "processor_seconds")
"""Of a cell on the device that its size names: those that ``--device`` sent elsewhere cost something else."""


def analyse(lines: Sequence[Line], study: Study) -> dict[str, Any]:
    """Every figure of the summary but those of forgetting foretold, as plain JSON.

    Args:
        lines: of all cells, with their ``grids``.
        study: whose cells they are.

    Returns:
        ``cells``; ``compared``, the arms of the first grid that compares methods; ``settings``, one entry a size, task
        and calibration (an arm that no calibration shapes stands in each), with the best adaptation of all and the
        figures of every arm and variant; ``sweeps``, one entry a grid along weight decay, size and task, with those of
        its variants; ``curves``, one entry a grid that varies something else than the method, size and task;
        ``elsewhere``, of each compared arm what the settings that other tables choose are worth; ``run``, what was run
        of what is planned (``coverage``).
    """
    planned, settings, learned = planned_settings(study), [], {}
    of_table: dict[str, dict[tuple[str, str], list[Line]]] = {}  # arm → size and task, where all of it was run
    compared = next((list(grid.arms) for grid in study.grids.values() if grid.along is None), [])
    for (size, task), own in grouped(of_methods(lines, study), lambda line: (line["size"], line["task"])).items():
        arms = {
            calibration: arms_of(own, calibration, planned)
            for calibration in dict.fromkeys(line["calibration"] for line in own)
        }
        best = learned[size, task] = _yardstick(arms.values(), compared)
        for calibration, of_arm in arms.items():
            chosen = of_calibration(own, calibration)
            variants, all_of = grouped(chosen, variant), grouped(chosen, lambda line: line["arm"])
            settings.append(
                {
                    "size": size,
                    "task": task,
                    "calibration": calibration,
                    "best_adaptation": best,
                    "base": own[0]["base"],
                    "arms": {
                        name: _arm(here, best=best)
                        | _run_of(here, planned_of(planned, here[0], calibration))
                        | {"fresh": on_fresh_seeds(all_of[name], here, target=SHARES[0] * best)}
                        for name, here in of_arm.items()
                    },
                    "variants": {name: _variant(here, study, best=best) for name, here in sorted(variants.items())},
                }
            )
            if calibration == settings[0]["calibration"] and best > 0:  # nobody's share of nothing is known
                for name in whole_arms(settings[-1], compared):
                    of_table.setdefault(name, {})[size, task] = of_arm[name]
    return {
        "cells": len(lines),
        "compared": compared,
        "settings": settings,
        "sweeps": sweeps(lines, study, learned),
        "curves": curves(lines, study),
        "elsewhere": {
            name: on_other_tables(own, learned, share=SHARES[0]) for name, own in of_table.items() if len(own) > 1
        },
        "run": coverage(lines, study),
    }


def arms_of(lines: Sequence[Line], calibration: str, planned: Planned) -> dict[str, list[Line]]:
    """Arm → those of its lines that are compared, of a size and task's."""
    of_arm = grouped(of_calibration(lines, calibration), lambda line: line["arm"])
    return {
        name: over_same_seeds(own, planned_of(planned, own[0], calibration)) for name, own in sorted(of_arm.items())
    }


def planned_of(planned: Planned, line: Line, calibration: str) -> frozenset[Setting]:
    """The settings that are planned for a line's arm, where it is compared under a calibration."""
    size, task, arm = line["size"], line["task"], line["arm"]
    return planned.get((size, task, calibration, arm)) or planned[size, task, None, arm]


def _run_of(lines: Sequence[Line], planned: frozenset[Setting]) -> dict[str, int]:
    return {"planned": len(planned), "missing": len(planned - {setting_of(line) for line in lines})}


def of_methods(lines: Iterable[Line], study: Study) -> list[Line]:
    """The lines of the grids that compare methods, and run along nothing else but weight decay."""
    return [line for line in lines if any(study.grids[grid].compares for grid in line["grids"])]


def of_first_calibration(settings: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The entries that the headline is about, one a base and task."""
    return [setting for setting in settings if setting["calibration"] == settings[0]["calibration"]]


def whole_arms(setting: Mapping[str, Any], compared: Collection[str]) -> dict[str, Any]:
    """Of one entry of ``settings``, the compared arms of which all was run: tuned over less, one looks worse."""
    return {name: own for name, own in setting["arms"].items() if name in compared and not own["missing"]}


def sweeps(lines: Sequence[Line], study: Study, learned: Mapping[tuple[str, str], float]) -> list[dict[str, Any]]:
    """Of each grid along weight decay: what tuning the learning rate gets out of every decay of every arm.

    Args:
        lines: of all cells.
        study: whose cells they are.
        learned: (size, task) → the frontiers' yardstick; where a decay that only the sweep has learned more, that is.
    """
    found = []
    for name, (size, task), own in _along(lines, study, lambda along: along == DECAY):
        variants = grouped(sorted(own, key=lambda x: (list(study.arms).index(x["arm"]), x["weight_decay"])), variant)
        best = max(learned.get((size, task), 0.0), _best_adaptation(map(over_same_seeds, variants.values())))
        found.append(
            {"grid": name, "size": size, "task": task, "best_adaptation": best}
            | {"variants": {name: _variant(of, study, best=best) for name, of in variants.items()}}
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
    if along == "budget":  # whether it is monotone is asked of one and the same seeds
        seeds = set.intersection(*({line["seed"] for line in own} for own in of_value.values()))
        of_value = {value: [x for x in own if not seeds or x["seed"] in seeds] for value, own in of_value.items()}
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


def _yardstick(of_calibrations: Iterable[Mapping[str, Sequence[Line]]], compared: Collection[str]) -> float:
    """One for all calibrations of a task: the best that any compared arm learned, on average over its seeds.

    Others may have more parameters or fewer seeds, whose luck would be asked of everybody; they count where no compared
    arm was run.
    """
    named = [(name, own) for of_arm in of_calibrations for name, own in of_arm.items()]
    own = [lines for name, lines in named if name in compared]
    return _best_adaptation(own or [lines for _, lines in named])


def _best_adaptation(compared: Iterable[Sequence[Line]]) -> float:
    """The most that any setting learned, on average over its seeds."""
    return max((float(point["adaptation"]) for own in compared for point in points(own)), default=0.0)


def _arm(lines: Sequence[Line], *, best: float) -> dict[str, Any]:
    """An arm with all its settings, learning rates and weight decays alike: what tuning gets out of it."""
    start = float(lines[0]["base"]["adaptation"])
    values, most = _by_seed(lines), most_retention(lines[0])
    return {
        "seeds": len(values),
        "settings": values.shape[-1],
        "method": lines[0]["method"],
        "matched": lines[0]["matched"],
        "rank": lines[0]["rank"],
        "trained_parameters": lines[0]["trained_parameters"],
        "area": asdict(over_seeds(values, lambda mean: _area(mean, start), most=most)),
        "retention_at": {
            f"{share:g}": asdict(over_seeds(values, _kept_at(share * best), most=most)) for share in SHARES
        },
        "chosen": chosen_of(points(lines), target=SHARES[0] * best),
        "covered": lines[0]["covered"] if shaped(lines[0]) else [],
    }


def _kept_at(target: float) -> Callable[[Array], float | None]:
    return lambda mean: retention_at(mean[0], mean[1], target=target)


def _area(mean: Array, start: float) -> float:
    return area_under_frontier([start, *mean[0]], [1.0, *mean[1]])  # not to train at all is a setting, too


def _variant(lines: Sequence[Line], study: Study, *, best: float) -> dict[str, Any]:
    lines = over_same_seeds(lines)
    on_cpu = study.sizes[lines[0]["size"]].device == "cpu"
    timed = [line for line in lines if (line.get("device", "cpu") == "cpu") == on_cpu]  # the first lines do not say it
    rates = sorted({float(line["learning_rate"]) for line in lines})
    band, ends = safe_band(rates, *_by_seed(lines).mean(0), learns=SHARES[0] * best, keeps=KEEPS)
    return _arm(lines, best=best) | {
        "arm": lines[0]["arm"],
        "weight_decay": float(lines[0]["weight_decay"]),
        "points": points(lines),
        **{key: float(np.mean([line[key] for line in timed])) if timed else None for key in COSTS},
        "best_adaptation": _best_adaptation([lines]),
        "band": band,
        "band_ends": ends,
    }


def _by_seed(lines: Sequence[Line]) -> Array:
    """(seeds, 2, settings) of lines over the same seeds: adaptation and relative retention."""
    in_order = sorted(lines, key=setting_of)
    return np.array(
        [
            [[float(x["adaptation"]) for x in own], [relative_retention(x) for x in own]]
            for own in grouped(in_order, lambda line: line["seed"]).values()
        ]
    )
