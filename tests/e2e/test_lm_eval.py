"""lm-eval through the engines gives what lm-eval's own Hugging Face model gives on the exported adapter."""

import importlib.util
import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from helpers.launching import TIMEOUT, environment
from helpers.ranks import run_ranks
from helpers.stages import started
from helpers.world import WORDS, make_base, make_recipe, make_texts, words, write_rows, zero_config
from nslora_dist import dist
from nslora_dist.errors import UserError
from nslora_dist.evaluate_adapter import run_evaluation
from nslora_dist.pipeline import run_training
from nslora_dist.recipe import Recipe
from nslora_dist.scoring import log_likelihoods

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install -e '.[lm-eval]'"
)
CPU = torch.device("cpu")
TASKS = ["toy_answer", "toy_choice", "toy_group", "toy_rolling"]
SHOWN = ["toy_answer", "toy_choice", "toy_group", "toy_greedy", "toy_rolling"]
ANSWERS = '''"""A task's own code, as lm-eval's have it."""
import zlib


def process_results(doc, results):
    return {"crc": zlib.crc32(results[0].encode()) % 9973, "words": len(results[0].split())}


def broken(doc, results):
    raise RuntimeError("no figure comes of this")
'''


def write_tasks(folder: Path) -> None:
    """One task of each kind; one text and one prompt are longer than the model takes."""
    dice = random.Random(3)
    rows = [
        {
            "prompt": words(dice, 300, 300) if number == 4 else words(dice, 3, 9),
            "response": f"w{dice.randrange(6)} w{dice.randrange(6)}",
            "text": words(dice, 600, 600) if number == 2 else words(dice, 5, 30),
            "label": dice.randrange(3),
        }
        for number in range(13)
    ]
    folder.mkdir()
    write_rows(folder / "rows.jsonl", rows)
    (folder / "answers.py").write_text(ANSWERS)
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{prompt}}",
        "metadata": {"version": 2.0},
    }
    mean = {"aggregation": "mean", "higher_is_better": True}
    tasks: dict[str, dict[str, Any]] = {
        "toy_answer": {
            "output_type": "generate_until",
            "doc_to_target": "{{response}}",
            "process_results": "!function answers.process_results",
            "generation_kwargs": {"until": ["w7", "w9 "], "max_gen_toks": 8},
            "metric_list": [{"metric": "crc", **mean}, {"metric": "words", **mean}],
        },
        "toy_broken": {
            "output_type": "loglikelihood",
            "doc_to_target": "{{response}}",
            "process_results": "!function answers.broken",
            "metric_list": [{"metric": "acc", **mean}],
        },
        "toy_choice": {
            "output_type": "multiple_choice",
            "doc_to_choice": ["w1", "w2 w3", "w4"],
            "doc_to_target": "label",
            "fewshot_split": "test",
            "num_fewshot": 1,
            "metric_list": [{"metric": "acc", **mean}, {"metric": "acc_norm", **mean}],
        },
        "toy_greedy": {
            "output_type": "loglikelihood",
            "doc_to_target": "{{response}}",
            "metric_list": [
                {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
                {"metric": "acc", **mean},
            ],
        },
        "toy_rolling": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
        },
    }
    for name, task in tasks.items():
        text = yaml.safe_dump({"task": name} | common | task)
        text = re.sub("'(!function [a-z_.]+)'", r"\1", text)  # a tag, which the dumper takes for text
        (folder / f"{name}.yaml").write_text(text)
    group = {"group": "toy_group", "task": ["toy_greedy"], "aggregate_metric_list": [{"metric": "acc"}]}
    (folder / "group.yaml").write_text(yaml.safe_dump(group))


def job(folder: Path, engine: str, output: str, **changes: Any) -> Recipe:
    settings: dict[str, Any] = {"name": engine}
    if engine == "zero3":
        with dist.together("config"):
            if dist.is_main():
                zero_config(folder)
        settings["config"] = str(folder / "zero.json")
    section = {"tasks": tuple(TASKS), "include_path": str(folder / "tasks"), "limit": 7, "batch_size": 2}
    tree: dict[str, Any] = {
        "engine": settings,
        "train": {"max_steps": 12, "learning_rate": 0.05, "max_grad_norm": 1.0},
        "evaluation": {"lm_eval": section},
    }
    return make_recipe(folder, folder / "base", folder / output, **(tree | changes))


def train(folder: Path) -> None:
    run_training(job(folder, "single", "run"), CPU)


def trained_on_ranks(folder: Path, engine: str) -> dict[str, Any]:
    """A whole run, lm-eval before and after training, on several ranks."""
    run_training(job(folder, engine, f"run_{engine}"), CPU)
    dist.barrier()
    found: dict[str, Any] = json.loads((folder / f"run_{engine}" / "report.json").read_text())
    return found


def evaluated(folder: Path, engine: str) -> dict[str, Any]:
    target = folder / f"{engine}.json"
    recipe = job(folder, engine, "unused")
    if engine == "zero3":  # its many small collectives are slow on a CPU: the adapter alone
        section = recipe.evaluation.model_dump()["lm_eval"] | {"before": False}
        recipe = job(folder, engine, "unused", evaluation={"lm_eval": section})
    run_evaluation(recipe, CPU, adapter=[f"mine={folder / 'run/adapter'}"], output=str(target))
    dist.barrier()
    found: dict[str, Any] = json.loads(target.read_text())["evaluation"]
    return found


def broken(folder: Path) -> str:
    """What a rank hears of a task whose own code fails on rank 0, and that the ranks are still in step."""
    changes = {"tasks": ("toy_broken",), "include_path": str(folder / "tasks")}
    recipe = job(folder, "fsdp2", "unused", evaluation={"lm_eval": changes})
    target = str(folder / "broken.json")
    try:
        run_evaluation(recipe, CPU, adapter=[f"mine={folder / 'run/adapter'}"], output=target)
    except Exception as error:
        assert dist.gather(dist.rank()) == [0, 1]
        return f"{type(error).__name__}: {error}"
    return "nothing"


def refused(folder: Path) -> str:
    try:
        changes = {"tasks": ("toy_choice",), "include_path": str(folder / "tasks"), "apply_chat_template": True}
        run_training(job(folder, "single", "chatty", evaluation={"lm_eval": changes}), CPU)
    except UserError as error:
        return str(error)
    return "nothing"


def left_out(folder: Path) -> dict[str, Any]:
    """A task that fails after training, and the same run without it."""
    section = {"tasks": ("toy_broken",), "include_path": str(folder / "tasks"), "before": False}
    try:
        run_training(job(folder, "single", "mended", evaluation={"lm_eval": section}), CPU)
    except RuntimeError as error:
        assert str(error) == "no figure comes of this"
    assert not (folder / "mended/adapter").exists()
    run_training(job(folder, "single", "mended", evaluation={"lm_eval": None}), CPU)
    found: dict[str, Any] = json.loads((folder / "mended/report.json").read_text())
    return found


def scores(folder: Path, engine: str) -> tuple[list[tuple[float, bool]], list[tuple[float, bool]], list[int]]:
    """Of rows with and without a common beginning: all at once, each by itself, and the rows of the passes."""
    dice = random.Random(5)
    beginnings = [[dice.randrange(4, 60) for _ in range(length)] for length in (3, 9, 9, 5, 2)]
    rows: list[tuple[list[int], int]] = [([*row, end], 1) for row in beginnings[:4] for end in (7, 11, 7, 13)]
    rows += [([*beginnings[4], 8], 1), ([*beginnings[1], 7, 9], 2), ([*beginnings[0], 40], 1)]
    dice.shuffle(rows)
    common: dict[str, Any] = {"batch_size": 2, "pad": 0, "device": CPU, "name": "rows"}
    passes: list[int] = []
    with started(job(folder, engine, f"scored_{engine}"), device=CPU) as stage:
        together = log_likelihoods(stage.engine, rows, **common)
        alone = [log_likelihoods(stage.engine, [row], **common)[0] for row in rows]
        kept, stage.engine.matches = stage.engine.matches, lambda b: passes.append(len(b.input_ids)) or kept(b)
        log_likelihoods(stage.engine, rows, **common)
    return together, alone, passes


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lm_eval")
    # With an adapter, lm-eval's own model cuts the vocabulary down to the tokenizer's, so here they are the same.
    make_base(make_texts(folder) / "base", vocab_size=WORDS + 4)
    write_tasks(folder / "tasks")
    run_ranks(train, 1, folder)
    return folder


@pytest.fixture(scope="module")
def report(world: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((world / "run/report.json").read_text())
    return found


def flat(found: dict[str, Any]) -> dict[str, float]:
    return {
        f"{task} {metric} {kind}": value[kind]
        for task, entry in found.items()
        for metric, value in entry["metrics"].items()
        for kind in ("value", "stderr")
        if value[kind] is not None
    }


def test_the_report_has_base_and_adapter_before_and_after(world: Path, report: dict[str, Any]) -> None:
    base, own = (report["evaluation"][arm]["lm_eval"] for arm in ("base", "null_space"))
    assert sorted(base) == sorted(own) == sorted(SHOWN)
    assert flat(base).keys() == flat(own).keys()
    told = {key.removesuffix(" value") for key in flat(base) if flat(base)[key] != flat(own)[key]}
    assert {"toy_answer crc", "toy_greedy perplexity", "toy_rolling word_perplexity"} <= told, (
        "the adapter changes less"
    )
    assert (own["toy_choice"]["samples"], own["toy_choice"]["shots"], own["toy_answer"]["version"]) == (7, 1, 2.0)
    assert own["toy_choice"]["metrics"]["acc"]["stderr"] > 0
    for page in ("report.md", "adapter/README.md"):
        text = (world / "run" / page).read_text()
        assert "| toy_rolling | word_perplexity | 7 | 0 | " in text and "| task | metric |" in text


@pytest.mark.parametrize("engine", ["single", "fsdp2", "zero3"])
def test_every_engine_gives_the_same(world: Path, report: dict[str, Any], engine: str) -> None:
    first, *others = run_ranks(evaluated, 1 if engine == "single" else 2, world, engine)
    assert all(other == first for other in others)
    assert ("lm_eval" in first["base"]) == (engine != "zero3"), "before: false leaves the base out"
    for theirs, ours in [("null_space", "mine"), *([("base", "base")] if "lm_eval" in first["base"] else [])]:
        wanted, found = flat(report["evaluation"][theirs]["lm_eval"]), flat(first[ours]["lm_eval"])
        assert found == pytest.approx(wanted, rel=1e-4), (engine, ours)


def test_a_run_on_two_ranks_has_it_before_and_after_training(world: Path, report: dict[str, Any]) -> None:
    """Its adapter is that of one process but for the order of sums, so that answers may differ a little."""
    first, second = run_ranks(trained_on_ranks, 2, world, "fsdp2")
    assert first == second and first["world_size"] == 2
    wanted, found = (flat(one["evaluation"]["base"]["lm_eval"]) for one in (report, first))
    assert found == pytest.approx(wanted, rel=1e-4)
    wanted, found = (flat(one["evaluation"]["null_space"]["lm_eval"]) for one in (report, first))
    key = "toy_rolling word_perplexity value"
    assert found.keys() == wanted.keys() and found[key] == pytest.approx(wanted[key], rel=1e-3)


def test_a_task_that_fails_ends_every_rank(world: Path) -> None:
    first, second = run_ranks(broken, 2, world)
    assert first == "RuntimeError: no figure comes of this"
    assert second == "Fault: lm-eval: rank 0 failed: no figure comes of this"


def test_a_base_without_a_chat_template_is_told_before_anything_is_done(world: Path) -> None:
    (said,) = run_ranks(refused, 1, world)
    assert said.startswith("evaluation.lm_eval.apply_chat_template: the tokenizer in ") and "no chat template" in said
    assert not (world / "chatty").exists()


def test_what_fails_after_training_can_be_left_out(world: Path) -> None:
    """Else the trained adapter could not be had: nothing of it is on disk but a checkpoint."""
    (report,) = run_ranks(left_out, 1, world)
    assert (world / "mended/adapter/adapter_model.safetensors").is_file()
    assert "lm_eval" not in report["evaluation"]["null_space"] and len(report["losses"]) == 12


@pytest.mark.parametrize("engine", ["single", "fsdp2"])
def test_answers_to_one_question_are_scored_in_one_row(world: Path, engine: str) -> None:
    """As lm-eval's own model does it; the figures are those of rows by themselves, up to a batch's rounding."""
    ranks = run_ranks(scores, 1 if engine == "single" else 2, world, engine)
    for together, alone, _ in ranks:
        assert [greedy for _, greedy in together] == [greedy for _, greedy in alone]
        assert [sum_ for sum_, _ in together] == pytest.approx([sum_ for sum_, _ in alone], abs=1e-5)
        assert len(set(alone)) > 10
    # 4 questions with 4 or 5 answers, and 2 rows of their own; with two ranks of 2 rows a turn, each has one turn more.
    assert sum(len(p) for _, _, p in ranks) == (3 if engine == "single" else 4), ranks[0][2]
    assert ranks[0][0] == ranks[-1][0]


def test_lm_eval_s_own_command_gives_the_same_on_the_exported_adapter(world: Path, report: dict[str, Any]) -> None:
    arguments = f"pretrained={world / 'base'},peft={world / 'run/adapter'},dtype=float32"
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", arguments, "--tasks", ",".join(TASKS)]
    command += ["--include_path", str(world / "tasks"), "--limit", "7", "--batch_size", "1", "--device", "cpu"]
    command += ["--output_path", str(world / "theirs")]
    said = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        env=environment(DISABLE_MULTIPROC="1"),
    )
    assert said.returncode == 0, said.stderr[-2000:]
    (path,) = (world / "theirs").rglob("results_*.json")
    theirs = json.loads(path.read_text())["results"]
    for task, entry in report["evaluation"]["null_space"]["lm_eval"].items():
        for metric, value in entry["metrics"].items():
            assert value["value"] == pytest.approx(theirs[task][f"{metric},none"], rel=1e-4), (task, metric)
            error = theirs[task][f"{metric}_stderr,none"]
            assert value["stderr"] == (None if error == "N/A" else pytest.approx(error, rel=1e-4)), (task, metric)
