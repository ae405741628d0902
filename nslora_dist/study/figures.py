"""What a page's template may ask for: every figure is looked up in the summary or the lines."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np

from nslora_dist.study.analysis import whole_arms
from nslora_dist.study.elsewhere import over_tables
from nslora_dist.study.points import forgetting, grouped, on_worst_probe, points, relative_retention
from nslora_dist.study.prediction import LOST
from nslora_dist.study.settings import Line
from nslora_dist.study.written import number


@dataclass(frozen=True)
class Figures:
    """What a template may call; numbers come back as numbers, for the filters ``n``, ``n2``, ``percent`` and ``rate``.

    Attributes:
        found: ``summary.json``.
        summary: ``summary.md``, whose tables may be quoted.
        lines: of all cells.
        planned: number of cells of the study.
    """

    found: Mapping[str, Any]
    summary: str
    lines: Sequence[Line]
    planned: int

    @property
    def prediction(self) -> Any:
        """The summary's part on foretelling forgetting."""
        return self.found["prediction"]

    def arm(
        self, size: str, task: str, name: str, decay: float | None = None, *, calibration: str = "all"
    ) -> dict[str, Any]:
        """The figures of an arm, or of it with one weight decay, as in the summary."""
        entry = self._entry((size, task, calibration))
        own: dict[str, Any] = entry["arms"][name] if decay is None else entry["variants"][f"{name}, wd {decay:g}"]
        return own

    def _entry(self, where: tuple[str, str, str]) -> Any:
        settings = self.found["settings"]
        return _only((e for e in settings if (e["size"], e["task"], e["calibration"]) == where), where)

    def area(self, *where: Any, calibration: str = "all") -> float | None:
        """Under the arm's frontier."""
        return _value(self.arm(*where, calibration=calibration)["area"])

    def kept(self, *where: Any, share: float = 0.95, calibration: str = "all") -> float | None:
        """Retention at that share of the best adaptation."""
        return _value(self.arm(*where, calibration=calibration)["retention_at"][f"{share:g}"])

    def learned_at_most(self, size: str, task: str, name: str, *, calibration: str = "all") -> float:
        """The most that an arm learns at any of its settings, on average over its seeds."""
        variants = self._entry((size, task, calibration))["variants"].values()
        return max(float(own["best_adaptation"]) for own in variants if own["arm"] == name)

    def band(self, size: str, task: str, name: str) -> str:
        """Decades of learning rates that are safe, with the arm's weight decay that has most of them."""
        variants = self._entry((size, task, "all"))["variants"].values()
        own = max((own for own in variants if own["arm"] == name), key=lambda own: float(own["band"]))
        return f"{'' if own['band_ends'] else '≥ '}{number(own['band'], 2)}" if own["band"] >= 0.005 else "0"

    def compared_on(self) -> list[tuple[str, str]]:
        """The bases and tasks whose frontiers are compared with all texts, as (size, task)."""
        return [(e["size"], e["task"]) for e in self.found["settings"] if e["calibration"] == "all"]

    def whole(self, size: str, task: str) -> dict[str, Any]:
        """The compared arms of which all was run there, by name."""
        return whole_arms(self._entry((size, task, "all")), self.found["compared"])

    def fresh(self, *where: Any, learned: bool = False) -> float | None:
        """What the other seeds' choice keeps, or has learned, on a seed that had no part in it."""
        own = self.arm(*where)["fresh"]
        return float(own["adaptation"]) if learned else _value(own["retention"])

    def best(self, *where: Any) -> dict[str, float]:
        """The arm's chosen learning rate and weight decay, to look its cells up by."""
        chosen = self.arm(*where)["chosen"]
        return {key: float(chosen[key]) for key in ("learning_rate", "weight_decay")}

    def product(self, *where: Any) -> float:
        """Learning rate times weight decay at the chosen setting."""
        chosen = self.arm(*where)["chosen"]
        return float(chosen["learning_rate"]) * float(chosen["weight_decay"])

    def correlation(self, aggregate: str, which: str = "across", where: str | None = None) -> float | None:
        """Of an aggregate of interference with forgetting: over all cells, or those of one base and task."""
        own = (self.prediction["aggregates"] if where is None else self.prediction["settings"][where])[aggregate]
        return _value(own[which]) if isinstance(own[which], dict) else own[which]

    def within(self, aggregate: str, *arms: str) -> float:
        """The same within one arm, base and task: the mean over these arms."""
        own = self.prediction["aggregates"][aggregate]["within"]
        return float(np.mean([own[arm] for arm in arms]))

    def correlations(self, aggregate: str, which: str, start: str = "") -> list[float]:
        """The same on every base and task whose name starts so."""
        settings = self.prediction["settings"]
        own = (self.correlation(aggregate, which, name) for name in settings if name.startswith(start))
        return [value for value in own if value is not None]

    def probes(self, which: str, *pieces: str) -> list[float]:
        """Of a probe's interference or divergence with what is lost of it, piece by piece."""
        own = self.prediction["probes"]["by_piece"]
        return [float(own[piece][which]["value"]) for piece in pieces or own]

    def safe(self, aggregate: str, which: str) -> str:
        """The value of an aggregate up to which next to nothing is lost."""
        return f"{_value(self.prediction['aggregates'][aggregate][which]):.2g}"

    def curve(self, grid: str, *, size: str = "1m", task: str = "new_facts") -> Any:
        """A grid's scores along what it varies."""
        where = (grid, size, task)
        return _only((c for c in self.found["curves"] if (c["grid"], c["size"], c["task"]) == where), where)

    def point(
        self, grid: str, value: Any, rate: float, score: str, *, size: str = "1m", task: str = "new_facts"
    ) -> float | None:
        """One score of a curve, at a value and a learning rate."""
        of_curve = self.curve(grid, size=size, task=task)["points"]
        rated = (p for p in of_curve if p["value"] == value and np.isclose(p["learning_rate"], rate))
        return float(_only(rated, (grid, size, task, value, rate))[score])

    def scores(self, grid: str, value: Any, score: str, *sizes: str) -> list[float]:
        """One score of a grid's curves at a value: every size, or these, task and learning rate that was run."""
        own = [c for c in self.found["curves"] if c["grid"] == grid and (not sizes or c["size"] in sizes)]
        found = [float(p[score]) for curve in own for p in curve["points"] if p["value"] == value]
        if not found:
            raise LookupError(f"the summary has no {grid} at {value}")
        return found

    def cells(self, **where: Any) -> list[Line]:
        """Lines by their settings: a value, or a list of values, a key."""
        chosen = [line for line in self.lines if all(_is(line[key], value) for key, value in where.items())]
        if not chosen:
            raise LookupError(f"no cell has {where}")
        return chosen

    def mean(self, score: str, **where: Any) -> float:
        """Over these cells."""
        return float(np.mean([_score(line, score) for line in self.cells(**where)]))

    def most(self, score: str, **where: Any) -> float:
        """Over these cells."""
        return max(_score(line, score) for line in self.cells(**where))

    def least(self, score: str, **where: Any) -> float:
        """Over these cells."""
        return min(_score(line, score) for line in self.cells(**where))

    def kept_at(self, size: str, task: str, name: str, adaptation: float) -> float | None:
        """Most retention of an arm's settings that learn so much, over the seeds that it is compared with."""
        entry = self._entry((size, task, "all"))
        seeds = entry["arms"][name]["seeds"]
        own = (p for found in entry["variants"].values() if found["arm"] == name for p in found["points"])
        reached = (float(p["retention"]) for p in own if p["seeds"] == seeds and p["adaptation"] >= adaptation - 1e-12)
        return max(reached, default=None)

    def fixed(self, name: str, rate: float, decay: float) -> dict[str, float]:
        """One setting of an arm on every base and task that it was run on with all texts: nothing is tuned.

        ``learned`` and ``kept`` are means over these ``tables`` of means over seeds, with their least beside them;
        what is learned is a share of the best adaptation that any compared arm has.
        """
        where = {"arm": name, "learning_rate": rate, "weight_decay": decay, "calibration": "all"}
        best = {(e["size"], e["task"]): e["best_adaptation"] for e in self.found["settings"]}
        of_table = grouped(self.cells(**where), lambda line: (line["size"], line["task"]))
        own = {table: points(lines) for table, lines in of_table.items()}
        learned = [float(found[0]["adaptation"]) / best[table] for table, found in own.items()]
        kept = [float(found[0]["retention"]) for found in own.values()]
        means = {"learned": float(np.mean(learned)), "kept": float(np.mean(kept))}
        return means | {"learned_least": min(learned), "kept_least": min(kept), "tables": len(own)}

    def elsewhere(self, name: str, way: str = "table", **where: str) -> Any:
        """What an arm is worth at the settings that other tables choose, over the tables with this size or task.

        ``way`` says which have no say.
        """
        own = self.found["elsewhere"][name][way]
        chosen = [entry for entry in own["chosen"] if all(entry[key] == value for key, value in where.items())]
        return {"chosen": chosen} | over_tables(chosen)

    def lost_below_kl(self, limit: float, **where: Any) -> float:
        """Most that a cell lost whose divergence stays below a limit."""
        return max(forgetting(line) for line in self.cells(**where) if _score(line, "kl") < limit)

    def harmless(self, score: str, **where: Any) -> float:
        """The least of a score at which one of these cells lost more than 1%."""
        return min(_score(line, score) for line in self.cells(**where) if forgetting(line) > LOST)

    def table(self, start: str, rows: Sequence[str] | None = None, after: str = "") -> str:
        """The first table of the summary behind ``after`` whose header starts so, or those of its rows."""
        text = self.summary[self.summary.index(after) :].splitlines()
        at = _only((number for number, line in enumerate(text) if line.startswith(start)), start)
        found = list(takewhile(lambda line: line.startswith("|"), text[at:]))
        if rows is not None:
            named = {line.split("|")[1].strip(" *"): line for line in found[2:]}
            found = [*found[:2], *(named[row] for row in rows)]
        return "\n".join(found)

    def names(self) -> dict[str, Any]:
        """Everything above, by its name."""
        return {name: getattr(self, name) for name in dir(self) if not name.startswith("_") and name != "names"}


def _only(found: Iterator[Any], what: Any) -> Any:
    """The first; Jinja would take a StopIteration for an empty answer."""
    for one in found:
        return one
    raise LookupError(f"the summary has nothing of {what}")


def _value(interval: Mapping[str, Any]) -> float | None:
    value: float | None = interval["value"]
    return value


def _is(value: Any, wanted: Any) -> bool:
    return value in wanted if isinstance(wanted, list | tuple) else bool(value == wanted)


def _score(line: Line, score: str) -> float:
    """A cell's ``adaptation``, relative ``retention``, ``rms`` or ``kl`` on its texts, or what is left of a piece.

    ``probe`` and ``probe_kl`` are the same as ``rms`` and ``kl``, of the probe where it is largest.

    ``facts`` is the mean of the pieces that are facts.
    """
    if score == "retention":
        return relative_retention(line)
    if score in ("rms", "kl"):
        return float(line["interference"]["calibration"][score])
    if score in ("probe", "probe_kl"):
        return on_worst_probe(line, "rms" if score == "probe" else "kl")
    by_piece = line["retention_by"]
    if score == "facts":
        return float(np.mean([value for piece, value in by_piece.items() if piece.startswith("facts")]))
    return float(line[score] if score in line else by_piece[score])
