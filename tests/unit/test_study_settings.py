"""What of an arm is compared: settings with the same seeds, the planned ones first."""

from typing import Any

from nslora_dist.study.analysis import analyse
from nslora_dist.study.cells import cells_of
from nslora_dist.study.settings import over_same_seeds, planned_settings, setting_of
from nslora_dist.study.spec import load_study

RATES = (1e-3, 3e-3, 1e-2)


def run(seeds: dict[int, tuple[float, ...]], decay: float = 0.0) -> list[dict[str, Any]]:
    return [{"seed": s, "weight_decay": decay, "learning_rate": r} for s, rates in seeds.items() for r in rates]


def compared(lines: list[dict[str, Any]], planned: Any = None) -> tuple[set[int], set[tuple[float, float]]]:
    found = over_same_seeds(lines, planned)
    seeds, settings = {line["seed"] for line in found}, {setting_of(line) for line in found}
    assert len(found) == len(seeds) * len(settings), "each setting with each seed"
    return seeds, settings


def test_a_setting_with_one_seed_is_not_compared_with_those_of_three() -> None:
    lines = run({0: RATES, 1: RATES, 2: RATES}) + run({0: RATES}, decay=1.0)
    planned = {(0.0, rate) for rate in RATES}
    assert compared(lines, planned) == ({0, 1, 2}, planned)


def test_a_seed_that_is_being_run_does_not_cost_the_planned_settings() -> None:
    planned = {(0.0, rate) for rate in RATES}
    assert compared(run({0: RATES, 1: RATES[:2]}), planned) == ({0}, planned)
    # Where a setting is missing with every seed, it is missing.
    assert compared(run({0: RATES[:2], 1: RATES[:2]}), planned)[0] == {0, 1}


def test_more_settings_with_all_seeds_are_welcome() -> None:
    lines = run({0: RATES, 1: RATES}) + run({0: RATES, 1: RATES[:1]}, decay=1.0)
    seeds, settings = compared(lines, {(0.0, rate) for rate in RATES})
    assert seeds == {0, 1} and len(settings) == 4


def test_what_is_planned_is_the_arms_own_where_a_grid_has_it() -> None:
    study = load_study("frontier")
    planned = planned_settings(study)
    arm = study.arms["lora_frozen_a"]
    own = {(decay, rate) for decay in arm.weight_decays for rate in arm.learning_rates}
    assert planned["1m", "minimum", "all", "lora_frozen_a"] == own  # without grid frozen_a_decay's
    delta = study.arms["delta"]
    part = {(decay, rate) for decay in (0.0, 0.3) for rate in delta.learning_rates}
    assert planned["1m", "minimum", "part", "delta"] == part  # grid texts brings its own decays
    assert ("1m", "minimum", "part", "lora") not in planned and planned["1m", "minimum", None, "lora"]


def test_one_lucky_seed_does_not_move_the_yardstick() -> None:
    """The best adaptation that all are measured against is over the same seeds as the arms' own figures."""
    study = load_study("frontier")
    lines = []
    for cell in cells_of(study):
        if (cell.size, cell.task, cell.calibration) != ("1m", "minimum", "all"):
            continue
        if cell.arm != "lora_frozen_a" or (cell.weight_decay == 1.0 and cell.seed):
            continue
        lucky = cell.weight_decay == 1.0
        lines.append(
            {key: getattr(cell, key) for key in ("grids", "size", "task", "calibration", "arm", "seed")}
            | {"learning_rate": cell.learning_rate, "weight_decay": cell.weight_decay, "covered": [], "budget": None}
            | {"method": "lora", "matched": "parameters", "rank": 16, "trained_parameters": 1, "diverged": None}
            | {"adaptation": 0.95 if lucky else 0.9, "retention": 1.0 if lucky else 0.8, "retention_by": {"sum": 1.0}}
            | {"base": {"adaptation": 0.0, "retention": 1.0, "retention_by": {"sum": 1.0}}}
            | {"interference": {"calibration": {"rms": 0.1}}, "seconds": 1.0, "processor_seconds": 1.0}
        )
    found = analyse(lines, study)
    (setting,) = found["settings"]
    assert setting["best_adaptation"] == 0.9
    own = setting["arms"]["lora_frozen_a"]
    assert (own["seeds"], own["missing"], round(own["retention_at"]["0.95"]["value"], 9)) == (3, 0, 0.8)
    assert setting["variants"]["lora_frozen_a, wd 1"]["seeds"] == 1
    assert found["sweeps"][0]["best_adaptation"] == 0.95
