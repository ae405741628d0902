"""What a calibration pass says of its solver."""

import pytest
import torch

from nslora_dist import eigensolver
from nslora_dist.calibration.entries import Entries
from nslora_dist.calibration.grams import GroupSums
from nslora_dist.calibration.solve import solve_group
from nslora_dist.input_groups import InputGroup, LinearShape
from nslora_dist.recipe_adapter import AdapterSection
from nslora_dist.recipe_data import CalibrationSection

WIDTH, RANK = 512, 4


def solved(gram: torch.Tensor) -> Entries:
    """The entries of one group with this Gram, solved by ``fast``."""
    section = CalibrationSection.model_validate({"sources": {"a": {"path": "a"}}})
    adapter = AdapterSection.model_validate({"rank": RANK, "a_init": "orthonormal"})
    group = InputGroup("block.q", (LinearShape("block.q", WIDTH, WIDTH),))
    sums = GroupSums(group, basis=None, device=torch.device("cpu"))
    sums.energy += float(gram.trace())
    sums.outputs["block.q"] += 1.0
    common = {"source_weights": {"a": 1.0}, "traces": {"a": float(gram.trace())}}
    solution = solve_group({"a": gram}, {}, **common, adapter=adapter, section=section)
    entries = Entries({"a": 1.0})
    entries.solved(group, solution, {"a": {"block.q": sums}})
    return entries


def test_a_solver_that_gave_up_is_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    rows = torch.randn(2 * WIDTH, WIDTH, generator=torch.Generator().manual_seed(0))
    for fell in (False, True):
        if fell:
            monkeypatch.setattr(eigensolver, "_SHIFT_GROWTH", ())  # no factorisation ever succeeds
        entries = solved(rows.T @ rows)
        entries.tell_fallbacks()
        assert entries.groups["block.q"]["fell_back_to_eigh"] == fell
        assert ("1 of 1 groups were solved by eigh" in caplog.text and "block.q" in caplog.text) == fell
