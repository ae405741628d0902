"""A base with a block whose output projections are zero, as block expansion adds them: a run says what it can say."""

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers.stages import CPU
from helpers.world import change_weights, make_base, make_recipe, make_texts
from nslora_dist.card import interference_tables
from nslora_dist.effects import Effect, interference, summarise
from nslora_dist.errors import UserError
from nslora_dist.pipeline import Run

ZERO = ("model.layers.1.self_attn.o_proj", "model.layers.1.mlp.down_proj")


def expand(tensors: dict[str, Tensor]) -> None:
    for name in ZERO:
        tensors[f"{name}.weight"].zero_()


def test_a_run_leaves_them_out_of_its_figures(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_texts(tmp_path)
    base = change_weights(make_base(tmp_path / "base"), tmp_path / "expanded", expand)
    evaluation = {"baselines": {"lora": {"adapter": {"method": "lora"}}}}
    changes = {"train": {"max_steps": 2, "log_every": 1}, "evaluation": evaluation}
    job = make_recipe(tmp_path, base, tmp_path / "run", **changes)
    with caplog.at_level(logging.WARNING):
        report = Run(job, CPU).train()
    assert all(f"{name} puts out nothing but zeros" in caplog.text for name in ZERO)
    for arm in ("null_space", "lora"):
        found = report["interference_by_arm"][arm]
        assert len(found["per_module"]) == 12 and not found["per_module"].keys() & set(ZERO), arm
        assert 0 < found["rms"] <= found["max"] < 100 and found["by_probe"]["p"]["max"] > 0
    assert Run(job, CPU).train()["interference_by_arm"] == report["interference_by_arm"]  # from disk

    budget = make_recipe(tmp_path, base, tmp_path / "budget", adapter={"interference_budget": 0.05})
    with pytest.raises(UserError, match=r"leave o_proj out of adapter\.target_modules, in every block, or go without"):
        Run(budget, CPU).train()
    assert not (tmp_path / "budget/checkpoints").exists() and (tmp_path / "budget/null_space").exists()


def test_nothing_is_measurable() -> None:
    energies = torch.tensor([0.0, 0.0, 0.0], dtype=torch.float64)
    found = interference([Effect("a", 1.0, {"m": energies}, 0.5)])
    assert found == {"a": {}, "calibration": {}}
    summary = summarise(found, [], {"calibration": 0.5})
    assert summary["max"] is summary["rms"] is None and summary["per_module"] == {} and summary["divergence"] == 0.5
    assert interference_tables(summary) == []
