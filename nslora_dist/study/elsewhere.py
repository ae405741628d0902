"""What an arm is worth untuned: at the setting that it chose on other tables than the one it is judged on."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from nslora_dist.study.points import chosen_of, grouped, preferred, relative_retention
from nslora_dist.study.settings import Line, Setting, setting_of

Table = tuple[str, str]
"""Size of the base and task."""
LEFT_OUT: Mapping[str, Callable[[Table, Table], bool]] = {
    "table": lambda own, other: own == other,
    "task": lambda own, other: own[1] == other[1],
    "base": lambda own, other: own[0] == other[0],
}
"""Of the tables, which have no say in the setting for one's own: itself, all of its task, all of its base."""


def on_other_tables(of_table: Mapping[Table, Sequence[Line]], best: Mapping[Table, float], *, share: float) -> Any:
    """On each table, the setting that an arm is best with on the others.

    It is chosen as everywhere, from means over these: it keeps most of the settings that learn the wanted share, or,
    where none does, learns most. Only settings that were run on every table can be chosen.

    Args:
        of_table: an arm's lines that are compared, each setting of a table with the same seeds.
        best: adaptation that counts as all of it, on each table.
        share: of that, which is to be learned on average.

    Returns:
        ``settings``, how many can be chosen; and for each way to leave tables out, where other tables remain for all:
        ``chosen``, one entry a table with its setting and what that ``learned`` (a share of the best) and ``kept``
        there; ``reached``, for how many of them the wanted share was learned where the setting was chosen; means
        ``learned`` and ``kept``, and the least of each.
    """
    run = {table: _scores(lines, best[table]) for table, lines in of_table.items()}
    common = sorted(set.intersection(*(set(scores) for scores in run.values())))
    found: dict[str, Any] = {"settings": len(common)}
    for way, is_out in LEFT_OUT.items():
        others = {own: [run[table] for table in run if not is_out(own, table)] for own in run}
        if common and all(others.values()):
            found[way] = _judged(run, {own: _means(scores, common) for own, scores in others.items()}, share)
    return found


def _scores(lines: Sequence[Line], best: float) -> dict[Setting, tuple[float, float]]:
    """Setting → what it learned, as a share, and kept: means over seeds."""
    return {
        setting: (
            float(np.mean([float(line["adaptation"]) for line in own])) / best,
            float(np.mean([relative_retention(line) for line in own])),
        )
        for setting, own in grouped(lines, setting_of).items()
    }


def _means(of_table: Sequence[Mapping[Setting, tuple[float, float]]], settings: Sequence[Setting]) -> list[Any]:
    """One point a setting: its mean scores over tables."""
    found = []
    for setting in settings:
        adaptation, retention = np.mean([scores[setting] for scores in of_table], axis=0)
        found.append({"setting": setting, "adaptation": float(adaptation), "retention": float(retention)})
    return found


def _judged(
    run: Mapping[Table, Mapping[Setting, tuple[float, float]]], choices: Mapping[Table, list[Any]], share: float
) -> dict[str, Any]:
    chosen = []
    for table, choice in choices.items():
        decay, rate = setting = preferred(choice, target=share)["setting"]
        learned, kept = run[table][setting]
        where = {"size": table[0], "task": table[1], "weight_decay": decay, "learning_rate": rate}
        chosen.append(where | {"learned": learned, "kept": kept})
    reached = sum(chosen_of(own, target=share) is not None for own in choices.values())
    return {"chosen": chosen, "reached": reached} | over_tables(chosen)


def over_tables(chosen: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means ``learned`` and ``kept``, and the least of each."""
    found: dict[str, float] = {}
    for score in ("learned", "kept"):
        values = [float(entry[score]) for entry in chosen]
        found |= {score: float(np.mean(values)), f"{score}_least": min(values)}
    return found
