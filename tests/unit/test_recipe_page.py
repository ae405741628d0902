"""``docs/recipe.md`` is what the recipe's sections say, and they say something of every key."""

import inspect
from collections.abc import Iterator

import pytest

from helpers.launching import ROOT
from nslora_dist.merge_recipe import MergeRecipe
from nslora_dist.recipe import VOLATILE, Recipe
from nslora_dist.recipe_page import _section, page
from nslora_dist.recipe_types import Section


def keys(kind: type[Section], start: str = "") -> Iterator[tuple[str, str | None]]:
    """Every key below a section, sections by name as ``<name>``, and what is said of it."""
    for name, field in kind.model_fields.items():
        yield f"{start}{name}", field.description
        inner, many = _section(field.annotation)
        if inner is not None:
            yield from keys(inner, f"{start}{name}.{'<name>.' if many else ''}")


def test_the_page_is_what_the_code_says() -> None:
    assert page() == (ROOT / "docs" / "recipe.md").read_text(), (
        "make it again: python -m nslora_dist.recipe_page > docs/recipe.md"
    )


@pytest.mark.parametrize("root", [Recipe, MergeRecipe])
def test_every_key_says_what_it_is_and_stands_on_the_page(root: type[Section]) -> None:
    found = dict(keys(root))
    assert len(found) > 30 and [key for key, said in found.items() if not said] == []
    text = page()
    assert [key for key in found if f"| `{key.rsplit('.')[-1]}` |" not in text] == []


def test_what_may_change_are_keys() -> None:
    assert set(VOLATILE) <= dict(keys(Recipe)).keys()


def test_types_and_defaults_are_those_of_the_code() -> None:
    text = page()
    for row in (
        "| `samples` | integer ≥ 2 | `256` |",
        "| `heldout_fraction` | number ≥ 0 and < 1 | `0.125` |",
        "| `limit` | integer ≥ 1 or number > 0 and < 1 | `null` |",
        "| `betas` | [number ≥ 0 and < 1, number ≥ 0 and < 1] | `[0.9, 0.999]` |",
        "| `learning_rate` | number > 0 | *required* |",
        "| `every` | integer ≥ 1 or `null` | `100` |",
        "| `packing` | true or false | `false` |",
        "| `placement` | `rank0` or `spread` | `rank0` |",
        "| `output_dir` | path or name | `runs/<name>` |",
    ):
        assert row in text, row


def test_a_key_s_words_are_read_from_below_it() -> None:
    class Own(Section):
        """Words of the section."""

        key: int = 3
        """Words of the key."""

    assert Own.model_fields["key"].description == "Words of the key." and inspect.getdoc(Own) == "Words of the section."
