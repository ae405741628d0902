"""Through the launch scripts' one call: nothing is written through a link, and no secret is shown."""

import sys
from pathlib import Path

import pytest

from helpers.launching import World
from nslora_dist import command
from nslora_dist.errors import EXIT_USER_ERROR
from nslora_dist.pipeline import run_calibration


def test_a_link_in_the_run_folder_is_refused_before_anything_is_written(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "run"
    elsewhere.mkdir()
    monkeypatch.setattr(sys, "argv", ["calibrate.py", "--recipe", str(world.recipe), f"output_dir={folder}"])
    assert command.run("test", run_calibration) == 0
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    (folder / "null_space" / "manifest.json").rename(tmp_path / "manifest.json")
    (folder / "null_space" / "null_space.safetensors").unlink()
    (folder / "null_space").rmdir()
    (folder / "null_space").symlink_to(elsewhere)
    assert command.run("test", run_calibration) == EXIT_USER_ERROR
    assert "null_space in it is a symbolic link" in capsys.readouterr().err
    assert not list(elsewhere.iterdir())
    assert (folder / "recipe.yaml").stat().st_mtime_ns == before[folder / "recipe.yaml"]


def test_no_token_is_shown_where_the_hub_fails(
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    token = "hf_" + "x1Y2" * 9
    monkeypatch.setenv("HF_TOKEN", token)
    caplog.set_level("DEBUG", logger="nslora_dist")
    given = ["base_model.path=some/model", f"output_dir={tmp_path / 'run'}"]
    monkeypatch.setattr(sys, "argv", ["calibrate.py", "--recipe", str(world.recipe), *given])
    assert command.run("test", run_calibration) == EXIT_USER_ERROR
    said = capsys.readouterr()
    assert "some/model" in said.err
    assert token not in said.err + said.out + caplog.text
    assert not (tmp_path / "run").exists()
