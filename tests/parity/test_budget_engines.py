"""Every engine keeps every step within the interference budget, by the same numbers, and goes on from a checkpoint."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.budget_run import CLIPPED, SAVED, STEPS, Budgeted, scale_and_look, train_each
from helpers.ranks import run_ranks
from helpers.world import make_base, make_texts

MODULE, TOTAL = 0.005, 0.004
"""What a module at most, and all of them by their root mean square, come to without a budget: 0.011 and 0.0075."""
RANDOM = 0.02
"""The same for a frozen random A: every step takes the largest module to it."""
CASES: dict[str, dict[str, Any]] = {
    "none": {},
    "loose": {"adapter": {"interference_budget": 9.0}},
    "module": {"adapter": {"interference_budget": MODULE}},
    "total": {"adapter": {"interference_budget": TOTAL, "budget_over": "total"}},
    "bfloat16": {"adapter": {"interference_budget": MODULE}, "base_model": {"dtype": "bfloat16"}},
    "random": {"adapter": {"method": "lora", "freeze_a": True, "interference_budget": RANDOM}},
}
RUN = {
    "single-1": ("none", "loose", "module", "from_module", "total", "bfloat16", "random", "from_random"),
    "fsdp2-2": ("none", "loose", "module", "from_module", "total", "bfloat16", "random", "from_random"),
    "zero3-2": ("none", "loose", "module", "from_module", "total", "bfloat16", "random", "from_random"),
    "zero3-3": ("none", "module", "total", "random"),
    "zero3_offload-2": ("none", "module", "total", "random"),
}
PAIRS = [(layout, case) for layout, cases in RUN.items() for case in cases]
Results = dict[str, dict[str, Budgeted]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_texts(tmp_path_factory.mktemp("budget"))
    make_base(folder / "llama")
    return folder


@pytest.fixture(scope="module")
def trained(world: Path) -> Results:
    """layout → case, as rank 0 found it; the others found the same, to the last bit."""
    results = {}
    for layout, names in RUN.items():
        cases = {name: CASES[name.removeprefix("from_")] for name in names}
        first, *others = run_ranks(train_each, int(layout[-1]), layout, world, cases, timeout=600)
        for other in others:
            for name, found in first.items():
                assert found.dense == other[name].dense and found.facts == other[name].facts
        results[layout] = first
    return results


def rms(values: dict[str, float]) -> float:
    return math.sqrt(sum(value**2 for value in values.values()) / len(values))


@pytest.mark.parametrize(("layout", "case"), [pair for pair in PAIRS if pair[1] not in ("none", "loose", "total")])
def test_every_module_keeps_within_it_after_every_step(trained: Results, layout: str, case: str) -> None:
    found, free = trained[layout][case], trained[layout]["none"]
    assert len(found.dense) == STEPS - (SAVED if case.startswith("from_") else 0)
    limit = RANDOM if case.endswith("random") else MODULE
    for step in found.dense:
        assert max(step.values()) == pytest.approx(limit, rel=1e-6), "over the budget, or never on it"
    if limit == RANDOM:
        return
    assert max(free.dense[0].values()) > MODULE and max(free.dense[-1].values()) > 1.5 * MODULE
    assert min(found.dense[-1].values()) < 0.9 * MODULE, "a module within its budget is left alone"


@pytest.mark.parametrize("layout", RUN)
def test_the_root_mean_square_keeps_within_it(trained: Results, layout: str) -> None:
    first, *found = trained[layout]["total"].dense
    assert rms(first) < TOTAL, "the first step alone does not reach it"
    assert [rms(step) for step in found] == pytest.approx([TOTAL] * (STEPS - 1), rel=1e-6)
    assert max(found[-1].values()) > 1.2 * TOTAL, "all B are scaled alike, so modules keep their proportions"


def test_the_first_step_scales_the_modules_above_it_alone(trained: Results) -> None:
    """Before anything else differs between a free training and one that is bound."""
    free, bound = trained["single-1"]["none"].dense[0], trained["single-1"]["module"].dense[0]
    over = {name for name, value in free.items() if value > MODULE}
    assert 0 < len(over) < len(free)
    assert {name for name, value in free.items() if value != bound[name]} == over
    assert free == trained["single-1"]["total"].dense[0], "within the total, so nothing is scaled"


@pytest.mark.parametrize("layout", list(RUN)[1:])
@pytest.mark.parametrize("case", ["module", "total", "random"])
def test_engines_agree(trained: Results, layout: str, case: str) -> None:
    """In losses, clipping and accumulation at work, on another number of ranks and micro-batches."""
    found, reference = trained[layout][case], trained["single-1"][case]
    assert found.losses == pytest.approx(reference.losses, rel=1e-5)
    assert found.losses != pytest.approx(trained[layout]["none"].losses, rel=1e-5), "the budget changed nothing"
    assert found.norms == pytest.approx(reference.norms, rel=1e-3)
    assert all(norm is not None and norm > CLIPPED for norm in found.norms), "clipping had nothing to do"
    for step, other in zip(found.dense, reference.dense, strict=True):
        assert step == pytest.approx(other, rel=1e-3)


@pytest.mark.parametrize("case", ["module", "random"])
@pytest.mark.parametrize("layout", list(RUN)[:3])
def test_resumes_to_the_last_bit(trained: Results, layout: str, case: str) -> None:
    whole, other = trained[layout][case], trained[layout][f"from_{case}"]
    assert (whole.losses, whole.norms) == (other.losses, other.norms)
    assert whole.dense[SAVED:] == other.dense
    assert all(torch.equal(value, other.factors[name]) for name, value in whole.factors.items())


@pytest.mark.parametrize("layout", list(RUN)[:3])
def test_a_budget_that_never_binds_changes_no_bit(trained: Results, layout: str) -> None:
    free, loose = trained[layout]["none"], trained[layout]["loose"]
    assert (free.losses, free.norms, free.dense) == (loose.losses, loose.norms, loose.dense)
    assert all(torch.equal(value, loose.factors[name]) for name, value in free.factors.items())


@pytest.mark.parametrize("layout", RUN)
@pytest.mark.parametrize("case", ["module", "total", "random"])
def test_what_is_kept_to_is_what_the_texts_see(trained: Results, layout: str, case: str) -> None:
    """B C Bᵀ, with C of the calibration pass or of the pass before training, against ‖ΔW x‖ token by token."""
    found = trained[layout][case]
    assert found.seen == pytest.approx(found.live, rel=1e-3)  # C in float32, and padding rounds activations otherwise
    assert found.facts is not None and found.facts["final"] == pytest.approx(found.facts["limit"], rel=1e-6)


@pytest.mark.parametrize("layout", RUN)
def test_the_report_is_told_the_final_value(trained: Results, layout: str) -> None:
    found = trained[layout]["module"]
    assert found.facts == {"limit": MODULE, "over": "module", "final": pytest.approx(MODULE, rel=1e-6)}
    assert max(found.live.values()) == pytest.approx(MODULE, rel=1e-4)
    total = trained[layout]["total"]
    assert total.facts == {"limit": TOTAL, "over": "total", "final": pytest.approx(TOTAL, rel=1e-6)}
    assert rms(total.live) == pytest.approx(TOTAL, rel=1e-4)
    if "bfloat16" in trained[layout]:  # the forward pass rounds B to 8 bits, at random: far less than 2⁻⁸ shows
        assert max(trained[layout]["bfloat16"].live.values()) == pytest.approx(MODULE, rel=2e-3)
    assert trained[layout]["none"].facts is None


@pytest.mark.parametrize("layout", ["single-1", "fsdp2-2", "zero3-2", "zero3-3", "zero3_offload-2"])
def test_scaling_reaches_the_master_and_its_copies_alone(world: Path, layout: str) -> None:
    for found in run_ranks(scale_and_look, int(layout[-1]), layout, world, timeout=200):
        assert found and all(found.values()), found
