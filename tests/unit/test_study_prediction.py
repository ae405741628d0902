"""What goes with forgetting: what is pooled, and what is not."""

from typing import Any

import pytest

from nslora_dist.study.plots import _kin, _look
from nslora_dist.study.prediction import in_null_space, predict
from nslora_dist.study.spec import AGGREGATES, FEW, PIECES, load_study

STUDY = load_study("frontier")
CELLS = 10


def line(
    arm: str, size: str, number: int, *, interference: float, forgotten: float, modules: int = 28
) -> dict[str, Any]:
    measured = dict.fromkeys(AGGREGATES, interference)
    return {
        "arm": arm,
        "size": size,
        "task": "minimum",
        "calibration": "all",
        "covered": list(PIECES),
        "sequences": 256,
        "weight_decay": float(number),
        "adapted_modules": modules,
        "interference": {
            "calibration": measured,
            "probes": dict.fromkeys(PIECES, measured),
            "few": dict.fromkeys(map(str, FEW), interference),
        },
        "retention": 1.0 - forgotten,
        "retention_by": dict.fromkeys(PIECES, 1.0 - forgotten),
        "base": {"retention": 1.0, "retention_by": dict.fromkeys(PIECES, 1.0)},
    }


def rising(arm: str, size: str, *, start: float, lost: float, modules: int = 28) -> list[dict[str, Any]]:
    """Cells of an arm on a base in which more interference goes with more forgetting."""
    return [
        line(arm, size, n, interference=start + 0.01 * n, forgotten=lost + 0.01 * n, modules=modules)
        for n in range(CELLS)
    ]


def test_which_arms_are_confined_to_a_null_space() -> None:
    confined = {name for name in STUDY.grids["frontier"].arms if in_null_space(STUDY.arms[name])}
    assert confined == {"delta", "lora_null_v2", "null_lora"}


def test_within_is_one_base_and_arm_at_a_time() -> None:
    """On the second base less is lost at more interference: pooled, an arm's order would be turned over."""
    lines = rising("lora", "1m", start=0.1, lost=0.5) + rising("lora", "5m", start=0.5, lost=0.1)
    found = predict(lines, STUDY, draws=2)["aggregates"]["rms"]
    assert found["within"] == {"lora": pytest.approx(1.0)} and found["within_mean"] == pytest.approx(1.0)
    assert found["across"]["value"] < 0


def test_arms_in_a_null_space_are_looked_at_apart() -> None:
    """They lose as much at a hundredth of the interference."""
    lines = rising("lora", "1m", start=0.5, lost=-0.001) + rising("delta", "1m", start=0.005, lost=0.2)
    found = predict(lines, STUDY, draws=2)["aggregates"]["rms"]
    assert found["across_others"]["value"] == pytest.approx(1.0) and found["across"]["value"] < 0.5
    assert found["safe_below_others"]["value"] == pytest.approx(0.51)  # of LoRA's, the two that lost at most 1%
    assert found["safe_below_in_null_space"]["value"] is None


def test_a_module_without_an_adapter_disturbs_nothing() -> None:
    """Null-LoRA adapts a quarter of the modules twice as strongly: over all of them that is LoRA's root mean square."""
    lora = rising("lora", "1m", start=0.1, lost=0.1)
    null = rising("null_lora", "1m", start=0.1, lost=0.1, modules=7)
    for own in null:
        own["interference"]["calibration"] = {k: 2 * v for k, v in own["interference"]["calibration"].items()}
    found = predict(lora + null, STUDY, draws=2)["aggregates"]
    assert found["rms"]["across"]["value"] == pytest.approx(1.0)
    assert found["max"]["across"]["value"] < 0.9  # the largest module's is what it is


def test_a_limit_is_judged_where_it_was_not_set() -> None:
    """The small base loses from 0.3 on, the large one from 0.1 on: the small base's limit lets two of these pass."""
    small = [line("lora", "1m", n, interference=0.1 * n, forgotten=0.5 if n >= 3 else 0.0) for n in range(6)]
    large = [line("lora", "5m", n, interference=0.1 * n, forgotten=0.25 * (n >= 1) * n) for n in range(4)]
    found = predict([*small, *large], STUDY, draws=2)["limit"]
    assert (found["below"]["value"], found["cells"], found["harmless"]) == (pytest.approx(0.1), 2, 4)
    # Of the small base one cell lies below the large one's 0.1, of the large base three below the small one's 0.3.
    judged = found["elsewhere"]["base"]
    assert judged == {"limits": pytest.approx([0.1, 0.3]), "cells": 4, "lost": 2, "most": 0.5}
    assert found["elsewhere"]["table"] == judged
    none = {"limits": None, "cells": 0, "lost": 0, "most": None}
    assert found["elsewhere"]["task"] == none, "there is no other task"
    harmless = [line("lora", "5m", n, interference=0.1 * n, forgotten=0.0) for n in range(4)]
    found = predict([*small, *harmless], STUDY, draws=2)["limit"]
    assert found["elsewhere"]["base"]["cells"] == 3, "no limit is set for the small base, which loses"
    found = predict(small[:3], STUDY, draws=2)["limit"]
    assert found["below"]["value"] is None and found["cells"] == 3


def test_other_ranks_and_budgets_look_as_their_method() -> None:
    kin = _kin(STUDY, STUDY.grids["frontier"].arms)
    assert {arm: kin[arm] for arm in ("delta_r8", "budget_004", "frozen_a_budget_080", "lora_r16", "pissa")} == {
        "delta_r8": "delta",
        "budget_004": "delta",
        "frozen_a_budget_080": "lora_frozen_a",
        "lora_r16": "lora",
        "pissa": "pissa",
    }
    colours = [_look(number)["color"] for number in range(len(STUDY.grids["frontier"].arms))]
    assert len(set(colours)) == len(colours), "each compared arm has its own"
