"""What of a study was run: cells with a line, of those that are planned."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from nslora_dist.card import markdown_table
from nslora_dist.study.cells import cells_of
from nslora_dist.study.settings import Line
from nslora_dist.study.spec import Study
from nslora_dist.study.written import NONE


def coverage(lines: Sequence[Line], study: Study) -> list[dict[str, Any]]:
    """One entry a grid, size and task: ``run`` and ``planned``, each with the number of cells of every seed, in order.

    A cell that several grids share counts in each.
    """
    done = {line["id"] for line in lines}
    planned: Counter[tuple[str, str, str, int]] = Counter()
    run: Counter[tuple[str, str, str, int]] = Counter()
    for cell in cells_of(study):
        for name in cell.grids:
            key = (name, cell.size, cell.task, cell.seed)
            planned[key] += 1
            run[key] += cell.id in done
    found = []
    for name, grid in study.grids.items():
        for size in grid.sizes:
            for task in grid.tasks:
                keys = [(name, size, task, seed) for seed in grid.seeds]
                counts = {"run": [run[key] for key in keys], "planned": [planned[key] for key in keys]}
                found.append({"grid": name, "size": size, "task": task} | counts)
    return found


def coverage_table(entries: Sequence[Mapping[str, Any]]) -> str:
    """A row a grid and size, a column a task: 135 × 3 is 135 cells with each of three seeds, – none that is planned."""
    tasks = list(dict.fromkeys(entry["task"] for entry in entries))
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for entry in entries:
        rows.setdefault((entry["grid"], entry["size"]), {})[entry["task"]] = _counted(entry["run"], entry["planned"])
    header = ["grid", "base", *(task.replace("_", " ") for task in tasks)]
    return markdown_table(header, [[*key, *(own.get(task, "") for task in tasks)] for key, own in rows.items()])


def _counted(run: Sequence[int], planned: Sequence[int]) -> str:
    if not any(run):
        return NONE
    if run == planned:
        return f"{run[0]} × {len(run)}" if len(set(run)) == 1 else " + ".join(map(str, run))
    return f"{' + '.join(map(str, run))} of {planned[0]} × {len(planned)}"
