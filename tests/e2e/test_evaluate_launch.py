"""``launch/evaluate.py`` as a user calls it, and what it says of a wrong adapter."""

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from helpers.launching import ROOT, Ended, World, free_port
from nslora_dist import command
from nslora_dist.errors import EXIT_USER_ERROR
from nslora_dist.evaluate_adapter import run_evaluation
from nslora_dist.provenance import PROVENANCE_FILE, Provenance, write_provenance

Fails = Callable[..., str]


@pytest.fixture
def fails(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Fails:
    """Runs the script's one call in this process, on an output that must not come to be; its error."""
    spec = importlib.util.spec_from_file_location("evaluate_script", ROOT / "launch" / "evaluate.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def run(*arguments: str, output: Path | None = None) -> str:
        target = output or tmp_path / "evaluation.json"
        given = ["evaluate.py", "--recipe", str(world.recipe), "--output", str(target), *arguments]
        monkeypatch.setattr(sys, "argv", given)
        capsys.readouterr()
        assert command.run("test", run_evaluation, flags=script.flags) == EXIT_USER_ERROR
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(said) == 1
        if output is None:
            assert not target.exists()
        return said[0].removeprefix("error: ")

    return run


@pytest.fixture
def changed(single_run: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the run's adapter with its tensors and its config changed."""

    def make(change: Callable[[dict[str, Any]], None] = lambda tensors: None, **config: Any) -> Path:
        folder = tmp_path / "changed"
        shutil.copytree(single_run / "adapter", folder)
        (folder / PROVENANCE_FILE).unlink()  # or the changes would be refused as damage
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
        return folder

    return make


def test_torchrun_prints_one_table_and_leaves_one_file(
    world: World, launch: Callable[..., Ended], single_run: Path
) -> None:
    target = world.folder / "new" / "figures.json"
    torchrun = ["torchrun", "--nproc-per-node", "2", "--master-port", free_port(), "launch/evaluate.py"]
    adapters = ["--adapter", f"ours={single_run / 'adapter'}", f"--adapter={single_run / 'baselines' / 'lora'}"]
    arguments = [*adapters, "engine.name=fsdp2", "--output", str(target)]
    ended = launch(*torchrun, *arguments)
    assert ended.status == 0, ended.errors
    for word in ("base", "ours", "plain LoRA", "retention", "rms", str(target)):
        assert word in ended.output
    found = json.loads(target.read_text())
    report = json.loads((single_run / "report.json").read_text())
    assert list(found["evaluation"]) == ["base", "ours", "lora"]
    for ours, arm in (("ours", "null_space"), ("lora", "lora")):
        # Six steps: some modules hardly moved, and training reads a frozen A off float32 matrices with a floor.
        ratios, wanted = (
            f["per_module"] for f in (found["interference_by_arm"][ours], report["interference_by_arm"][arm])
        )
        assert ratios == pytest.approx(wanted, rel=1e-3, abs=1e-4)
        moved = found["interference_by_arm"][ours]["divergence"]
        assert moved == pytest.approx(report["interference_by_arm"][arm]["divergence"], rel=1e-3, abs=1e-6)
        assert found["adapters"][ours]["same_base"] is True
    assert (found["engine"], found["world_size"]) == ("fsdp2", 2)
    before = target.read_bytes()
    ended = launch(sys.executable, "launch/evaluate.py", *arguments, "engine.name=single")
    assert ended.status == EXIT_USER_ERROR
    assert ended.one_line_error() == f"--output {target}: exists already; give another path, or move it away"
    assert target.read_bytes() == before


def test_wrong_folders_and_names(fails: Fails, single_run: Path, tmp_path: Path) -> None:
    folder = single_run / "adapter"
    assert fails("--adapter=nowhere").endswith("nowhere: no such folder; give the folder of a PEFT adapter")
    assert "it holds no adapter_config.json" in fails(f"--adapter=run={single_run}")
    assert "has the name 'adapter' already; give NAME=FOLDER" in fails("--adapter", str(folder), f"--adapter={folder}")
    assert "the name 'base' is empty or taken" in fails(f"--adapter=base={folder}")
    (tmp_path / "file").write_text("")
    assert "cannot be written (File exists); give another path" in fails(
        f"--adapter={folder}", output=tmp_path / "file" / "evaluation.json"
    )
    assert "exists already" in fails(f"--adapter={folder}", output=tmp_path / "file")


def test_an_adapter_of_another_base(fails: Fails, changed: Callable[..., Path]) -> None:
    prefix = "base_model.model.model.layers.1.self_attn.q_proj"

    def narrow(tensors: dict[str, Any]) -> None:
        tensors[f"{prefix}.lora_A.weight"] = tensors[f"{prefix}.lora_A.weight"][:, :-1].contiguous()

    folder = changed(narrow)
    assert "model.layers.1.self_attn.q_proj is (64, 63) and the base's (64, 64)" in fails(f"--adapter=x={folder}")
    shutil.rmtree(folder)

    def rename(tensors: dict[str, Any]) -> None:
        for side in "AB":
            key = f"{prefix}.lora_{side}.weight"
            tensors[key.replace("layers.1", "layers.7")] = tensors.pop(key)

    folder = changed(rename)
    assert "adapts model.layers.7.self_attn.q_proj, and the base's blocks have no such" in fails(
        f"--adapter=x={folder}"
    )


def test_what_is_no_low_rank_update(fails: Fails, changed: Callable[..., Path]) -> None:
    folder = changed(use_dora=True)
    assert "is a DoRA adapter" in fails(f"--adapter=x={folder}")
    shutil.rmtree(folder)

    def head(tensors: dict[str, Any]) -> None:
        tensors["base_model.model.lm_head.weight"] = next(iter(tensors.values())).clone()

    folder = changed(head, modules_to_save=["lm_head"])
    assert "replaces lm_head.weight as a whole (modules_to_save)" in fails(f"--adapter=x={folder}")


def test_another_base_s_adapter_is_measured_and_said(
    world: World, changed: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    folder = changed()
    write_provenance(folder, Provenance("another", None, "some/base"))
    target = tmp_path / "evaluation.json"
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--recipe", str(world.recipe)])

    def measure(recipe: Any, device: Any) -> None:
        run_evaluation(recipe, device, adapter=[f"x={folder}"], output=str(target))

    assert command.run("test", measure) == 0
    assert "--adapter x: was made on another base, some/base" in caplog.text
    assert json.loads(target.read_text())["adapters"]["x"]["same_base"] is False
