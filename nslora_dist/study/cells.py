"""The cells of a study: one adapter each, with an id that says all that its figures depend on."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nslora_dist.artifacts import hash_json
from nslora_dist.study.spec import Size, Study, StudyArm, StudyCalibration

MEASURED = 1
"""Raised when what a cell measures changes its meaning: then all are run again."""


MADE = "made.json"
"""In a base's folder: what was measured when it was made."""


@dataclass(frozen=True)
class Cell:
    """One adapter, trained and measured.

    Attributes:
        id: of 16 letters, a hash of all settings below, of the study's training and data, and of none of the names.
        grids: the grids that it belongs to.
        size: the base's name.
        task: what it learns.
        calibration: the name of the texts that its interference is measured on, and that a calibrated arm starts from.
        arm: the method's name.
        learning_rate: peak.
        weight_decay: of AdamW.
        seed: of a random A and of the order of rows; the rows are drawn by the seed of the size.
    """

    id: str
    grids: tuple[str, ...]
    size: str
    task: str
    calibration: str
    arm: str
    learning_rate: float
    weight_decay: float
    seed: int


def size_key(study: Study, size: Size) -> str:
    """A hash of what a base, its world and its evaluation rows are made from."""
    made_from = size.model_dump(mode="json", exclude={"minutes", "seconds", "device", "steps"})
    return hash_json([MEASURED, made_from, study.task_rows.model_dump(mode="json"), study.probe_sequences])[:16]


def base_folder(study: Study, size: str) -> Path:
    """Where a size's base and data are, or will be."""
    return Path(study.output_dir) / "bases" / f"{size}-{size_key(study, study.sizes[size])[:8]}"


def is_made(study: Study, size: str) -> bool:
    """Whether the base is there, whole."""
    return (base_folder(study, size) / MADE).is_file()


def cell_key(
    study: Study,
    size: Size,
    calibration: StudyCalibration,
    arm: StudyArm,
    *,
    task: str,
    learning_rate: float,
    weight_decay: float,
    seed: int,
) -> str:
    """The id of a cell."""
    method: Any = [arm.peer, arm.rank] if arm.adapter is None else arm.section.model_dump(mode="json")
    training = study.training.model_dump(mode="json") | {"steps": study.steps_of(size, task)}
    parts = [
        *(MEASURED, size_key(study, size), size.device, task, calibration.model_dump(mode="json"), method),
        *(training, float(learning_rate), float(weight_decay), seed),
    ]
    return hash_json(parts)[:16]


def cells_of(study: Study) -> list[Cell]:
    """All cells, each once, those that share a base, a task and a calibration next to each other."""
    found: dict[str, Cell] = {}
    for grid, cell in _all(study):
        known = found.get(cell.id)
        if known is None:
            found[cell.id] = cell
        elif grid not in known.grids:
            found[cell.id] = Cell(**(vars(known) | {"grids": (*known.grids, grid)}))
    order = {name: place for place, name in enumerate(study.sizes)}
    # Seeds outermost: a study that is cut off has every method at every rate with one seed, not one method thrice.
    return sorted(found.values(), key=lambda cell: (order[cell.size], cell.seed, cell.task, cell.calibration))


def _all(study: Study) -> Iterator[tuple[str, Cell]]:
    for grid_name, grid in study.grids.items():
        for size in grid.sizes:
            for task in grid.tasks:
                for arm_name in grid.arms:
                    arm = study.arms[arm_name]
                    for calibration in grid.calibrations if arm.calibrated else grid.calibrations[:1]:
                        for seed in grid.seeds:
                            for decay in grid.weight_decays or arm.weight_decays:
                                for rate in grid.learning_rates or arm.learning_rates:
                                    key = cell_key(
                                        study,
                                        study.sizes[size],
                                        study.calibrations[calibration],
                                        arm,
                                        task=task,
                                        learning_rate=rate,
                                        weight_decay=decay,
                                        seed=seed,
                                    )
                                    yield (
                                        grid_name,
                                        Cell(key, (grid_name,), size, task, calibration, arm_name, rate, decay, seed),
                                    )
