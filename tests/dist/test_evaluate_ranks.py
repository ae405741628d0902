"""``launch/evaluate.py``'s one call: what training said of an adapter, what PEFT makes of one, on any engine, rank."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from helpers.merge_world import make_adapter
from helpers.ranks import run_ranks
from helpers.stages import plain_base
from helpers.world import make_base, make_recipe, make_texts, words, write_rows, zero_config
from nslora_dist import dist, watch
from nslora_dist.adapter_set import AdapterSet, put_to_work
from nslora_dist.base_config import load_config
from nslora_dist.base_files import BaseFiles
from nslora_dist.data import Batch
from nslora_dist.engines import start_engine
from nslora_dist.errors import UserError
from nslora_dist.evaluate_adapter import linear_shapes, make_set_job, read_fitting, run_evaluation
from nslora_dist.pipeline import run_training
from nslora_dist.recipe import Recipe

CPU = torch.device("cpu")
IDS = torch.randint(3, 63, (2, 12), generator=torch.Generator().manual_seed(5))
ENGINES = {"single": 1, "fsdp2": 2, "zero3": 2}
BASES: dict[str, dict[str, str]] = {
    "float32": {},
    "nf4": {"quantization": "nf4"},
    "bf16": {"dtype": "bfloat16"},
}
ALL = [r".*layers\.1\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)"]
UNEVEN = {
    "r": 2,
    "lora_alpha": 3,
    "target_modules": ALL[0],
    "rank_pattern": {"q_proj": 5, "down_proj": 1},
    "alpha_pattern": {"down_proj": 7},
}
"""Of one block alone; no two of q, down and the others have the same scale."""


def job(folder: Path, engine: str, output: str, **changes: Any) -> Recipe:
    settings: dict[str, Any] = {"name": engine}
    if engine == "zero3":
        with dist.together("config"):
            if dist.is_main():
                zero_config(folder)
        settings["config"] = str(folder / "zero.json")
    task = {"path": str(folder / "easy.jsonl")}
    tree: dict[str, Any] = {
        "engine": settings,
        "data": {"path": str(folder / "easy.jsonl")},
        "evaluation": {"adaptation": task | {"samples": 33}, "retention": {"kept": task}, "batch_size": 5},
    }
    return make_recipe(folder, folder / "base", folder / output, **(tree | changes))


def train(folder: Path) -> None:
    """Both kinds of adapters, until they know a part of their rows."""
    evaluation = job(folder, "single", "run").model_dump()["evaluation"]
    baseline = {"adapter": {"method": "lora", "alpha": 12.0}, "train": {"learning_rate": 1e-2}}
    recipe = job(
        folder,
        "single",
        "run",
        adapter={"a_init": "orthonormal"},
        train={
            "max_steps": 60,
            "learning_rate": 0.05,
            "max_grad_norm": 1.0,
            "weight_decay": 0.0,
            "global_batch_size": 16,
            "micro_batch_size": 16,
        },
        evaluation=evaluation | {"baselines": {"lora": baseline}},
    )
    run_training(recipe, CPU)


def evaluated(folder: Path, engine: str, adapters: dict[str, str]) -> dict[str, Any] | str:
    """The JSON that two adapters' evaluation leaves, or its error."""
    target = folder / f"{engine}{dist.world_size()}.json"
    given = [f"{name}={folder / path}" for name, path in adapters.items()]
    odd = {"global_batch_size": 9, "micro_batch_size": 3}  # which two ranks could not train with
    try:
        run_evaluation(job(folder, engine, "unused", train=odd), CPU, adapter=given, output=str(target))
    except UserError as error:
        return str(error)
    dist.barrier()
    found: dict[str, Any] = json.loads(target.read_text())
    return found


def logits(folder: Path, engine: str) -> dict[str, dict[str | None, Tensor]]:
    """Base's values → adapter at work → (b, s - 1, vocabulary)."""
    found: dict[str, dict[str | None, Tensor]] = {}
    for name, section in BASES.items():
        recipe = job(folder, engine, "unused", base_model=section)
        config = load_config(recipe.base_model)
        shapes = linear_shapes(recipe, config)
        stored = {adapter: read_fitting(adapter, folder / adapter, shapes) for adapter in "ab"}
        checkpoint = BaseFiles(folder / "base")
        engine_ = start_engine(make_set_job(recipe, config, checkpoint, shapes, stored, device=CPU), recipe)
        seen: list[Tensor] = []
        engine_.model.lm_head.register_forward_hook(lambda module, args, output, seen=seen: seen.append(output))
        found[name] = {}
        for at_work in (None, "a", "b", None, "a"):
            put_to_work(engine_.model, at_work)
            engine_.matches(Batch(IDS, None, None, IDS.clone()))
            now = seen.pop().detach().float().unflatten(0, (IDS.shape[0], IDS.shape[1] - 1))
            assert torch.equal(now, found[name].setdefault(at_work, now)), "an adapter leaves something behind"
        sets = [module for module in engine_.model.modules() if isinstance(module, AdapterSet)]
        assert {tuple(own.spans) for own in sets} == {("a",), ("b",), ("a", "b")}
        engine_.close()
    return found


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    base = make_base(make_texts(folder) / "base")
    dice = random.Random(0)
    prompts = [words(dice, 3, 6) for _ in range(70)]
    # The answer hangs on the first word, and one answer is commoner: a little training gets some of it right.
    rows = [{"prompt": prompt, "response": f"w{max(0, int(prompt[1]) - 3)}"} for prompt in prompts]
    write_rows(folder / "easy.jsonl", rows)
    make_adapter(folder / "a", base, "llama", seed=1, r=3, use_rslora=True)
    make_adapter(folder / "b", base, "llama", seed=2, **UNEVEN)
    run_ranks(train, 1, folder)
    return folder


def test_figures_are_those_of_training_on_every_engine(world: Path) -> None:
    adapters = {"null_space": "run/adapter", "lora": "run/baselines/lora"}
    report = json.loads((world / "run/report.json").read_text())
    expected = {arm: {k: v for k, v in s.items() if k != "learning_rate"} for arm, s in report["evaluation"].items()}
    told = {scores["adaptation"] for scores in expected.values()}
    assert len(told) == 3 and max(told) > 0.2, f"nothing to tell apart: {told}"
    for engine, ranks in ENGINES.items():
        found, *others = run_ranks(evaluated, ranks, world, engine, adapters)
        assert isinstance(found, dict), found
        assert all(other == found for other in others)
        assert found["evaluation"] == expected, engine
        assert (found["engine"], found["world_size"]) == (engine, ranks)
        for name in adapters:
            assert found["adapters"][name]["same_base"] is True and found["adapters"][name]["modules"] == 14
            theirs, ours = report["interference_by_arm"][name], found["interference_by_arm"][name]
            # Training reads a frozen A's off r x r matrices in float32, for which there is a floor.
            assert ours["per_module"] == pytest.approx(theirs["per_module"], rel=1e-3, abs=3e-4), engine
            assert ours["by_probe"]["p"] == pytest.approx(theirs["by_probe"]["p"], rel=1e-3, abs=3e-4), engine
            assert ours["rms"] > 0.01


@pytest.mark.parametrize("engine", ENGINES)
def test_anybody_s_adapter_computes_what_peft_computes(world: Path, engine: str) -> None:
    """rsLoRA, uneven ranks, alpha patterns, and modules that only one of the two adapts."""
    found = run_ranks(logits, ENGINES[engine], world, engine)[0]
    for name, section in BASES.items():
        tolerance = 0.03 if name == "bf16" else 1e-5
        plain = {"dtype": section.get("dtype", "float32"), "quantised": "quantization" in section}
        with torch.no_grad():
            bare = plain_base(world / "base", **plain)(IDS).logits[:, :-1].float()
            torch.testing.assert_close(found[name][None], bare, atol=tolerance, rtol=0)
            for adapter in "ab":
                model = PeftModel.from_pretrained(plain_base(world / "base", **plain), str(world / adapter))
                wanted = model(IDS).logits[:, :-1].float()
                torch.testing.assert_close(found[name][adapter], wanted, atol=tolerance, rtol=0)
                assert (wanted - found[name][adapter]).norm() < 0.2 * (wanted - bare).norm(), (name, adapter)


def test_interference_counts_an_adapter_s_own_modules_alone(world: Path) -> None:
    (world / "single1.json").unlink(missing_ok=True)  # another test's
    (both,) = run_ranks(evaluated, 1, world, "single", {"a": "a", "b": "b"})
    (world / "single1.json").unlink()
    (alone,) = run_ranks(evaluated, 1, world, "single", {"b": "b"})
    assert isinstance(both, dict) and isinstance(alone, dict)
    assert len(both["interference_by_arm"]["a"]["per_module"]) == 6
    assert len(alone["interference_by_arm"]["b"]["per_module"]) == 7
    assert both["adapters"]["b"] == {"path": str(world / "b"), "modules": 7, "ranks": [1, 2, 5], "same_base": None}
    together, single = both["interference_by_arm"]["b"], alone["interference_by_arm"]["b"]
    assert together["per_module"] == pytest.approx(single["per_module"], rel=1e-5)
    assert together["mean"] == pytest.approx(sum(single["per_module"].values()) / 7, rel=1e-5)


def test_an_error_ends_every_rank(world: Path) -> None:
    (world / "fsdp22.json").unlink(missing_ok=True)  # another test's
    said = run_ranks(evaluated, 2, world, "fsdp2", {"a": "a", "none": "nowhere"})
    assert said[0] == said[1]
    assert said[0].endswith("nowhere: no such folder; give the folder of a PEFT adapter")
    assert not (world / "fsdp22.json").exists()


def test_asked_to_stop_it_says_that_it_begins_anew(world: Path) -> None:
    (world / "single1.json").unlink(missing_ok=True)  # another test's
    watch.ask_stop("the test")
    said = evaluated(world, "single", {"a": "a"})
    watch.reset()
    assert isinstance(said, str) and "same command continues from the beginning, for nothing is written" in said
    assert not (world / "single1.json").exists()
