"""Which cells of an arm are compared: the settings that the study plans for it, all with the same seeds."""

from collections.abc import Collection, Mapping, Sequence
from itertools import combinations
from typing import Any

from nslora_dist.study.cells import cells_of
from nslora_dist.study.spec import Study

Line = dict[str, Any]
Setting = tuple[float, float]
Planned = Mapping[tuple[str, str, str | None, str], frozenset[Setting]]


def setting_of(line: Line) -> Setting:
    """What is tuned: weight decay and learning rate."""
    return float(line["weight_decay"]), float(line["learning_rate"])


def planned_settings(study: Study) -> Planned:
    """(size, task, calibration, arm) → the settings that the study tunes an arm over; calibration None: any of them.

    These are the arm's own rates and decays. Those that a grid brings instead only add to them, and are all that is
    planned where no grid has the arm's own.
    """
    own: dict[tuple[str, str, str | None, str], set[Setting]] = {}
    brought: dict[tuple[str, str, str | None, str], set[Setting]] = {}
    for cell in cells_of(study):
        grids = [study.grids[name] for name in cell.grids if study.grids[name].compares]
        if not grids:
            continue
        found = own if any(not grid.learning_rates and not grid.weight_decays for grid in grids) else brought
        for calibration in (cell.calibration, None):
            key = (cell.size, cell.task, calibration, cell.arm)
            found.setdefault(key, set()).add((cell.weight_decay, cell.learning_rate))
    return {key: frozenset(settings) for key, settings in (brought | own).items()}


def over_same_seeds(lines: Sequence[Line], planned: Collection[Setting] | None = None) -> list[Line]:
    """Of an arm's lines, those of the settings that were run with each of the same seeds.

    A setting that was run with fewer seeds may be the best by the luck of those, and one that was run with more has its
    luck averaged out: neither is compared with the other. Seeds are chosen so that as many as possible of the planned
    settings have them all, then as many seeds, then as many settings.

    Args:
        lines: one a setting and seed.
        planned: settings that count before others; None for all.
    """
    seeds: dict[Setting, set[int]] = {}
    for line in lines:
        seeds.setdefault(setting_of(line), set()).add(line["seed"])
    every = sorted(set().union(*seeds.values()))

    def whole(chosen: tuple[int, ...]) -> list[Setting]:
        return [setting for setting, own in seeds.items() if own.issuperset(chosen)]

    def worth(chosen: tuple[int, ...]) -> tuple[int, int, int]:
        found = whole(chosen)
        return sum(planned is None or setting in planned for setting in found), len(chosen), len(found)

    best = max((c for count in range(1, len(every) + 1) for c in combinations(every, count)), key=worth, default=())
    settings = set(whole(best))
    return [line for line in lines if line["seed"] in best and setting_of(line) in settings]
