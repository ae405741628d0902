"""What a choice is worth on seeds that it was not made on: the best of many settings is always a little lucky."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from nslora_dist.study.cells import Cell
from nslora_dist.study.points import chosen_of, most_retention, points, preferred, relative_retention
from nslora_dist.study.settings import Line, setting_of
from nslora_dist.study.statistics import over_seeds


def on_fresh_seeds(lines: Sequence[Line], compared: Sequence[Line], *, target: float) -> dict[str, Any]:
    """On each seed, the setting that the *other* seeds choose.

    A setting is chosen as everywhere: it keeps most of those that reach the target, or, where none does, learns most.
    Seeds on which only the chosen setting was run count as well as those with all settings: each is fresh to a choice
    that it had no part in.

    Args:
        lines: an arm's, of a size, task and calibration: all that there are.
        compared: those of them that settings are chosen on, each setting with the same seeds.
        target: adaptation.

    Returns:
        ``setting``, weight decay and learning rate, that all of ``compared`` choose; ``chosen_on``, the seeds of these;
        ``seeds``, on how many a choice was tried, ``reached``, how many of these choices reach the target where they
        were made; over all tried the mean ``adaptation`` and, with its interval,
        ``retention`` relative to the base's.
    """
    by_place = {(setting_of(line), line["seed"]): line for line in lines}
    tried, reached = [], 0
    for seed in sorted({line["seed"] for line in lines}):
        others = [line for line in compared if line["seed"] != seed]
        if others and (found := by_place.get((_setting(others, target), seed))):
            tried.append(found)
            reached += chosen_of(points(others), target=target) is not None
    decay, rate = _setting(compared, target)
    kept = np.array([relative_retention(line) for line in tried])
    return {
        "setting": {"weight_decay": decay, "learning_rate": rate},
        "chosen_on": sorted({line["seed"] for line in compared}),
        "seeds": len(tried),
        "reached": reached,
        "adaptation": float(np.mean([float(line["adaptation"]) for line in tried])) if tried else None,
        "retention": asdict(over_seeds(kept, float, most=most_retention(tried[0]))) if tried else None,
    }


def _setting(lines: Sequence[Line], target: float) -> tuple[float, float]:
    point = preferred(points(lines), target=target)
    return float(point["weight_decay"]), float(point["learning_rate"])


def to_confirm(cells: Sequence[Cell], settings: Sequence[Mapping[str, Any]]) -> list[Cell]:
    """Those of ``cells`` that try an arm's chosen setting on a seed that had no part in the choice.

    Args:
        cells: of the study.
        settings: ``analysis.analyse``'s; an arm of which planned settings are missing has not chosen yet.
    """
    wanted = {}
    for entry in settings:
        for arm, own in entry["arms"].items():
            if not own["missing"]:
                wanted[entry["size"], entry["task"], entry["calibration"], arm] = own["fresh"]
    found = []
    for cell in cells:
        fresh = wanted.get((cell.size, cell.task, cell.calibration, cell.arm))
        if fresh is None or cell.seed in fresh["chosen_on"]:
            continue
        if fresh["setting"] == {"weight_decay": cell.weight_decay, "learning_rate": cell.learning_rate}:
            found.append(cell)
    return found
