"""The interference from r × r matrices is ‖ΔW X‖ / ‖W X‖ on the base's activations (METHODS.md §1c, §1d)."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.parity_run import CASES, ENGINES, Found, dense_update
from helpers.stages import dense_energies, plain_base
from torch import nn

Results = dict[str, dict[str, Found]]

FROM_GRAMS = [name for name, case in CASES.items() if "v1" not in name and name != "lora"]


@pytest.fixture(scope="session")
def bases(world: Path) -> dict[tuple[str, str, str], nn.Module]:
    """(base, dtype, quantization) → a plain float64 model of the values that the run computed with."""
    made = {}
    for case in CASES.values():
        key = _key(case.base, case.changes["base_model"])
        if key not in made:
            made[key] = plain_base(world / case.base, dtype=key[1], quantised=key[2] == "nf4").double()
    return made


def _key(base: str, section: dict[str, Any]) -> tuple[str, str, str]:
    return base, section.get("dtype", "float32"), section.get("quantization", "none")


def direct(found: Found, base: nn.Module) -> dict[str, dict[str, float]]:
    """name → module → ‖ΔW X‖ / ‖W X‖, every sequence alone and unpadded, ΔW and W dense, all in float64.

    In the mixture a source counts by its weight over its inputs' energy, as its Gram does in METHODS.md §1d.
    """
    updates = {name: dense_update(parts, found.scale) for name, parts in found.factors.items()}
    ratios: dict[str, dict[str, float]] = {}
    mixed = {module: [0.0, 0.0] for module in updates}
    for name, (weight, sequences) in found.texts.items():
        energies = dense_energies(base, updates, sequences)
        ratios[name] = {module: (e.update / e.output) ** 0.5 for module, e in energies.items()}
        for module, e in energies.items() if weight is not None else ():
            mixed[module][0] += weight * e.update / e.input
            mixed[module][1] += weight * e.output / e.input
    ratios["calibration"] = {module: (update / output) ** 0.5 for module, (update, output) in mixed.items()}
    return ratios


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_direct_ratio(found: Results, bases: dict[Any, nn.Module], engine: str, case: str) -> None:
    """Tolerances: in float32 a Gram entry is rounded to 1e-7 of the *largest* eigenvalue, and the null directions hold
    some 1e-3 of it, hence 1e-3 of the small number from r × r matrices; the forward pass sums the update itself and keeps
    1e-4. In bfloat16 the activations of the base differ from float64 ones by a few units of 2⁻⁸ after two blocks."""
    result = found[engine][case]
    expected = direct(result, bases[_key(CASES[case].base, CASES[case].changes["base_model"])])
    assert expected.keys() == {"a", "b", "p", "calibration"}
    bf16 = CASES[case].changes["base_model"].get("dtype") == "bfloat16"
    for kind, measured, tolerance in (
        ("r × r matrices" if case in FROM_GRAMS else "the pipeline's choice", result.live, 0.05 if bf16 else 1e-3),
        ("forward pass", result.forward, 0.05 if bf16 else 1e-4),
    ):
        assert measured.keys() == expected.keys(), kind
        for name, modules in expected.items():
            assert measured[name] == pytest.approx(modules, rel=tolerance), f"{name}, by {kind}"
    assert min(expected["calibration"].values()) > 1e-3, "nothing was disturbed, so nothing was compared"


@pytest.mark.parametrize("engine", ENGINES)
def test_summary(found: Results, engine: str) -> None:
    result = found[engine]["delta"]
    mixture = result.live["calibration"]
    assert result.summary["per_module"] == mixture and len(mixture) == 14
    assert result.summary["max"] == pytest.approx(max(mixture.values()))
    assert result.summary["mean"] == pytest.approx(sum(mixture.values()) / 14)
    assert set(result.summary["by_source"]) == {"a", "b"} and set(result.summary["by_probe"]) == {"p"}
    assert result.summary["by_probe"]["p"]["max"] == pytest.approx(max(result.live["p"].values()))


def test_reference_can_tell_a_wrong_scale(found: Results, bases: dict[Any, nn.Module]) -> None:
    """Leaving out alpha / rank = 1.5 would show."""
    wrong = copy.copy(found["single"]["delta"])
    wrong.scale = 1.0
    expected = direct(wrong, bases[_key("llama", {})])["a"]
    assert found["single"]["delta"].live["a"] != pytest.approx(expected, rel=0.05)
    assert torch.finfo(torch.float32).eps < 1e-6
