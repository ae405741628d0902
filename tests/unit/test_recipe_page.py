"""docs/recipe.md: every key, as the sections themselves say, and never another text than they do."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from pydantic import Field

from helpers.launching import ROOT
from nslora_dist.errors import UserError
from nslora_dist.merge_recipe import MergeRecipe
from nslora_dist.recipe import VOLATILE, Recipe
from nslora_dist.recipe_file import load_recipe
from nslora_dist.recipe_page import MARK, after_calibration, markdown, page, parts, words
from nslora_dist.recipe_types import Count, Fraction, LocalPath, Names, Section, Seed, Where
from nslora_dist.run_folder import AFTER_CALIBRATION
from nslora_dist.study.spec import Study

PAGE = ROOT / "docs" / "recipe.md"


class Inner(Section):
    """Some numbers. And more of them."""

    plain: int = 3


class Outer(Section):
    """All of it
    (docs/methods.md §4).
    """

    inner: Inner = Inner()
    named: dict[str, Inner]
    """By ``name``, a | or b."""


def row(root: type[Section], key: str) -> list[str]:
    """The cells of a key's row behind its name."""
    (found,) = [line for line in markdown(root, volatile=VOLATILE).splitlines() if line.startswith(f"| `{key}`")]
    return [cell.strip() for cell in found.strip("|").split(" | ")][1:]


def test_the_page_says_what_the_sections_say() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m nslora_dist.recipe_page > docs/recipe.md"


@pytest.mark.parametrize("root", [Recipe, MergeRecipe, Study])
def test_every_key_and_every_section_has_a_meaning(root: type[Section]) -> None:
    found = list(parts(root))
    assert [part.name for part in found if not part.said] == []
    assert [key.name for part in found for key in part.keys if not key.meaning.endswith(".")] == []


def test_a_key_without_a_meaning_would_be_seen() -> None:
    (_, inner, _) = parts(Outer)
    assert [(key.name, key.meaning) for key in inner.keys] == [("inner.plain", "")]


def test_a_section_is_a_heading_its_docstring_and_a_table() -> None:
    root, inner, named = markdown(Outer).split("\n\n### ")
    assert root.splitlines() == [
        "All of it ([methods.md](methods.md) \u00a74).",
        "",
        "| key | type | default | meaning |",
        "| --- | --- | --- | --- |",
        "| `inner` | section | its keys' own | Some numbers. |",
        r"| `named` | mapping name → section | **required** | By `name`, a \| or b. |",
    ]
    assert inner.splitlines()[0] == "`inner`" and inner.endswith("| `inner.plain` | int | `3` |  |")
    assert named == "`named.<name>`\n\nSome numbers. And more of them. Its keys are those of `inner`."


def test_keys_are_dotted_from_the_root() -> None:
    assert row(Recipe, "calibration.solver.method")[:2] == ["one of eigh, fast", "`fast`"]
    assert row(Recipe, "calibration.sources.<name>.weight")[:2] == ["number > 0", "`1`"]
    assert row(Recipe, "evaluation.baselines.<name>.train")[:2] == ["mapping key → value", "`{}`"]
    assert row(Recipe, "adapter.rank")[:2] == ["int ≥ 1", "**required**"]
    assert row(Recipe, "data.template")[:2] == ["text", '`"{prompt}"`']
    assert row(MergeRecipe, "adapters.<name>.coefficient")[:2] == ["number, or null", "`null`"]


def test_keys_of_a_section_that_stands_in_several_places_are_listed_once() -> None:
    said = {part.name: part for part in parts(Recipe)}
    assert said["calibration.probes.<name>"].said.endswith(
        "keys are those of `calibration.sources.<name>` without `weight`."
    )
    assert said["evaluation.retention.<name>"].said.endswith("those of `data` without `max_length` and `packing`.")
    assert not said["evaluation.adaptation"].keys


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Count, "int ≥ 1"),
        (Annotated[Count, Field(ge=2)], "int ≥ 2"),
        (Annotated[Count, Field(gt=1)], "int > 1"),
        (Seed, "int"),
        (Fraction, "0 ≤ number < 1"),
        (Annotated[float, Field(gt=0.0, le=1.0)] | None, "0 < number ≤ 1, or null"),
        (Annotated[int, Field(le=5)], "int ≤ 5"),
        (bool | None, "true or false, or null"),
        (Literal["a", "b"], "one of a, b"),
        (Where, "path or hub name"),
        (LocalPath | None, "path, or null"),
        (Names, "list of names"),
        (tuple[Fraction, Fraction], "list of 2: 0 ≤ number < 1"),
        (tuple[Literal["a", "b"], ...], "list: one of a, b"),
        (dict[str, Count], "mapping name → int ≥ 1"),
        (dict[str, Any], "mapping key → value"),
        (Inner | None, "section, or null"),
    ],
)
def test_types_are_said_in_words(kind: Any, said: str) -> None:
    assert words(kind) == said


def test_what_may_change_when_a_run_goes_on_is_marked() -> None:
    lines = markdown(Recipe, volatile=VOLATILE).splitlines()
    marked = {line.split("`")[1] for line in lines if line.startswith("| `") and line.split("`")[2].startswith(MARK)}
    assert {"engine", "engine.config", "train.compile", "evaluation.lm_eval.tasks", "base_model.config"} <= marked
    assert not {"train", "train.learning_rate", "evaluation", "base_model.path"} & marked
    assert set(VOLATILE) <= marked, "a key of VOLATILE that no recipe has"


def test_what_may_change_after_a_calibration_is_all_that_the_run_folder_lets_change() -> None:
    own = ("alpha", "freeze_a", "interference_budget", "budget_over")
    assert set(after_calibration()) == {"name", "data", "train", "evaluation", *(f"adapter.{key}" for key in own)}
    for part in parts(Recipe):
        for key in part.keys:
            listed = any(f"{key.name}.".startswith(f"{name}.") for name in after_calibration())
            assert listed == bool(AFTER_CALIBRATION.match(key.name)), key.name


def without_one(tree: Any) -> list[Any]:
    """The tree without one of its leaves, once for each."""
    if not isinstance(tree, dict):
        return []
    found = []
    for key, value in tree.items():
        rest = {k: v for k, v in tree.items() if k != key}
        found += [rest | {key: inner} for inner in without_one(value)] if isinstance(value, dict) else [rest]
    return found


def test_the_example_is_a_recipe_and_as_small_as_one_can_be(tmp_path: Path) -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", page(), re.DOTALL)
    path = tmp_path / "my_recipe.yaml"
    path.write_text(text, encoding="utf-8")
    recipe = load_recipe(str(path))
    assert (recipe.name, recipe.output_dir) == ("my_recipe", "runs/my_recipe")  # what the page says of these two
    assert recipe.data.path == str(tmp_path / "task.jsonl")
    smaller = without_one(yaml.safe_load(text))
    assert len(smaller) == 6
    for tree in smaller:
        path.write_text(yaml.safe_dump(tree), encoding="utf-8")
        with pytest.raises(UserError):
            load_recipe(str(path))
