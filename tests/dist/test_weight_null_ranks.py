"""Null spaces of weights on two ranks: dealt out or on rank 0, kept on disk and used again (docs/methods.md §2.1)."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.ranks import run_ranks
from helpers.stages import CPU
from helpers.weight_null_run import NULL_LORA, recipe, refused, spread, used_again
from helpers.world import change_weights, make_base, make_recipe, make_texts
from nslora_dist.arm_job import Arm
from nslora_dist.arm_stage import start_hash
from nslora_dist.calibration import weights
from nslora_dist.pipeline import Run, run_calibration


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_texts(tmp_path_factory.mktemp("weights"))
    make_base(folder / "llama")
    return folder


def test_who_decomposes_does_not_matter(world: Path) -> None:
    """The same bits from one rank, from rank 0 of two, and dealt over two; every rank receives them."""
    (alone,) = run_ranks(spread, 1, world, "llama")
    first, second = run_ranks(spread, 2, world, "llama")
    manifest, tensors, _, _ = alone["rank0"]
    assert len(manifest) == 14 and len(tensors) == 28
    for placement in ("rank0", "spread"):
        assert first[placement][0] == second[placement][0] == manifest
        assert first[placement][1].keys() == tensors.keys() and not second[placement][1]
        assert all(torch.equal(first[placement][1][key], value) for key, value in tensors.items())
        for name, pair in second[placement][3].items():
            assert all(torch.equal(pair[n], tensors[f"{name}.{side}"]) for n, side in enumerate(("right", "left")))
    assert len(first["rank0"][2]) == 14 and not second["rank0"][2]
    dealt = [set(found["spread"][2]) for found in (first, second)]
    assert min(map(len, dealt)) >= 4 and not dealt[0] & dealt[1] and len(dealt[0] | dealt[1]) == 14


def test_weight_null_space_on_disk(world: Path) -> None:
    first, second = run_ranks(used_again, 2, world)
    for said in (first, second):
        assert said["same"] == said["a smaller rank"] == "uses it again"
        for change in ("another threshold", "another dim", "fewer targets"):
            assert said[change] == "decomposes", (change, said[change])
        assert said["damaged"].startswith("refuses: ") and "weight_null_space" in said["damaged"]


def test_no_null_space_at_all_is_said_before_training_with_a_threshold_that_helps(world: Path) -> None:
    for message in run_ranks(refused, 2, world, "llama", 1e-3):
        match = re.search(r"null_threshold 0\.001: no target weight has two .* at (\S+) of the largest", message)
        assert match, message
    assert refused(world, "llama", 1.01 * float(match[1])) == "an engine was started"
    assert "no target weight" in refused(world, "llama", 0.99 * float(match[1]))


def test_a_weight_that_is_not_finite_is_named_on_every_rank(world: Path) -> None:
    def poison(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")

    if not (world / "poisoned").exists():
        change_weights(world / "llama", world / "poisoned", poison)
    said = run_ranks(refused, 2, world, "poisoned", 0.3)
    assert all(re.search(r"layers\.1\.mlp\.up_proj: .*not finite", message) for message in said), said


def test_calibration_of_a_null_lora_recipe_stops_at_its_own_null_spaces(world: Path) -> None:
    run_calibration(recipe(world, "llama", "stops"), CPU)
    assert sorted(path.name for path in (world / "stops").iterdir()) == ["recipe.yaml", "weight_null_space"]


def test_arms_of_different_settings_each_keep_their_own(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A restart decomposes nothing again, and what a checkpoint belongs to does not hang on the other arms."""
    baselines = {"wider": {"adapter": {"null_threshold": 0.4}}, "again": {"train": {"learning_rate": 0.5}}}
    job = make_recipe(world, world / "llama", world / "arms", adapter=NULL_LORA, evaluation={"baselines": baselines})
    arms = {"own": job} | {name: job.arm(name) for name in baselines}

    def starts() -> dict[str, Any]:
        run, found = Run(job, CPU), {}
        spaces = {name: run.weight_null_space(arm) for name, arm in arms.items()}
        for name, space in spaces.items():
            assert space is not None
            data: Any = None
            found[name] = start_hash(Arm(name, arms[name], space, data), run.folder)
            assert space.manifest["settings"]["threshold"] == arms[name].adapter.null_threshold
        return found

    first = starts()
    assert first["own"] == first["again"] != first["wider"]
    monkeypatch.setattr(weights, "weight_null_spaces", None)
    assert starts() == first


def test_a_whole_run_with_null_lora_as_a_baseline(world: Path) -> None:
    """It is trained, measured by a forward pass, exported with its card, reported, and taken up by the next run."""
    task = {"path": str(world / "task.jsonl"), "samples": 20}
    arm = {"adapter": NULL_LORA | {"null_threshold": 0.23}, "train": {"weight_decay": 0.0}}
    evaluation = {"adaptation": task, "retention": {"same": task}, "baselines": {"null_lora": arm}}
    changes: dict[str, Any] = {"evaluation": evaluation, "train": {"max_steps": 2}}
    job = make_recipe(world, world / "llama", world / "whole", **changes)
    report = Run(job, CPU).train()
    assert report["evaluation"].keys() == {"base", "null_space", "null_lora"}
    facts = report["weight_null_space"]["null_lora"]
    ranks = {name: entry["rank"] for name, entry in facts["modules"].items()}
    assert len(ranks) == 14 and facts["left_out"] == [name for name, rank in ranks.items() if rank == 0] != []
    measured = report["interference_by_arm"]["null_lora"]
    assert measured["per_module"].keys() == {name for name, rank in ranks.items() if rank}
    assert measured["max"] > 0 and measured["by_probe"].keys() == {"p"}
    folder = world / "whole" / "baselines" / "null_lora"
    card = (folder / "README.md").read_text()
    assert "Null-LoRA (arXiv 2512.15233)" in card and "Left out, for want of a null space: model.layers" in card
    config = json.loads((folder / "adapter_config.json").read_text())
    written = {name: config["rank_pattern"].get(name, config["r"]) for name, rank in ranks.items() if rank}
    assert written == {name: rank for name, rank in ranks.items() if rank} and len(set(written.values())) > 1
    before = (folder / "adapter_model.safetensors").stat().st_mtime_ns
    again = Run(job, CPU).train()
    assert again["evaluation"] == report["evaluation"] and again["weight_null_space"] == report["weight_null_space"]
    assert (folder / "adapter_model.safetensors").stat().st_mtime_ns == before
