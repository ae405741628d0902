"""``launch/merge.py`` as a user calls it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from helpers.launching import Ended, World, free_port
from helpers.merge_world import make_adapter, write_inputs


@pytest.fixture(scope="module")
def merge_recipe(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("merge")
    for seed, name in enumerate("ab"):
        make_adapter(folder / name, world.folder / "base", "llama", seed=seed)
    tree = {
        "base_model": {"path": str(world.folder / "base"), "dtype": "float32", "shard": True},
        "adapters": {"a": {"path": "./a"}, "b": {"path": "./b"}},
        "method": "nsc",
        "nsc": {"steps": 2, "batch_size": 2},
        "inputs": write_inputs(folder, "llama"),
        "output_dir": "./out",
    }
    (folder / "merge.yaml").write_text(yaml.safe_dump(tree))
    return folder / "merge.yaml"


def test_under_torchrun_then_refused(merge_recipe: Path, launch: Callable[..., Ended]) -> None:
    command = ["torchrun", "--nproc-per-node", "2", "--master-port", free_port(), "launch/merge.py"]
    ended = launch(*command, "--recipe", str(merge_recipe))
    assert ended.status == 0, ended.errors
    out = merge_recipe.parent / "out"
    assert {path.name for path in out.iterdir()} == {"adapter", "null_space_ratio.png", "recipe.yaml", "report.json"}
    assert json.loads((out / "report.json").read_text())["world_size"] == 2
    assert "ω before" in ended.output and str(out / "adapter") in ended.output
    written = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    ended = launch("python", "launch/merge.py", "--recipe", str(merge_recipe))
    assert ended.status == 2 and "exists already" in ended.one_line_error()
    assert written == {path: path.stat().st_mtime_ns for path in out.rglob("*")}


def test_dry_run_and_mistakes_end_early(merge_recipe: Path, launch: Callable[..., Ended]) -> None:
    ended = launch("python", "launch/merge.py", "--recipe", str(merge_recipe), "--dry-run", "nsc.steps=7")
    assert ended.status == 0 and "steps: 7" in ended.output and "b: 6 modules, rank 4" in ended.output
    ended = launch("python", "launch/merge.py", "--recipe", str(merge_recipe), "nsc.step=7")
    assert ended.status == 2
    assert ended.one_line_error() == "nsc.step: unknown key (did you mean 'steps'?) (on the command line)"
