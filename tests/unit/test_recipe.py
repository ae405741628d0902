"""A recipe is checked whole before any weight loads, and what is wrong is said in one line."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from nslora_dist.base_config import load_config, planning_config
from nslora_dist.checkpoint import identity
from nslora_dist.dry_run import describe
from nslora_dist.errors import UserError
from nslora_dist.recipe import Recipe
from nslora_dist.recipe_file import RECIPES, load_recipe

SHIPPED = sorted(path.stem for path in RECIPES.glob("*.yaml") if not path.stem.startswith("merge_"))
PARAMETERS = {"llama2_7b": 6_738_415_616, "llama3_8b": 8_030_261_248, "llama3_70b": 70_553_706_496}


def tree(**changes: Any) -> dict[str, Any]:
    whole: dict[str, Any] = {
        "base_model": {"path": "./base"},
        "calibration": {"sources": {"facts": {"path": "./facts.jsonl"}}},
        "adapter": {"rank": 8},
        "data": {"path": "some/dataset"},
        "train": {"learning_rate": 1e-3, "max_steps": 10, "global_batch_size": 8},
        "engine": {"name": "single"},
    }
    for key, value in changes.items():
        whole[key] = whole.get(key, {}) | value if isinstance(value, dict) else value
    return whole


def write(folder: Path, **changes: Any) -> str:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(tree(**changes)))
    return str(path)


def complaint(folder: Path, *overrides: str, **changes: Any) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(write(folder, **changes), overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("changes", "key", "meant"),
    [
        ({"adapter": {"rnak": 4}}, "adapter.rnak", "rank"),
        ({"base_model": {"quantisation": "nf4"}}, "base_model.quantisation", "quantization"),
        ({"calibration": {"solver": {"methd": "eigh"}}}, "calibration.solver.methd", "method"),
        ({"calibration": {"sources": {"a": {"path": "x", "wieght": 1.0}}}}, "calibration.sources.a.wieght", "weight"),
        ({"evaluation": {"adaptation": {"path": "x", "sample": 3}}}, "evaluation.adaptation.sample", "samples"),
        ({"evaluation": {"retention": {"b": {"path": "x", "splt": "s"}}}}, "evaluation.retention.b.splt", "split"),
        ({"calibrations": {}}, "calibrations", "calibration"),
    ],
)
def test_an_unknown_key_names_the_nearest(tmp_path: Path, changes: dict[str, Any], key: str, meant: str) -> None:
    message = complaint(tmp_path, **changes)
    assert message.startswith(f"{key}: unknown key (did you mean '{meant}'?)")
    assert "mine.yaml" in message


def test_an_unknown_key_like_no_other_lists_the_known_ones(tmp_path: Path) -> None:
    assert "known here: name, config" in complaint(tmp_path, engine={"zzz": 1})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"adapter": {"rank": "8"}}, "adapter.rank: input should be a valid integer, got '8'"),
        ({"adapter": {"rank": 0}}, "adapter.rank: input should be greater than or equal to 1, got 0"),
        ({"train": {"learning_rate": "fast"}}, "train.learning_rate: input should be a valid number"),
        ({"train": {"learning_rate": -1.0}}, "train.learning_rate: input should be greater than 0"),
        ({"data": {"packing": "yes"}}, "data.packing: input should be a valid boolean"),
        ({"engine": {"name": "zero2"}}, "engine.name: input should be 'zero3', 'fsdp2' or 'single'"),
        ({"calibration": {"sources": {}}}, "calibration.sources: dictionary should have at least 1 item"),
        ({"train": {"warmup_ratio": 1.0}}, "train.warmup_ratio: input should be less than 1"),
    ],
)
def test_a_wrong_type_or_range_names_key_and_value(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    assert complaint(tmp_path, **changes).startswith(said)


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    whole = tree()
    del whole["adapter"]["rank"]
    path.write_text(yaml.safe_dump(whole))
    with pytest.raises(UserError, match=r"^adapter\.rank: missing, and there is no default"):
        load_recipe(str(path))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train": {"epochs": 1.0}}, "exactly one of max_steps and epochs"),
        ({"train": {"micro_batch_size": 3}}, "global_batch_size 8 is no multiple of micro_batch_size 3"),
        ({"adapter": {"method": "lora", "form": "residual"}}, "needs method 'lora_null'"),
        ({"adapter": {"freeze_a": False}}, "only while A is frozen"),
        ({"adapter": {"form": "residual", "a_init": "orthonormal"}}, "needs a_init: projected"),
        ({"adapter": {"method": "null_lora", "form": "residual"}}, "leave form, a_init and freeze_a out"),
        ({"adapter": {"method": "null_lora", "a_init": "orthonormal"}}, "leave form, a_init and freeze_a out"),
        ({"adapter": {"method": "null_lora", "freeze_a": True}}, "leave form, a_init and freeze_a out"),
        (
            {"adapter": {"method": "null_lora", "rank": 7}},
            "7 is odd: use rank: 8 for the parameters of a LoRA of rank 4",
        ),
        ({"adapter": {"method": "null_lora", "rank": 64, "null_dim": 32}}, "no room for rank 64: set null_dim: 64"),
        ({"adapter": {"method": "null_lora", "null_threshold": 1.0}}, "adapter.null_threshold"),
        ({"adapter": {"null_dim": 32}}, "null_dim is for method 'null_lora'"),
        ({"adapter": {"method": "lora", "null_threshold": 0.2}}, "null_threshold is for method 'null_lora'"),
        ({"adapter": {"interference_budget": 0.0}}, "adapter.interference_budget"),
        ({"adapter": {"budget_over": "total"}}, "budget_over says what interference_budget is over: set that too"),
        ({"adapter": {"interference_budget": 0.1, "budget_over": "all"}}, "adapter.budget_over"),
        ({"adapter": {"interference_budget": 0.1, "form": "residual"}}, "form 'residual' has not: set method"),
        ({"adapter": {"interference_budget": 0.1, "method": "lora"}}, "method 'lora' with A trained has not: set"),
        ({"adapter": {"interference_budget": 0.1, "method": "null_lora"}}, "method 'null_lora' has not: set method"),
        ({"data": {"packing": True}, "base_model": {"attention": "eager"}}, "data.packing needs an attention"),
        ({"base_model": {"attention": "flash_attention_2", "dtype": "float32"}}, "base_model.dtype: bfloat16"),
        ({"data": {"template": "no place for it"}}, "must hold {prompt} exactly once"),
        ({"engine": {"config": "x.json"}}, "engine.config is a DeepSpeed file"),
        ({"calibration": {"probes": {"facts": {"path": "x"}}}}, "names a source and a probe"),
        (
            {"calibration": {"probes": {"calibration": {"path": "x"}}}},
            "mixture of all sources; give the probe another name",
        ),
        (
            {"calibration": {"sources": {"calibration": {"path": "x"}}}},
            "mixture of all sources; give the source another name",
        ),
    ],
)
def test_impossible_combinations_are_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    assert said in complaint(tmp_path, **changes)


def test_a_global_batch_that_the_ranks_cannot_share(tmp_path: Path) -> None:
    train = load_recipe(write(tmp_path), ["train.micro_batch_size=4"]).train
    assert train.accumulation(2) == 1
    with pytest.raises(UserError, match=r"global_batch_size 8 .* x 3 ranks; use train\.global_batch_size=12"):
        train.accumulation(3)
    # Nothing is trained: then it is rounded up.
    assert (train.fitting(3).global_batch_size, train.fitting(3).accumulation(3)) == (12, 1)
    assert train.fitting(2) == train


def test_numbers_in_scientific_notation_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(tree()).replace("learning_rate: 0.001", "learning_rate: 1e-4"))
    assert load_recipe(str(path)).train.learning_rate == 1e-4
    assert load_recipe(str(path), ["train.learning_rate=2e-5"]).train.learning_rate == 2e-5
    assert load_recipe(str(path), ["train.weight_decay=1"]).train.weight_decay == 1.0


def test_overrides_replace_and_add(tmp_path: Path) -> None:
    recipe = load_recipe(
        write(tmp_path),
        [
            "adapter.rank=4",
            "adapter.target_modules=[q_proj, v_proj]",
            "calibration.solver.method=eigh",
            "calibration.probes.new.path=some/prose",
            "data.template='Q: {prompt} A:'",
            "output_dir=elsewhere",
        ],
    )
    assert recipe.adapter.rank == 4
    assert recipe.adapter.target_modules == ("q_proj", "v_proj")
    assert recipe.calibration.solver.method == "eigh"
    assert recipe.calibration.probes["new"].path == "some/prose"
    assert recipe.data.template == "Q: {prompt} A:"
    assert recipe.output_dir == "elsewhere"


def test_another_engine_on_the_command_line_leaves_the_zero_file_behind() -> None:
    assert load_recipe("tiny_math").engine.config is not None
    for name in ("single", "fsdp2"):
        assert load_recipe("tiny_math", [f"engine.name={name}"]).engine.config is None
    assert load_recipe("tiny_math", ["engine.name=zero3"]).engine.config is not None
    with pytest.raises(UserError, match=r"engine\.config is a DeepSpeed file"):
        load_recipe("tiny_math", ["engine.name=single", "engine.config=x.json"])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("adapter.rank", "an override is written section.key=value"),
        ("=3", "an override is written section.key=value"),
        ("adapter..rank=3", "an override is written section.key=value"),
        ("adapter.rank.size=3", "adapter.rank is a value, not a section"),
        ("data.template=[", "not readable as YAML"),
        ("adapter.rnak=3", "adapter.rnak: unknown key (did you mean 'rank'?) (on the command line)"),
        ("adapter.rank=many", "adapter.rank: input should be a valid integer"),
        ("adapter.target_modules=q_proj", "adapter.target_modules: wanted is a list, as [a, b], got 'q_proj'"),
        (
            "evaluation.retention.k=./d.jsonl",
            "evaluation.retention.k: wanted is a section of keys, as {key: value}, got",
        ),
    ],
)
def test_a_bad_override_is_named(tmp_path: Path, override: str, said: str) -> None:
    assert said in complaint(tmp_path, override)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("adapter.target_modules=[1]", "adapter.target_modules.0"),
        ("evaluation.lm_eval={tasks: [a], limit: 0}", "evaluation.lm_eval.limit"),
        ("evaluation.lm_eval.limit=0", "evaluation.lm_eval.limit"),
        ("train={learning_rate: x}", "train.learning_rate"),
        ("train.epochs=1", "train"),
        ("calibration.sources.facts.wieght=1", "calibration.sources.facts.wieght"),
        ("evaluation.baselines.lora.adapter.rnk=3", "evaluation.baselines.lora"),
    ],
)
def test_what_the_command_line_says_is_not_the_recipe_s_fault(tmp_path: Path, override: str, key: str) -> None:
    said = complaint(tmp_path, override, evaluation={"lm_eval": {"tasks": ["a"]}})
    assert said.startswith(f"{key}: ") and said.endswith(" (on the command line)")


def test_a_key_of_which_an_override_only_shares_the_beginning_is_the_recipe_s(tmp_path: Path) -> None:
    said = complaint(tmp_path, "train.max_steps=2", "data.path=x", train={"max": 2})
    assert said.startswith("train.max: unknown key") and "mine.yaml" in said
    assert complaint(tmp_path, evaluation={"lm_eval": {"tasks": ["a"], "limit": 0}}).startswith(
        "evaluation.lm_eval.limit: input should be greater than or equal to 1, got 0"
    )


def test_paths_count_from_the_recipe_and_on_the_command_line_from_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    recipe = load_recipe(
        write(tmp_path, evaluation={"adaptation": {"path": "../up.jsonl"}}),
        ["data.path=./mine.jsonl", "output_dir=./o"],
    )
    assert recipe.base_model.path == str(tmp_path / "base")
    assert recipe.calibration.sources["facts"].path == str(tmp_path / "facts.jsonl")
    assert recipe.evaluation.adaptation is not None
    assert recipe.evaluation.adaptation.path == str(tmp_path.parent / "up.jsonl")
    assert recipe.data.path == str(here / "mine.jsonl")
    assert recipe.output_dir == str(here / "o")
    recipe = load_recipe(
        write(tmp_path), ["data={path: ~/mine.jsonl}", "calibration.sources={facts: {path: ../facts.jsonl}}"]
    )
    assert recipe.data.path == str(Path.home() / "mine.jsonl")
    assert recipe.calibration.sources["facts"].path == str(tmp_path / "facts.jsonl")
    assert load_recipe(write(tmp_path)).data.path == "some/dataset"
    assert load_recipe(write(tmp_path)).output_dir == "runs/mine"


def test_the_folder_follows_the_name() -> None:
    assert load_recipe("tiny_math", ["name=second"]).output_dir == "runs/second"
    assert load_recipe("tiny_math", ["name=second", "output_dir=here"]).output_dir == "here"
    with pytest.raises(UserError, match="^name: "):
        load_recipe("tiny_math", ["name=3"])


def test_no_such_recipe_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"--recipe tiny_meth: no such recipe \(did you mean 'tiny_math'\?\)"):
        load_recipe("tiny_meth")


@pytest.mark.parametrize("text", ["a: [", "- a\n- b\n", "\xff"])
def test_broken_yaml_is_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(UserError) as caught:
        load_recipe(str(path))
    assert "broken.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"train_batch_size": 64}, "train_batch_size is 64, the recipe says 8"),
        ({"train_micro_batch_size_per_gpu": 2}, "train_micro_batch_size_per_gpu is 2, the recipe says 1"),
        ({"gradient_clipping": 5.0}, "gradient_clipping is 5.0, the recipe says 1.0"),
        ({"bf16": {"enabled": False}}, "bf16.enabled is False, the recipe says True"),
        ({"fp16": {"enabled": True}}, "fp16.enabled is True, the recipe says False"),
        ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage is 2, the recipe says 3"),
        ({"optimizer": {"type": "Adam"}}, "'optimizer' is set by the recipe's train section"),
        ({"gradient_accumulation_steps": 4}, "'gradient_accumulation_steps' is set by the recipe's train section"),
        ({"steps_per_print": 10}, "'steps_per_print' is set by the recipe's train section (train.log_every)"),
        ({"train_batch_size": "auto"}, "is 'auto', the recipe says 8 (train.global_batch_size decides it); take it"),
        (
            {"bf16": {"immediate_grad_update": True}},
            "immediate_grad_update is True, which is no ZeRO knob (base_model.",
        ),
        ({"bf16": True}, "bf16 is True, the recipe says {'enabled': True} (base_model.dtype decides it)"),
        ({"communication_data_type": "bf16"}, "communication_data_type is 'bf16', and is always 'fp32' here; take it"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "data_types.grad_accum_dtype is 'bf16', and is always 'fp32'"),
        ({"zero_allow_untested_optimizer": False}, "zero_allow_untested_optimizer is False, and is always True here"),
        ([], "must hold a JSON object"),
    ],
)
def test_a_zero_config_that_contradicts_the_recipe(tmp_path: Path, settings: Any, said: str) -> None:
    (tmp_path / "zero.json").write_text(json.dumps(settings))
    assert said in complaint(tmp_path, engine={"name": "zero3", "config": "./zero.json"})


def test_whatever_the_engine_replaces_is_refused_in_a_zero_config(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    from nslora_dist.engines.zero3 import deepspeed_config

    recipe = load_recipe(write(tmp_path, engine={"name": "zero3"}))
    for key, value in deepspeed_config(recipe, world_size=1).items():
        other = {"stage": 1} if key == "zero_optimization" else {"x": 1} if isinstance(value, dict) else "other"
        (tmp_path / "zero.json").write_text(json.dumps({key: other}))
        assert key in complaint(tmp_path, engine={"name": "zero3", "config": "./zero.json"})


def test_a_zero_config_may_repeat_the_recipe_and_add_knobs(tmp_path: Path) -> None:
    settings = {
        "train_batch_size": 8,
        "bf16": {"enabled": True},
        "fp16": {"enabled": False, "loss_scale": 0},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {"stage": 3, "reduce_bucket_size": 10},
        "wall_clock_breakdown": False,
    }
    (tmp_path / "zero.json").write_text(json.dumps(settings))
    assert load_recipe(write(tmp_path, engine={"name": "zero3", "config": "./zero.json"})).engine.config is not None


def test_a_zero_config_that_cannot_be_read(tmp_path: Path) -> None:
    assert "cannot be read (No such file" in complaint(tmp_path, engine={"name": "zero3", "config": "./none.json"})
    (tmp_path / "zero.json").write_text("{")
    assert "not JSON" in complaint(tmp_path, engine={"name": "zero3", "config": "./zero.json"})


def test_a_loaded_recipe_does_not_change(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path))
    with pytest.raises(ValidationError):
        recipe.adapter.rank = 3
    with pytest.raises(ValidationError):
        recipe.output_dir = "x"


@pytest.mark.parametrize("name", SHIPPED)
def test_the_resolved_recipe_reads_back_as_itself(tmp_path: Path, name: str) -> None:
    recipe = load_recipe(name)
    path = tmp_path / "resolved.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(str(path)) == recipe


def test_baselines_are_arms_of_their_own(tmp_path: Path) -> None:
    baselines: dict[str, Any] = {
        "lora": {"adapter": {"method": "lora", "rank": 4}, "train": {"learning_rate": 1e-4}},
        "frozen_random": {"adapter": {"method": "lora", "freeze_a": True}},
    }
    recipe = load_recipe(write(tmp_path, evaluation={"baselines": baselines}))
    arm = recipe.arm("lora")
    assert (arm.arm_name, recipe.arm_name) == ("lora", "null_space")
    assert (arm.adapter.method, arm.adapter.rank, arm.adapter.a_is_frozen) == ("lora", 4, False)
    assert (arm.train.learning_rate, arm.train.max_steps) == (1e-4, 10)
    assert arm.evaluation.baselines == {}
    assert recipe.arm("frozen_random").adapter.a_is_frozen
    assert recipe.adapter.a_is_frozen
    assert "that name is taken" in complaint(tmp_path, evaluation={"baselines": {"null_space": {}}})
    message = complaint(tmp_path, evaluation={"baselines": {"bad": {"adapter": {"rnak": 4}}}})
    assert "evaluation.baselines.bad: adapter.rnak: unknown key (did you mean 'rank'?)" in message


def test_baselines_of_another_method_drop_the_keys_of_the_recipes_own(tmp_path: Path) -> None:
    weights = {"weights": {"adapter": {"method": "null_lora", "rank": 4, "null_dim": 9}}}
    recipe = load_recipe(write(tmp_path, adapter={"form": "residual"}, evaluation={"baselines": weights}))
    arm = recipe.arm("weights")
    assert (arm.adapter.method, arm.adapter.form, arm.adapter.null_dim) == ("null_lora", "delta", 9)
    assert arm.arm_name == "null_lora" and not arm.adapter.a_is_frozen
    activations = {"activations": {"adapter": {"method": "lora_null"}}, "plain": {"adapter": {"method": "lora"}}}
    mine = {"method": "null_lora", "null_dim": 9, "null_threshold": 0.5}
    recipe = load_recipe(write(tmp_path, adapter=mine, evaluation={"baselines": activations}))
    assert (recipe.arm_name, recipe.arm("activations").adapter.a_is_frozen) == ("null_lora", True)
    assert recipe.arm("plain").adapter.null_threshold == 0.1
    assert "that name is taken" in complaint(tmp_path, adapter=mine, evaluation={"baselines": {"null_lora": {}}})


def test_a_budget_is_the_method_s_own_and_part_of_what_a_checkpoint_belongs_to(tmp_path: Path) -> None:
    arms = {"plain": {"adapter": {"method": "lora"}}, "free": {"adapter": {"interference_budget": None}}}
    mine = {"interference_budget": 0.05, "budget_over": "module"}
    recipe = load_recipe(write(tmp_path, adapter=mine, evaluation={"baselines": arms}))
    assert recipe.arm("plain").adapter.interference_budget is recipe.arm("free").adapter.interference_budget is None
    frozen = {"method": "lora", "freeze_a": True}
    random = load_recipe(write(tmp_path, adapter=mine | frozen, evaluation={"baselines": {"own": {"adapter": frozen}}}))
    assert random.arm_name == random.arm("own").arm_name == "lora_frozen_a"
    assert random.adapter.measures_a and random.arm("own").adapter.interference_budget is not None
    total = load_recipe(write(tmp_path, adapter=mine | {"budget_over": "total"}, evaluation={"baselines": arms}))
    assert identity(recipe, {}) != identity(total, {})
    assert identity(recipe, {}) != identity(recipe.arm("free"), {})


def test_alpha_defaults_to_the_rank(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path)).adapter.scale == 1.0
    assert load_recipe(write(tmp_path), ["adapter.alpha=16"]).adapter.scale == 2.0


@pytest.mark.parametrize("name", SHIPPED)
def test_every_recipe_is_dry_run(name: str) -> None:
    recipe = load_recipe(name)
    said = describe(recipe)
    assert yaml.safe_load(said.split("\n#")[0])["name"] == name
    rank = recipe.adapter.rank
    assert f"q_proj ({rank}, " in said
    if recipe.base_model.config is not None:
        count = PARAMETERS[Path(recipe.base_model.config).name]
        assert f"base parameters {count:>21,}" in said


def test_dry_run_of_null_lora_counts_halves_and_bases() -> None:
    """70B, rank 128 and 256 null directions: a LoRA of rank 64 trains, V and U are frozen beside it."""
    said = describe(load_recipe("llama3_70b_math", ["adapter.method=null_lora", "adapter.rank=128"]))
    assert "down_proj (64, 28672) (8192, 64) (28672, 256) (8192, 256)" in said
    widths = 80 * (2 * 16384 + 2 * 9216 + 3 * 36864)
    assert f"{64 * widths:,}" in said and f"{(64 + 256) * widths:,}" in said
    rows = {line.split()[0]: line.split()[1:] for line in said.splitlines() if " right " in line and " left " in line}
    assert rows["down_proj"] == ["right", "20,480", "left", "0"]
    assert rows["k_proj"] == rows["v_proj"] == ["right", "7,168", "left", "0"]
    assert rows["gate_proj"] == ["right", "0", "left", "20,480"] and rows["q_proj"] == ["right", "0", "left", "0"]


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 60


def test_a_config_of_another_model_is_refused_at_run_time(tmp_path: Path) -> None:
    known = {"path": str(RECIPES / "tiny" / "base"), "config": str(RECIPES / "configs" / "llama3_8b")}
    section = Recipe.model_validate(tree(base_model=known) | {"name": "x", "output_dir": "x"}).base_model
    assert planning_config(section).hidden_size == 4096
    with pytest.raises(UserError, match=r"base_model\.config .*: hidden_size is 4096, and 256 in the checkpoint's own"):
        load_config(section)
