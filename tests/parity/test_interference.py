"""The interference from r × r matrices is ‖ΔW X‖ / ‖W X‖ on the base's activations (docs/methods.md §1c, §1d)."""

import copy
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from helpers.parity_run import CASES, ENGINES, Found, dense_update
from helpers.stages import dense_divergence, dense_energies, plain_base

Results = dict[str, dict[str, Found]]
Ratios = dict[str, dict[str, float]]

FROM_GRAMS = [name for name, case in CASES.items() if "v1" not in name and "method" not in case.changes["adapter"]]


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


def direct(found: Found, base: nn.Module) -> tuple[Ratios, Ratios]:
    """name → module → ‖ΔW X‖ / ‖W X‖, every sequence alone and unpadded, ΔW and W dense, all in float64.

    In the mixture a source counts by its weight over its inputs' energy, as its Gram does in docs/methods.md §1d.

    Returns:
        The ratios, and ‖ΔW‖ ‖X‖ / ‖W X‖, what they could be at most.
    """
    updates = {name: dense_update(parts, found.scale) for name, parts in found.factors.items()}
    ratios: Ratios = {}
    most: Ratios = {}
    mixed = {module: [0.0, 0.0, 0.0] for module in updates}
    for name, (weight, sequences) in found.texts.items():
        energies = dense_energies(base, updates, sequences)
        ratios[name] = {module: (e.update / e.output) ** 0.5 for module, e in energies.items()}
        for module, e in energies.items() if weight is not None else ():
            for position, energy in enumerate((e.update, e.output, e.input)):
                mixed[module][position] += weight * energy / e.input
        most[name] = {m: float(updates[m].norm()) * (e.input / e.output) ** 0.5 for m, e in energies.items()}
    ratios["calibration"] = {module: (update / output) ** 0.5 for module, (update, output, _) in mixed.items()}
    most["calibration"] = {m: float(updates[m].norm()) * (i / o) ** 0.5 for m, (_, o, i) in mixed.items()}
    return ratios, most


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_direct_ratio(found: Results, bases: dict[Any, nn.Module], engine: str, case: str) -> None:
    """Relative and absolute tolerances, the latter in units of ‖ΔW‖_F ‖X‖_F / ‖W X‖_F, the most an update can do.

    float32, r × r matrices: a Gram entry is rounded to 1e-7 of the largest eigenvalue, so a *squared* ratio below 1e-7
    of the most possible is noise, and the root of that is 3e-4; the null directions here hold more than that, except
    where there are fewer tokens than dimensions. Forward pass: an activation is rounded to 1e-7, and so is the ratio.
    bfloat16: the base's activations differ from float64 ones by a few units of 2⁻⁸ after two blocks.
    """
    result = found[engine][case]
    expected, most = direct(result, bases[_key(CASES[case].base, CASES[case].changes["base_model"])])
    assert expected.keys() == {"a", "b", "p", "calibration"}
    bf16 = CASES[case].changes["base_model"].get("dtype") == "bfloat16"
    checks = [("forward pass", result.forward, (0.05, 1e-3) if bf16 else (1e-4, 1e-6))]
    if case in FROM_GRAMS:
        checks.append(("r × r matrices", result.live, (0.05, 1e-3) if bf16 else (1e-3, 3e-4)))
    else:
        assert result.live == result.forward, "an A that trained is measured by a forward pass"
    for kind, measured, (relative, absolute) in checks:
        assert measured.keys() == expected.keys(), kind
        for name, modules in expected.items():
            assert measured[name].keys() == modules.keys()
            for module, ratio in modules.items():
                floor = absolute * most[name][module]
                assert measured[name][module] == pytest.approx(ratio, rel=relative, abs=floor), (
                    f"{kind}: {name} {module}"
                )
    assert max(expected["calibration"].values()) > 1e-3, "nothing was disturbed, so nothing was compared"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", CASES)
def test_divergence_is_that_of_the_merged_model(
    found: Results, bases: dict[Any, nn.Module], engine: str, case: str
) -> None:
    """Float32: a log-probability is rounded to about 1e-6, which KL, near zero a square, sees as 1e-6 of itself less.

    bfloat16: hidden states are rounded by up to 2⁻⁸, so a log-probability to about 1e-2, and the divergence of two
    roundings of one model is about 1e-4; half of a small value is noise then.
    """
    result = found[engine][case]
    section = CASES[case].changes["base_model"]
    base = bases[_key(CASES[case].base, section)]
    updates = {name: dense_update(parts, result.scale) for name, parts in result.factors.items()}
    expected = {name: dense_divergence(base, updates, texts) for name, (_, texts) in result.texts.items()}
    weights = {name: weight for name, (weight, _) in result.texts.items() if weight is not None}
    expected["calibration"] = sum(w * expected[name] for name, w in weights.items()) / sum(weights.values())
    if section.get("dtype") == "bfloat16":
        assert result.divergence == pytest.approx(expected, rel=0.5, abs=2e-4)
        return
    assert result.divergence == pytest.approx(expected, rel=1e-3, abs=1e-7)
    if case in ("delta", "lora", "null_lora"):
        assert min(expected.values()) > 1e-5, "nothing moved, so nothing was compared"


@pytest.mark.parametrize("engine", ENGINES)
def test_summary(found: Results, engine: str) -> None:
    result = found[engine]["delta"]
    mixture = result.live["calibration"]
    assert result.summary["per_module"] == mixture and len(mixture) == 14
    assert result.summary["max"] == pytest.approx(max(mixture.values()))
    assert result.summary["mean"] == pytest.approx(sum(mixture.values()) / 14)
    assert result.summary["divergence"] == result.divergence["calibration"]
    assert result.summary["by_probe"]["p"]["divergence"] == result.divergence["p"]
    assert set(result.summary["by_source"]) == {"a", "b"} and set(result.summary["by_probe"]) == {"p"}
    assert result.summary["by_probe"]["p"]["max"] == pytest.approx(max(result.live["p"].values()))


def test_reference_can_tell_a_wrong_scale(found: Results, bases: dict[Any, nn.Module]) -> None:
    """Leaving out alpha / rank = 1.5 would show."""
    wrong = copy.copy(found["single"]["delta"])
    wrong.scale = 1.0
    expected, _ = direct(wrong, bases[_key("llama", {})])
    assert found["single"]["delta"].live["a"] != pytest.approx(expected["a"], rel=0.05)
