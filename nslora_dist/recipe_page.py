"""``docs/recipe.md``: every key of a recipe, from the sections themselves.

python -m nslora_dist.recipe_page > docs/recipe.md
"""

import inspect
import re
import sys
from collections.abc import Iterator, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import AfterValidator
from pydantic.fields import FieldInfo

from nslora_dist.card import markdown_table
from nslora_dist.merge_recipe import MergeRecipe
from nslora_dist.recipe import VOLATILE, Recipe
from nslora_dist.recipe_types import MOST, Name, Section, Where

INTRODUCTION = """\
# Recipes, key by key

Made from the code by `python -m nslora_dist.recipe_page > docs/recipe.md`. A recipe is one YAML file; unknown keys,
wrong types and impossible combinations are errors before any weight loads, and `--dry-run` prints the recipe with every
default filled in.

- `--recipe` takes a name in `recipes/` or a path; `section.key=value` on the command line stands for what the file
  says, as in `train.learning_rate=1e-3 'calibration.sources={wiki: {path: ./wiki.jsonl}}'`.
- A path `./x` or `../x` counts from the recipe's folder, on the command line from the working folder; any other is
  local where it exists, and a name on the hub otherwise.
- Keys without a default are *required*. `null` is a value like any other: it takes a default away.
"""
CHANGES = """\
## What may change while a run goes on

A run's folder belongs to one recipe. Between two starts these may differ, for they say how and where it is computed,
not what, and which lm-eval tasks are asked, so that one that fails can be left out:
"""
WORDS = {bool: "true or false", int: "integer", float: "number", str: "text", Any: "anything"}
BOUNDS = {annotated_types.Ge: ("ge", "≥"), annotated_types.Gt: ("gt", ">"), annotated_types.Le: ("le", "≤")} | {
    annotated_types.Lt: ("lt", "<")
}
FILLED = {"name": "the file's", "output_dir": "`runs/<name>`"}
"""What ``recipe_file`` fills in."""
VALIDATED = {get_args(Where)[1].func: "path or name", get_args(Name)[1].func: "name"}
"""Kinds of texts, by the function that checks them."""


def page() -> str:
    """The whole page."""
    volatile = ", ".join(f"`{key}`" for key in VOLATILE)
    return (
        "\n\n".join(
            [
                INTRODUCTION.strip(),
                *_sections(Recipe, "The recipe", prefix=""),
                f"{CHANGES.strip()}\n{volatile}.",
                *_sections(MergeRecipe, "The recipe of a merge", prefix="Merge: "),
            ]
        ).replace("``", "`")
        + "\n"
    )


def _sections(kind: type[Section], title: str, *, prefix: str) -> Iterator[str]:
    """A section, its keys, and the sections inside it, depth first; one that came before is only named again."""
    seen: dict[type[Section], str] = {}

    def walk(kind: type[Section], key: str) -> Iterator[str]:
        heading = f"### {prefix}`{key}`" if key else f"## {title}"
        rows, inner = [], []
        for name, field in kind.model_fields.items():
            here = f"{key}.{name}" if key else name
            section, many = _section(field.annotation)
            meaning = " ".join((field.description or "").split())
            if section is not None:
                here += ".<name>" if many else ""
                known = seen.get(section)
                link = _anchor(f"{prefix}{known or here}")
                meaning += f" Keys: as [`{known}`](#{link})." if known else f" Keys: [below](#{link})."
                if not known:
                    seen[section] = here
                    inner.append((section, here))
            default = FILLED.get(name, "") if not key else ""
            rows.append([f"`{name}`", _type(field, many=many, section=section), default or _default(field), meaning])
        table = markdown_table(["key", "type", "default", "meaning"], rows).replace("--:", ":--")  # words, no figures
        yield f"{heading}\n\n{inspect.cleandoc(kind.__doc__ or '')}\n\n{table}"
        for section, here in inner:
            yield from walk(section, here)

    yield from walk(kind, "")


def _anchor(heading: str) -> str:
    """Of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _section(annotation: Any) -> tuple[type[Section] | None, bool]:
    """The section that a field holds, if any, and whether it holds many of them by name."""
    for kind in _members(annotation):
        if get_origin(kind) is dict:
            inner, _ = _section(get_args(kind)[1])
            return inner, inner is not None
        if inspect.isclass(kind) and issubclass(kind, Section):
            return kind, False
    return None, False


def _members(kind: Any) -> list[Any]:
    if get_origin(kind) in (Union, UnionType):
        return [member for argument in get_args(kind) for member in _members(argument) if member is not NoneType]
    return [kind]


def _type(field: FieldInfo, *, many: bool, section: Any) -> str:
    if section is not None:
        return "sections by name" if many else "section"
    words = _words(field.annotation, field.metadata)
    may_be_null = NoneType in get_args(field.annotation)  # said by a default of null, if that is it
    return f"{words} or `null`" if may_be_null and field.default is not None else words


def _words(kind: Any, metadata: Sequence[Any] = ()) -> str:
    if get_origin(kind) is Annotated:
        inner, *own = get_args(kind)
        return _words(inner, own)
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(dict.fromkeys(_words(member) for member in _members(kind)))
    if get_origin(kind) is Literal:
        *most, last = (f"`{value}`" for value in get_args(kind))
        return f"{', '.join(most)} or {last}" if most else last
    if get_origin(kind) is tuple:
        inner, second = get_args(kind)
        one = _words(inner)
        return f"list of {'names' if inner is str else one}" if second is Ellipsis else f"[{one}, {_words(second)}]"
    if get_origin(kind) is dict:
        return "keys and values"
    for item in metadata:
        if isinstance(item, AfterValidator) and item.func in VALIDATED:
            return VALIDATED[item.func]
    return WORDS[kind] + _bounds(metadata)


def _bounds(metadata: Sequence[Any]) -> str:
    """`` ≥ 0 and < 1``; the largest count is nobody's concern."""
    flat = [inner for item in metadata for inner in getattr(item, "metadata", [item])]  # a Field holds several
    found = {  # the last of a kind is the field's own
        kind: f"{sign} {getattr(item, name):g}"
        for item in flat
        for kind, (name, sign) in BOUNDS.items()
        if isinstance(item, kind) and abs(getattr(item, name)) != MOST
    }
    return f" {' and '.join(found.values())}" if found else ""


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "*required*"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, Section):
        return "all its defaults"
    if value is None or isinstance(value, bool):
        return "`null`" if value is None else f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return f"`[{', '.join(map(str, value))}]`"
    return "none" if value == {} else f"`{value}`"


if __name__ == "__main__":
    sys.stdout.write(page())
