"""Whatever is wrong with the input: one line, a non-zero status on every rank, and nothing overwritten."""

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file

from helpers.launching import Ended, World, free_port
from nslora_dist import command
from nslora_dist.errors import EXIT_USER_ERROR
from nslora_dist.pipeline import run_calibration, run_training

Fails = Callable[..., str]


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder and its hash."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def fails(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Fails:
    """Runs ``launch/train.py``'s one call in this process, on a run folder that must not come to be; its error."""

    def run(*overrides: str, recipe: str | None = None, output: Path | None = None, calibrate: bool = False) -> str:
        folder = output or tmp_path / "run"
        arguments = ["train.py", "--recipe", recipe or str(world.recipe), *overrides]
        monkeypatch.setattr(sys, "argv", [*arguments, *([f"output_dir={folder}"] if recipe is None else [])])
        capsys.readouterr()
        status = command.run("test", run_calibration if calibrate else run_training)
        assert status == EXIT_USER_ERROR
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(said) == 1
        if output is None:
            assert not folder.exists()
        return said[0].removeprefix("error: ")

    return run


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["base_model.path=./nowhere"], "nowhere: no such folder"),
        (["base_model.path=some/model"], "base_model.path some/model: no such folder, and not to be had from the hub"),
        (["data.path=./none.jsonl"], "none.jsonl: no such file or folder"),
        (["data.path=some/dataset"], "data.path some/dataset: no local file of that name"),
        (["data.response_field=answer"], "no field 'answer'; its fields are prompt, response"),
        (["data.prompt_field=promt"], "no field 'promt' (did you mean 'prompt'?)"),
        (["data.split=validation[0:1"], "data.split"),
        (["calibration.sources.a.text_field=txt"], "no field 'txt' (did you mean 'text'?)"),
        (["calibration.sources.a.path=./none.jsonl"], "calibration.sources.a.path"),
        (["calibration.probes.p.path=./none.jsonl"], "calibration.probes.p.path"),
        (["evaluation.adaptation.path=./none.jsonl"], "evaluation.adaptation.path"),
        (["evaluation.retention.kept.prompt_field=question"], "evaluation.retention.kept.path"),
        (["adapter.target_modules=[q_proj, v_porj]"], "no linear 'v_porj' (did you mean 'v_proj'?)"),
        (["adapter.rank=0"], "adapter.rank: input should be greater than or equal to 1, got 0 (on the command line)"),
        (["adapter.rank=65"], "adapter.rank 65 is above the 64 inputs of model.layers.0.self_attn.q_proj"),
        (["evaluation.baselines.lora.adapter.rank=65"], "adapter.rank 65 is above the 64 inputs"),
        (["adapter.rnak=4"], "adapter.rnak: unknown key (did you mean 'rank'?)"),
        (["adapter.rank"], "'adapter.rank': an override is written section.key=value"),
        (["train.learning_rate=quick"], "train.learning_rate: input should be a valid number"),
        (["train.global_batch_size=9"], "global_batch_size 9 is no multiple of micro_batch_size 2"),
        (["evaluation.baselines.lora.train.global_batch_size=9"], "global_batch_size 9 is no multiple"),
        (
            ["base_model.attention=flash_attention_2", "base_model.dtype=bfloat16"],
            "pip install -e '.[flash]'",
        ),
        (["engine.config=./ds_configs/zero3.json"], "engine.config is a DeepSpeed file"),
        (["engine.name=zero3", "engine.config=./none.json"], "none.json: cannot be read"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_recipe_model_and_data(fails: Fails, overrides: list[str], said: str) -> None:
    assert said in fails(*overrides)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("", "the file is empty"),
        ("[]", "no rows"),
        (
            '{"prompt": "w1", "response": "w2"}\n{"prompt": "w1", "response": 7}\n',
            "line 2 (the first is 1): field 'response' is int 7",
        ),
        ('{"prompt": "w1", "response": 7}\n', "line 1 (the first is 1): field 'response' is int 7, not text"),
        ('{"prompt": "w1", "response": "w2"}\n{"prompt": "w1"}\n', "line 2"),
        ('{"prompt": "w1", "response": ""}\n', "is empty, there is nothing to predict"),
        ("not json\n", "line 1 (the first is 1): not JSON"),
    ],
    ids=["no bytes", "no rows", "text then number", "number", "null", "empty response", "not JSON"],
)
def test_rows(fails: Fails, tmp_path: Path, rows: str, said: str) -> None:
    path = tmp_path / ("rows.json" if rows == "[]" else "rows.jsonl")
    path.write_text(rows)
    message = fails(f"data.path={path}")
    assert message.startswith(f"data.path {path}: ")
    assert said in message


def test_no_such_recipe(fails: Fails) -> None:
    assert "no such recipe (did you mean 'tiny_math'?)" in fails(recipe="tiny_maht")


def test_a_base_without_safetensors(fails: Fails, world: World, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(world.folder / "base", bare, ignore=shutil.ignore_patterns("*.safetensors"))
    (bare / "pytorch_model.bin").write_bytes(b"")
    assert "only safetensors are read" in fails(f"base_model.path={bare}")
    shutil.copy(world.folder / "base" / "model.safetensors", bare)
    with (bare / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    assert "model.safetensors: unreadable" in fails(f"base_model.path={bare}")
    shutil.copy(world.folder / "base" / "model.safetensors", bare)
    (bare / "config.json").unlink()
    assert f"base_model.path {bare}: its config.json cannot be loaded" in fails(f"base_model.path={bare}")


def test_a_tokenizer_with_more_tokens_than_the_base(fails: Fails, world: World, tmp_path: Path) -> None:
    base = tmp_path / "small"
    shutil.copytree(world.folder / "base", base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"vocab_size": 3}))
    said = fails(f"base_model.path={base}")
    assert said.startswith(f"calibration.sources.a: the tokenizer in {base} gives token ")
    assert "the base's embedding has 3 rows; use the tokenizer that came with the base" in said


def test_an_indexed_base_that_is_not_whole(fails: Fails, world: World, tmp_path: Path) -> None:
    base = tmp_path / "indexed"
    shutil.copytree(world.folder / "base", base)
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    index = base / "model.safetensors.index.json"
    names = sorted(tensors)
    shards = {"first.safetensors": names[::2], "second.safetensors": names[1::2]}
    for file, held in shards.items():
        save_file({name: tensors[name] for name in held}, base / file)
    whole = {name: file for file, held in shards.items() for name in held}

    def said(weight_map: dict[str, str]) -> str:
        index.write_text(json.dumps({"weight_map": weight_map}))
        return fails(f"base_model.path={base}", output=tmp_path / "run_of_indexed", calibrate=True)

    absent = "model.layers.0.mlp.up_proj.weight"
    other = next(file for file in shards if file != whole[absent])
    assert f"{other}: '{absent}' is unreadable" in said(whole | {absent: other})
    assert f"holds no tensor '{absent}'" in said({k: v for k, v in whole.items() if k != absent})
    assert "third.safetensors: named by the index and not there" in said(whole | {absent: "third.safetensors"})
    tensors[absent] = tensors[absent][:-1].contiguous()
    save_file({name: tensors[name] for name in shards[whole[absent]]}, base / whole[absent])
    assert f"'{absent}' is (" in said(whole) and "the model's config asks for" in said(whole)
    assert not list((tmp_path / "run_of_indexed").glob("null_space*"))


def test_too_little_room_is_said_before_anything_is_written(
    fails: Fails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nslora_dist.machine.host_memory", lambda: (1e3, 0.0))
    assert fails().startswith("load: needs about ")
    message = fails(calibrate=True, output=tmp_path / "calibration")
    assert sorted(path.name for path in (tmp_path / "calibration").iterdir()) == ["logs", "recipe.yaml"]
    assert message.startswith("calibrate: needs about ") and "of host memory, 1 kB are free" in message
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert "of disk in output_dir" in fails()


def test_a_folder_of_another_recipe_or_of_no_run(fails: Fails, single_run: Path, tmp_path: Path) -> None:
    before = contents(single_run)
    message = fails("adapter.rank=4", output=single_run)
    assert message.startswith(f"output_dir {single_run}: holds another recipe's run (adapter.rank differ)")
    message = fails("adapter.rank=4", output=single_run, calibrate=True)
    assert "holds another recipe's run" in message
    assert contents(single_run) == before
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("x")
    assert "holds files of no run" in fails(output=mine)
    assert [path.name for path in mine.iterdir()] == ["thesis.tex"]
    assert "thesis.tex: holds files of no run" in fails(output=mine / "thesis.tex")


def test_a_damaged_null_space_is_not_silently_made_again(fails: Fails, single_run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(single_run, copy)
    with (copy / "null_space" / "null_space.safetensors").open("r+b") as file:
        file.truncate(1000)
    before = contents(copy)
    assert "null_space.safetensors" in fails(output=copy)
    # Claiming the folder writes the recipe again, with the folder's own name in it, and the log goes on.
    volatile = {"recipe.yaml", "logs/rank-0.log"}
    kept = {name: hash_ for name, hash_ in contents(copy).items() if not name.startswith("logs/.")}
    assert {name: kept[name] for name in kept.keys() - volatile} == {
        name: before[name] for name in before.keys() - volatile
    }


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.response_field=answer"], "no field 'answer'"),  # read by rank 0 alone
        (["train.global_batch_size=6"], "x 2 ranks; use train.global_batch_size=8"),
    ],
)
def test_every_rank_ends(
    world: World, launch_ranks: Callable[..., list[Ended]], overrides: list[str], said: str
) -> None:
    folder = world.folder / "never"
    first, second = launch_ranks("launch/train.py", "engine.name=fsdp2", f"output_dir={folder}", *overrides)
    assert (first.status, second.status) == (EXIT_USER_ERROR, EXIT_USER_ERROR), first.errors + second.errors
    assert said in first.one_line_error()
    assert "error" not in second.errors
    assert "Traceback" not in first.errors + second.errors
    assert not folder.exists()


def test_torchrun_ends_too_and_leaves_the_folder_alone(launch: Callable[..., Ended], single_run: Path) -> None:
    before = contents(single_run)
    torchrun = ["torchrun", "--nproc-per-node", "2", "--master-port", free_port()]
    ended = launch(*torchrun, "launch/train.py", "engine.name=fsdp2", "adapter.rank=4", f"output_dir={single_run}")
    assert ended.status != 0
    assert "holds another recipe's run" in ended.one_line_error()
    assert contents(single_run) == before
    assert json.loads((single_run / "report.json").read_text())["engine"] == "single"


def test_calibrating_for_an_adapter_that_reads_no_null_space_is_told(fails: Fails) -> None:
    said = fails("adapter.method=lora", "adapter.freeze_a=true", "evaluation.baselines={}", calibrate=True)
    assert said.startswith("adapter.method lora starts from no null space, so there is nothing to calibrate")
