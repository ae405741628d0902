"""What is wrong with ``evaluation.lm_eval`` is said before anything is trained."""

import functools
import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import yaml
from pydantic import ValidationError

from helpers.world import make_base, write_rows
from nslora_dist.card import lm_eval_table
from nslora_dist.data import load_tokenizer
from nslora_dist.engines import Engine
from nslora_dist.errors import UserError
from nslora_dist.lm_eval_bridge import LmEval
from nslora_dist.recipe import BaseModelSection, without_volatile
from nslora_dist.recipe_file import RECIPES
from nslora_dist.recipe_lm_eval import LmEvalSection
from nslora_dist.report import write_report

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install -e '.[lm-eval]'"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tasks of their own, and none of lm-eval's, whose index takes many seconds to read."""
    import lm_eval.tasks

    own = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(
        lm_eval.tasks, "TaskManager", lambda include_path=None, include_defaults=True: own(include_path=include_path)
    )
    write_rows(tmp_path / "rows.jsonl", [{"q": "w1 w2", "a": "w3"}] * 3)
    for name, more in {
        "toy_plain": {},
        "toy_code": {"unsafe_code": True},
        "toy_sampled": {"generation_kwargs": {"do_sample": True, "temperature": 0.7, "max_gen_toks": 8}},
        "toy_long": {"generation_kwargs": {"until": ["w1"]}},
        "toy_lost": {"dataset_kwargs": {"data_files": {"test": str(tmp_path / "nowhere.jsonl")}}},
    }.items():
        task: dict[str, Any] = {
            "task": name,
            "tag": "toy_tag" if name in ("toy_plain", "toy_code") else "toy_rest",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
            "test_split": "test",
            "output_type": "generate_until",
            "doc_to_text": "{{q}}",
            "doc_to_target": "{{a}}",
            "generation_kwargs": {"until": ["w1"], "max_gen_toks": 8},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        }
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(task | more))
    group = {"group": "toy_group", "task": [{"group": "toy_inner", "task": ["toy_plain", "toy_code"]}]}
    (tmp_path / "toy_group.yaml").write_text(yaml.safe_dump(group))
    return tmp_path


def loaded(base: Path, **section: Any) -> LmEval:
    tokenizer = load_tokenizer(BaseModelSection(path=str(base), dtype="float32"))
    return LmEval(LmEvalSection.model_validate(section), tokenizer, base)


def complaint(base: Path, *names: str, **section: Any) -> str:
    with pytest.raises(UserError) as caught:
        loaded(base, tasks=names, **section)
    return str(caught.value)


def test_without_lm_eval_it_says_how_to_get_it(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    said = complaint(base, "gsm8k")
    assert "pip install -e '.[lm-eval]'" in said and "evaluation.lm_eval=null" in said


@needs_lm_eval
@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["toy_plian"], "no task, group or tag 'toy_plian'"),
        (["toy_plian"], "did you mean toy_plain"),
        (["toy_code"], "toy_code runs programs that the model writes on this machine"),
        (["toy_tag"], "toy_tag (its task toy_code) runs programs"),
        (["toy_group"], "toy_group (its task toy_code) runs programs"),
        (["toy_sampled"], "toy_sampled sets do_sample for generation"),
        (["toy_long"], "toy_long generates up to 256 tokens, and the model takes 256 in all"),
        (["toy_plain", "toy_lost"], "toy_lost cannot be loaded ("),
    ],
)
def test_a_task_that_cannot_be_run_is_named(base: Path, tasks: Path, names: list[str], said: str) -> None:
    assert said in complaint(base, *names, include_path=str(tasks))


@needs_lm_eval
def test_no_shipped_recipe_runs_programs_unasked() -> None:
    """Looked up in the text of lm-eval's files, for its own index takes a minute to read."""
    import lm_eval.tasks

    files = [path.read_text(encoding="utf-8") for path in Path(lm_eval.tasks.__file__).parent.rglob("*.yaml")]
    unsafe = [re.findall(r"^task: *(\S+)", text, re.MULTILINE) for text in files if "unsafe_code: true" in text]
    names = {name for found in unsafe for name in found}
    assert {"humaneval", "mbpp"} <= names
    for path in RECIPES.glob("*.yaml"):
        section = yaml.safe_load(path.read_text()).get("evaluation", {}).get("lm_eval") or {}
        assert section.get("allow_code_execution") or not names & set(section.get("tasks", ())), path.stem


@needs_lm_eval
def test_every_task_that_a_shipped_recipe_names_is_lm_eval_s() -> None:
    """Looked up in the text of its files, tasks and groups; also the seven that the paper-scale recipes speak of."""
    import lm_eval.tasks

    files = [path.read_text(encoding="utf-8") for path in Path(lm_eval.tasks.__file__).parent.rglob("*.yaml")]
    known = {name for text in files for name in re.findall(r"(?m)^(?:task|group): *[\"']?([\w-]+)", text)}
    recipes = {path.stem: path.read_text() for path in RECIPES.glob("*.yaml")}
    asked = {
        name: set(((yaml.safe_load(text).get("evaluation") or {}).get("lm_eval") or {}).get("tasks", ()))
        for name, text in recipes.items()
    }
    assert {name: tasks - known for name, tasks in asked.items() if tasks - known} == {}
    spoken = {"triviaqa", "nq_open", "webqs", "gsm8k", "minerva_math", "humaneval", "mbpp"}
    assert spoken <= known and all(any(task in text for text in recipes.values()) for task in spoken)


@needs_lm_eval
def test_programs_run_where_the_recipe_gives_leave(base: Path, tasks: Path) -> None:
    found = loaded(base, tasks=("toy_code",), include_path=str(tasks), allow_code_execution=True)
    assert list(found.tasks["tasks"]) == ["toy_code"]


@needs_lm_eval
def test_what_a_base_says_of_generation_and_is_not_applied_is_named(
    tasks: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = make_base(tmp_path / "own")
    common: dict[str, Any] = {"tasks": ("toy_plain",), "include_path": str(tasks)}
    file = own / "generation_config.json"
    neutral = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "do_sample": True, "top_p": 0.9}
    file.write_text(json.dumps(neutral | {"eos_token_id": 1}))
    loaded(own, **common)
    assert "generation settings" not in caplog.text
    file.write_text(json.dumps(neutral | {"repetition_penalty": 1.2, "forced_bos_token_id": 0}))
    loaded(own, **common)
    (said,) = [record.getMessage() for record in caplog.records if "generation settings" in record.getMessage()]
    assert "have repetition_penalty=1.2, forced_bos_token_id=0; " in said and "the figures of toy_plain" in said


@needs_lm_eval
def test_a_token_that_the_base_has_no_row_for_is_told_before_any_rank_is_asked(tasks: Path, tmp_path: Path) -> None:
    """On a GPU the look-up would end in an assertion that names nothing."""
    own = make_base(tmp_path / "own")
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps(config | {"vocab_size": 4}))
    asked = loaded(own, tasks=("toy_plain",), include_path=str(tasks))
    with pytest.raises(UserError, match=r"lm_eval.tasks: the tokenizer in .* and the base's embedding has 4 rows"):
        asked.run(cast(Engine, None), device=torch.device("cpu"))


@needs_lm_eval
def test_a_question_without_a_token_is_told(tasks: Path, tmp_path: Path) -> None:
    """Qwen's tokenizer puts nothing before a text."""
    base = make_base(tmp_path / "own", "qwen2")
    write_rows(tasks / "rows.jsonl", [{"q": "", "a": "w3"}] * 3)
    asked = loaded(base, tasks=("toy_plain",), include_path=str(tasks))
    with pytest.raises(UserError, match="asks a question without any token"):
        asked.run(cast(Engine, None), device=torch.device("cpu"))


@needs_lm_eval
def test_the_folder_of_tasks_has_to_be_there(base: Path) -> None:
    assert "include_path nowhere: no such folder" in complaint(base, "toy", include_path="nowhere")


@needs_lm_eval
def test_what_the_base_s_kept_figures_belong_to(base: Path, tasks: Path) -> None:
    """All that changes them does change the hash; how many rows go through at once does not."""
    common: dict[str, Any] = {"tasks": ("toy_plain",), "include_path": str(tasks)}
    first = loaded(base, **common).hash
    assert loaded(base, **common, batch_size=3).hash == first
    others = [loaded(base, **common, **more).hash for more in ({"limit": 2}, {"num_fewshot": 1})]
    file = tasks / "toy_plain.yaml"
    file.write_text(file.read_text().replace("max_gen_toks: 8", "max_gen_toks: 9"))
    assert len({first, *others, loaded(base, **common).hash}) == 4


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"limit": 1.5}, "limit"),
        ({"limit": 0}, "limit"),
        ({"tasks": []}, "tasks"),
        ({"tasks": ["a", "a"]}, "names 'a' twice"),
        ({"task": ["a"]}, "task"),
    ],
)
def test_the_section_is_checked(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        LmEvalSection.model_validate({"tasks": ["x"]} | changes)
    assert LmEvalSection.model_validate({"tasks": ["x"], "limit": 0.5}).limit == 0.5


def test_a_running_job_may_change_its_batches_and_what_lm_eval_asks() -> None:
    tree = {"evaluation": {"lm_eval": {"tasks": ["a"], "batch_size": 3}, "batch_size": 4, "max_length": 5}}
    assert without_volatile(tree) == {"evaluation": {"max_length": 5}}
    assert tree["evaluation"]["batch_size"] == 4


def test_figures_are_told_with_their_errors(tmp_path: Path) -> None:
    def entry(value: float, error: float | None) -> dict[str, Any]:
        return {"t": {"metrics": {"acc": {"value": value, "stderr": error}}, "samples": 7, "shots": 2, "version": 1.0}}

    evaluation: dict[str, Any] = {
        "lora": {"adaptation": None, "retention": None, "retention_by": {}, "lm_eval": entry(0.25, None)},
        "base": {"adaptation": None, "retention": None, "retention_by": {}, "lm_eval": entry(0.5, 0.125)},
        "other": {"adaptation": None, "retention": None, "retention_by": {}},
    }
    (table,) = lm_eval_table(evaluation)
    lines = table.splitlines()
    assert lines[0] == "| task | metric | samples | shots | base | plain LoRA |"
    assert lines[2:] == ["| t | acc | 7 | 2 | 0.5 ± 0.125 | 0.25 |"]
    write_report(tmp_path, {"evaluation": evaluation})
    assert lines[2] in (tmp_path / "report.md").read_text()
    assert json.loads((tmp_path / "report.json").read_text())["evaluation"]["base"]["lm_eval"] == entry(0.5, 0.125)
    assert lm_eval_table({"other": evaluation["other"]}) == []
