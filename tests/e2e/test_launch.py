"""The launch lines of the README, one process and two, from recipe to report."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.launching import Ended, World, free_port
from nslora_dist.recipe_file import load_recipe

ARMS = {"base", "lora", "null_space"}
MODULES = 14
"""Seven adapted linears in each of the toy base's two blocks."""


def report_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return found


def check_run(folder: Path, *, engine: str, ranks: int) -> None:
    """The report's documented keys and the files of a run."""
    report = report_of(folder)
    assert (report["engine"], report["world_size"], report["quantization"]) == (engine, ranks, "none")
    assert report["recipe"]["engine"]["name"] == engine
    assert len(report["losses"]) == 6
    assert all(math.isfinite(loss) and loss > 0 for loss in report["losses"])
    assert report["evaluation"].keys() == ARMS
    for scores in report["evaluation"].values():
        assert 0 <= scores["adaptation"] <= 1
        assert 0 <= scores["retention"] <= 1
        assert scores["retention_by"].keys() == {"kept"}
    interference = report["interference"]
    assert len(interference["per_module"]) == MODULES
    assert interference["max"] == pytest.approx(max(interference["per_module"].values()), rel=1e-6)
    assert 0 < interference["mean"] <= interference["max"]
    assert interference["budget"] == {"limit": 0.005, "over": "module", "final": pytest.approx(0.005, rel=1e-6)}
    assert interference["max"] == pytest.approx(0.005, rel=1e-4)
    assert 0 < interference["divergence"] < report["interference_by_arm"]["lora"]["divergence"]
    for name in ("report.md", "adapter/README.md"):
        assert "divergence, nats a token" in (folder / name).read_text()
        assert "within a budget of 0.005 for every module" in (folder / name).read_text()
    assert "budget" not in report["interference_by_arm"]["lora"]
    assert "budget" not in (folder / "baselines/lora/README.md").read_text()
    assert interference["by_source"].keys() == {"a", "b"}
    assert interference["by_probe"].keys() == {"p"}
    assert 0 <= report["leak"]["calibration"] < report["leak"]["random"]
    assert report["leak"]["heldout"] is not None
    assert {"data", "calibration", "training", "evaluation", "export"} <= report["seconds"].keys()
    assert report["tokens_per_second"] > 0
    peaks = report["peak_memory_by_phase"]
    assert max(peaks.values()) <= report["peak_memory_bytes"] and min(peaks.values()) > 2**20
    assert {"load", "training", "evaluation", "export"} <= set(peaks)
    assert report["adapter"] == str(folder / "adapter")
    for name in ("adapter", "baselines/lora"):
        factors = load_file(folder / name / "adapter_model.safetensors")
        assert len(factors) == 2 * MODULES
        assert all(tensor.numel() and tensor.isfinite().all() for tensor in factors.values())
        assert (folder / name / "adapter_config.json").is_file()
        assert "peft" in (folder / name / "README.md").read_text()
    own, other = (json.loads((folder / name / "nslora.json").read_text()) for name in ("adapter", "baselines/lora"))
    null_space = json.loads((folder / "null_space" / "manifest.json").read_text())
    assert own["base"] == other["base"] == null_space["hashes"]["base"]
    assert own["calibration"] == null_space["key"] and other["calibration"] is None
    grams = load_file(folder / "adapter" / "update_grams.safetensors")
    assert len(grams) == MODULES and all(float(gram.trace()) > 0 for gram in grams.values())
    assert not (folder / "baselines/lora/update_grams.safetensors").exists()
    for name in ("report.md", "recipe.yaml", "plots/loss.png", "plots/spectrum.png", "plots/interference.png"):
        assert (folder / name).stat().st_size > 0
    events = {path.parent.name: path.read_bytes() for path in (folder / "tensorboard").rglob("events.*")}
    assert {name for name, written in events.items() if b"interference_budget/spent" in written} == {"null_space"}


def check_null_space(folder: Path) -> dict[str, Any]:
    """Manifest and tensors of ``null_space/`` as documented."""
    manifest: dict[str, Any] = json.loads((folder / "null_space" / "manifest.json").read_text())
    tensors = load_file(folder / "null_space" / "null_space.safetensors")
    assert len(manifest["groups"]) == 8  # q/k/v, o, gate/up and down of two blocks
    for group, entry in manifest["groups"].items():
        basis, eigenvalues = tensors[f"{group}.basis"], tensors[f"{group}.eigenvalues"]
        assert basis.shape == (entry["in_features"], 8)
        assert (basis.dtype, eigenvalues.dtype, eigenvalues.shape) == (torch.float32, torch.float32, (8,))
        torch.testing.assert_close(basis.T @ basis, torch.eye(8), atol=1e-5, rtol=0)
        assert entry["leak"].keys() == {"calibration", "heldout", "random"}
        assert group in entry["modules"]
    assert sorted(m for g in manifest["groups"].values() for m in g["modules"]) == sorted(manifest["modules"])
    assert manifest["tokens"].keys() == {"a", "b", "p"}
    assert manifest["hashes"].keys() >= {"base", "data", "settings"}
    return manifest


def test_one_process(single_run: Path, world: World) -> None:
    check_run(single_run, engine="single", ranks=1)
    check_null_space(single_run)
    said = (world.folder / "single.log").read_text()
    for word in ("base", "plain LoRA", "null-space adapter", "task", "retention", str(single_run / "report.md")):
        assert word in said
    recipe = load_recipe(str(single_run / "recipe.yaml"))
    assert recipe.output_dir == str(single_run)
    assert recipe.engine.name == "single"


def test_calibrate_alone_then_torchrun_fsdp2_reuses_it(
    world: World, launch: Callable[..., Ended], single_run: Path
) -> None:
    folder = world.folder / "fsdp2"
    earlier = ["train.learning_rate=0.5", "adapter.interference_budget=0.1"]  # which the null space does not depend on
    ended = launch(sys.executable, "launch/calibrate.py", *earlier, f"output_dir={folder}")
    assert ended.status == 0, ended.errors
    assert sorted(path.name for path in folder.iterdir()) == ["logs", "null_space", "recipe.yaml"]
    check_null_space(folder)
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in (folder / "null_space").iterdir()}

    torchrun = ["torchrun", "--nproc-per-node", "2", "--master-port", free_port()]
    ended = launch(*torchrun, "launch/train.py", "engine.name=fsdp2", f"output_dir={folder}")
    assert ended.status == 0, ended.errors
    assert "used again" in ended.errors
    after = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in (folder / "null_space").iterdir()}
    assert after == before
    assert "calibration" not in report_of(folder)["seconds"]
    report = json.loads((folder / "report.json").read_text())
    report["seconds"]["calibration"] = 0.0
    (folder / "report.json").write_text(json.dumps(report))
    check_run(folder, engine="fsdp2", ranks=2)
    assert report_of(folder)["losses"] == pytest.approx(report_of(single_run)["losses"], rel=1e-4)


def test_deepspeed_zero3(world: World, launch: Callable[..., Ended], single_run: Path) -> None:
    folder = world.folder / "zero3"
    deepspeed = ["deepspeed", "--num_accelerators", "2", "--master_port", free_port()]
    ended = launch(
        *deepspeed,
        "launch/train.py",
        "engine.name=zero3",
        "engine.config=./ds_configs/zero3.json",
        f"output_dir={folder}",
    )
    assert ended.status == 0, ended.errors
    check_run(folder, engine="zero3", ranks=2)
    check_null_space(folder)
    assert report_of(folder)["losses"] == pytest.approx(report_of(single_run)["losses"], rel=1e-4)
    # Other packages' noise is kept from the user; the project's own lines are not.
    for noise in (
        "FutureWarning",
        "gemm_4bit_forward",
        "Setting accelerator to CPU",
        "built successfully",
        "Traceback",
    ):
        assert noise not in ended.errors + ended.output


def test_a_second_run_reuses_the_null_space_and_a_changed_one_does_not(
    world: World, launch: Callable[..., Ended], single_run: Path
) -> None:
    manifest = single_run / "null_space" / "manifest.json"
    before = manifest.read_bytes(), manifest.stat().st_mtime_ns
    key = json.loads(before[0])["key"]
    ended = launch(sys.executable, "launch/calibrate.py", "engine.name=single", f"output_dir={single_run}")
    assert ended.status == 0, ended.errors
    assert "used again" in ended.errors
    assert (manifest.read_bytes(), manifest.stat().st_mtime_ns) == before
    other = world.folder / "other"
    ended = launch(sys.executable, "launch/calibrate.py", "calibration.samples=10", f"output_dir={other}")
    assert ended.status == 0, ended.errors
    assert json.loads((other / "null_space" / "manifest.json").read_text())["key"] != key


def test_dry_run_of_the_largest_needs_no_network_and_no_weights(launch: Callable[..., Ended]) -> None:
    ended = launch(sys.executable, "launch/train.py", "--recipe", "llama3_70b_math", "--dry-run", "adapter.rank=64")
    assert ended.status == 0, ended.errors
    assert "70,553,706,496" in ended.output
    assert "down_proj (64, 28672) (8192, 64)" in ended.output
