"""What of an arm is compared: settings with the same seeds, the planned ones first."""

from collections.abc import Callable
from typing import Any

import pytest

from nslora_dist.study.analysis import analyse
from nslora_dist.study.cells import Cell, cells_of
from nslora_dist.study.coverage import coverage, coverage_table
from nslora_dist.study.elsewhere import on_other_tables
from nslora_dist.study.fresh import on_fresh_seeds, to_confirm
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


def cell_line(cell: Cell, adaptation: float, retention: float) -> dict[str, Any]:
    """A line of a cell as ``run_cell`` leaves it, as far as methods are compared."""
    return (
        {key: getattr(cell, key) for key in ("id", "grids", "size", "task", "calibration", "arm", "seed")}
        | {"learning_rate": cell.learning_rate, "weight_decay": cell.weight_decay, "covered": [], "budget": None}
        | {"method": "lora", "matched": "parameters", "rank": 16, "trained_parameters": 1, "diverged": None}
        | {"adaptation": adaptation, "retention": retention, "retention_by": {"sum": 1.0}}
        | {"base": {"adaptation": 0.0, "retention": 1.0, "retention_by": {"sum": 1.0}}}
        | {"interference": {"calibration": {"rms": 0.1}}, "device": "cpu", "seconds": 1.0, "processor_seconds": 1.0}
    )


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
        lines.append(cell_line(cell, 0.95 if lucky else 0.9, 1.0 if lucky else 0.8))
    found = analyse(lines, study)
    (setting,) = found["settings"]
    assert setting["best_adaptation"] == 0.9
    own = setting["arms"]["lora_frozen_a"]
    assert (own["seeds"], own["missing"], round(own["retention_at"]["0.95"]["value"], 9)) == (3, 0, 0.8)
    assert setting["variants"]["lora_frozen_a, wd 1"]["seeds"] == 1
    assert found["sweeps"][0]["best_adaptation"] == 0.95


def frozen_a(seeds: dict[int, tuple[float, ...]], scores: Callable[[float, int], tuple[float, float]]) -> list[Any]:
    """Lines of frozen random A on 1M "minimum" without decay, by seed and rate."""
    return [
        cell_line(cell, *scores(cell.learning_rate, cell.seed))
        for cell in cells_of(load_study("frontier"))
        if (cell.size, cell.task, cell.calibration, cell.arm) == ("1m", "minimum", "all", "lora_frozen_a")
        and cell.weight_decay == 0.0
        and cell.learning_rate in seeds.get(cell.seed, ())
    ]


def test_a_choice_is_tried_on_the_seed_that_had_no_part_in_it() -> None:
    """Each of three seeds has another lucky rate: chosen on two of them it is only lucky."""
    rates = (1e-3, 2.5e-3, 6e-3)
    lines = frozen_a(dict.fromkeys((0, 1, 2), rates), lambda rate, seed: (1.0, 0.9 if rate == rates[seed] else 0.6))
    fresh = on_fresh_seeds(lines, lines, target=0.95)
    assert (fresh["seeds"], fresh["adaptation"], fresh["retention"]["value"]) == (3, 1.0, pytest.approx(0.6))
    assert fresh["chosen_on"] == [0, 1, 2] and fresh["reached"] == 3


def test_a_choice_that_reaches_no_target_is_told_from_one_that_does() -> None:
    """Two seeds learn nothing at the second rate: with any pair of them the fallback stands, which looks at no loss."""
    rates = (1e-3, 2.5e-3)
    scores = {(2.5e-3, 0): (1.0, 0.9), (2.5e-3, 1): (0.0, 0.9), (2.5e-3, 2): (0.0, 0.9)}
    lines = frozen_a(dict.fromkeys((0, 1, 2), rates), lambda rate, seed: scores.get((rate, seed), (0.6, 0.1)))
    fresh = on_fresh_seeds(lines, lines, target=0.5)
    assert (fresh["seeds"], fresh["reached"]) == (3, 3)
    assert on_fresh_seeds(lines, lines, target=0.7)["reached"] == 0


def test_the_yardstick_is_of_the_arms_that_are_compared() -> None:
    """One with twice the parameters and one seed would ask of everybody what none of them has to learn."""
    study = load_study("frontier")
    lines = [
        cell_line(cell, 1.0 if cell.arm == "lora_r16" else 0.9, 0.8)
        for cell in cells_of(study)
        if (cell.size, cell.task, cell.calibration, cell.seed) == ("1m", "minimum", "all", 0)
        and cell.arm in ("lora_r16", "lora_frozen_a")
    ]
    (setting,) = analyse(lines, study)["settings"]
    assert setting["best_adaptation"] == 0.9
    alone = [line for line in lines if line["arm"] == "lora_r16"]
    assert analyse(alone, study)["settings"][0]["best_adaptation"] == 1.0


def test_a_table_on_which_nobody_learns_is_no_yardstick() -> None:
    study = load_study("frontier")
    lines = [
        cell_line(cell, 0.0 if cell.task == "minimum" else 0.5, 0.8)
        for cell in cells_of(study)
        if (cell.size, cell.calibration, cell.seed, cell.arm) == ("1m", "all", 0, "lora_frozen_a")
    ]
    found = analyse(lines, study)["elsewhere"]["lora_frozen_a"]
    assert {entry["task"] for entry in found["table"]["chosen"]} == {"difference", "new_facts"}


def test_seeds_with_the_chosen_setting_alone_count_too() -> None:
    rates = (1e-3, 2.5e-3, 6e-3)

    def scores(rate: float, seed: int) -> tuple[float, float]:
        return {1e-3: (0.2, 1.0), 2.5e-3: (0.96, 0.9 - 0.1 * seed), 6e-3: (1.0, 0.5)}[rate]

    lines = frozen_a({0: rates, 1: rates[1:2], 2: rates[2:]}, scores)
    compared = over_same_seeds(lines)
    fresh = on_fresh_seeds(lines, compared, target=0.95)
    assert fresh["setting"] == {"weight_decay": 0.0, "learning_rate": 2.5e-3} and fresh["chosen_on"] == [0]
    assert (fresh["seeds"], fresh["adaptation"], fresh["retention"]["value"]) == (1, 0.96, pytest.approx(0.8))
    none = on_fresh_seeds(compared, compared, target=0.95)
    assert (none["seeds"], none["adaptation"], none["retention"]) == (0, None, None)
    assert on_fresh_seeds(lines, compared, target=2.0)["setting"]["learning_rate"] == 6e-3, "it learns most"


def test_of_settings_that_keep_all_the_one_that_learns_most_is_chosen() -> None:
    rates = (1e-3, 2.5e-3, 6e-3)
    lines = frozen_a({0: rates}, lambda rate, seed: ({1e-3: 0.96, 2.5e-3: 1.0, 6e-3: 0.97}[rate], 1.0))
    assert on_fresh_seeds(lines, lines, target=0.95)["setting"]["learning_rate"] == 2.5e-3


def test_what_is_left_to_confirm() -> None:
    """The chosen setting of every arm that has chosen, on the seeds that had no part in it."""
    study = load_study("frontier")
    cells = cells_of(study)
    mine = [c for c in cells if (c.size, c.task, c.calibration, c.arm) == ("1m", "minimum", "all", "lora_frozen_a")]
    own = [c for c in mine if c.weight_decay in study.arms["lora_frozen_a"].weight_decays and "frontier" in c.grids]

    def scores(cell: Cell) -> tuple[float, float]:
        return (1.0, 0.9) if (cell.weight_decay, cell.learning_rate) == (0.3, 6e-3) else (0.5, 1.0)

    lines = [cell_line(cell, *scores(cell)) for cell in own if cell.seed == 0]
    found = to_confirm(cells, analyse(lines, study)["settings"])
    assert {(c.arm, c.weight_decay, c.learning_rate, c.seed) for c in found} == {
        ("lora_frozen_a", 0.3, 6e-3, 1),
        ("lora_frozen_a", 0.3, 6e-3, 2),
    }
    assert to_confirm(cells, analyse(lines[1:], study)["settings"]) == [], (
        "an arm that was not run whole has not chosen"
    )


def test_costs_are_those_of_the_device_that_a_size_names() -> None:
    study = load_study("frontier")
    settings = {"size": "1m", "task": "minimum", "calibration": "all", "arm": "delta", "weight_decay": 0.0}
    cells = [cell for cell in cells_of(study) if {key: getattr(cell, key) for key in settings} == settings]
    lines = [cell_line(cell, 0.9, 1.0) for cell in cells if "frontier" in cell.grids]
    assert {line["seed"] for line in lines} == {0, 1, 2}
    for line in lines:
        if line["seed"]:
            line |= {"device": "a GPU", "seconds": 100.0, "processor_seconds": 100.0}
    (own,) = analyse(lines, study)["settings"][0]["variants"].values()
    assert (own["seeds"], own["seconds"], own["processor_seconds"]) == (3, 1.0, 1.0)
    elsewhere = [line | {"device": "a GPU"} for line in lines]
    (own,) = analyse(elsewhere, study)["settings"][0]["variants"].values()
    assert own["seconds"] is None and own["area"]["value"] > 0


def test_a_dial_is_judged_on_the_same_seeds_at_every_budget() -> None:
    study = load_study("frontier")
    cells = [c for c in cells_of(study) if (c.size, c.task) == ("1m", "minimum") and "dial_frozen_a" in c.grids]
    lines = []
    for cell in cells:
        if cell.arm == "lora_frozen_a" or (cell.arm == "frozen_a_budget_200" and cell.seed == 0):
            budget = study.arms[cell.arm].section.interference_budget
            # The seeds without a budget's cells would make it look as if more budget kept more.
            lines.append(
                cell_line(cell, 0.9, 0.99 if cell.seed else 0.5 if budget is None else 0.6) | {"budget": budget}
            )
    (curve,) = analyse(lines, study)["curves"]
    assert curve["monotone"] == {"retention": 0.0, "adaptation": 0.0}
    assert {point["seeds"] for point in curve["points"]} == {1}


def test_what_was_run_is_counted_by_grid_task_and_seed() -> None:
    study = load_study("frontier")
    cells = [c for c in cells_of(study) if (c.size, c.task, c.arm) == ("1m", "new_facts", "delta")]
    run = [c for c in cells if "mixing" in c.grids or ("rank" in c.grids and c.seed == 0)]
    found = coverage([{"id": cell.id} for cell in run], study)
    of = {(entry["grid"], entry["size"], entry["task"]): entry for entry in found}
    assert of["mixing", "1m", "new_facts"] == {"grid": "mixing", "size": "1m", "task": "new_facts"} | {
        "run": [15, 15, 15],
        "planned": [15, 15, 15],
    }
    # Grid mixing has the delta form of rank 16 on all texts, whose cells count wherever else they belong.
    assert of["rank", "1m", "new_facts"]["run"] == [3, 3, 3]
    assert of["frontier", "1m", "new_facts"]["run"] == [3, 3, 3] and not any(of["texts", "1m", "minimum"]["run"])
    rows = coverage_table(found).splitlines()
    assert rows[0] == "| grid | base | difference | minimum | new facts |"
    assert "| mixing | 1m |  |  | 15 × 3 |" in rows
    assert next(row for row in rows if row.startswith("| rank | 1m |")) == "| rank | 1m |  | – | 3 + 3 + 3 of 15 × 3 |"


def of_tables(scores: dict[tuple[str, str], dict[float, tuple[float, float]]]) -> dict[tuple[str, str], list[Any]]:
    """Lines of an arm by size and task: learning rate → what one seed learned and kept."""
    cell = cells_of(load_study("frontier"))[0]
    return {
        table: [cell_line(cell, *own) | {"learning_rate": rate, "weight_decay": 0.0} for rate, own in of_rate.items()]
        for table, of_rate in scores.items()
    }


def test_a_table_has_no_say_in_the_setting_that_it_is_judged_by() -> None:
    """The small base wants the high rate, the large one the low rate: each is judged by what the others want."""
    high, low = (0.9, 1.0), (1.0, 0.8)
    small = {1e-2: high, 1e-3: low}
    large = {1e-2: (0.5, 0.1), 1e-3: (1.0, 0.95)}
    lines = of_tables({("1m", "sum"): small, ("1m", "facts"): small, ("5m", "sum"): large})
    best = {("1m", "sum"): 1.0, ("1m", "facts"): 1.0, ("5m", "sum"): 1.0}
    found = on_other_tables(lines, best, share=0.9)
    assert found["settings"] == 2

    def rates(way: str) -> dict[tuple[str, str], float]:
        return {(entry["size"], entry["task"]): entry["learning_rate"] for entry in found[way]["chosen"]}

    # By the mean of both others: 1e-2 learns (.9 + .5) / 2 there, too little.
    assert rates("table") == {("1m", "sum"): 1e-3, ("1m", "facts"): 1e-3, ("5m", "sum"): 1e-2}
    assert rates("base") == rates("table") and rates("task")["5m", "sum"] == 1e-2
    own = found["base"]
    assert (own["learned"], own["learned_least"]) == (pytest.approx(2.5 / 3), 0.5)
    assert (own["kept"], own["kept_least"]) == (pytest.approx((0.8 + 0.8 + 0.1) / 3), 0.1)
    assert own["reached"] == 3 and on_other_tables(lines, best, share=0.95)["base"]["reached"] == 3
    assert on_other_tables(lines, best, share=1.1)["table"]["reached"] == 0, "then what learns most is taken"


def test_a_setting_that_one_table_lacks_is_no_choice() -> None:
    both = {1e-2: (1.0, 1.0), 1e-3: (1.0, 0.8)}
    lines = of_tables({("1m", "sum"): both, ("5m", "sum"): {1e-3: (0.5, 0.7)}})
    found = on_other_tables(lines, {("1m", "sum"): 1.0, ("5m", "sum"): 0.5}, share=0.95)
    assert found["settings"] == 1 and "task" not in found, "no other task is left"
    assert [(entry["learned"], entry["kept"]) for entry in found["table"]["chosen"]] == [(1.0, 0.8), (1.0, 0.7)]
    apart = of_tables({("1m", "sum"): {1e-2: (1.0, 1.0)}, ("5m", "sum"): {1e-3: (1.0, 1.0)}})
    assert on_other_tables(apart, dict.fromkeys(apart, 1.0), share=0.95) == {"settings": 0}
