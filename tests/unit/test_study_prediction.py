"""What goes with forgetting: what is pooled, and what is not."""

from typing import Any

import pytest

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
