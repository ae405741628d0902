"""The page of all recipe keys, ``docs/recipe.md``: what the sections themselves say, so that it is never out of date.

python -m nslora_dist.recipe_page > docs/recipe.md
"""

import inspect
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from nslora_dist.merge_recipe import MergeRecipe
from nslora_dist.recipe import VOLATILE, Recipe
from nslora_dist.recipe_file import FILLED
from nslora_dist.recipe_types import MOST, InWords, Section
from nslora_dist.run_folder import AFTER_CALIBRATION
from nslora_dist.study.spec import Study

TEMPLATE = Path(__file__).resolve().parent.parent / "docs" / "recipe.md.j2"
"""The page's prose, with ``{{ recipe }}`` and the like where the keys go."""
MARK = " °"
"""Behind a key that may change while a run goes on."""
REQUIRED = "**required**"
PLAIN = {str: "text", int: "int", float: "number", bool: "true or false", Any: "value"}


@dataclass(frozen=True)
class Key:
    """One row.

    Attributes:
        name: dotted from the recipe's root, ``calibration.sources.<name>.path``.
        kind: what its value is, in words.
        default: as in YAML; empty where there is none.
        meaning: what its field says, or the section that it holds; empty where neither says anything.
    """

    name: str
    kind: str
    default: str
    meaning: str


@dataclass(frozen=True)
class Part:
    """A section where it stands.

    Attributes:
        name: dotted; empty for the root.
        said: its docstring.
        keys: none where they are those of an earlier part, which ``said`` names.
    """

    name: str
    said: str
    keys: tuple[Key, ...]


def page() -> str:
    """The whole page, in Markdown."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        recipe=markdown(Recipe, volatile=VOLATILE),
        merge_recipe=markdown(MergeRecipe),
        study=markdown(Study, filled={"name": FILLED["name"], "output_dir": "`studies/` and the file's name"}),
        volatile=_listed(VOLATILE),
        after_calibration=_listed(after_calibration()),
        mark=MARK.strip(),
    )


def markdown(root: type[Section], *, volatile: Sequence[str] = (), filled: Mapping[str, str] = FILLED) -> str:
    """A heading, a docstring and a table for every section of a recipe.

    Args:
        root: the recipe.
        volatile: keys that are marked, with whatever is in them.
        filled: key → what stands for a default that the section does not have.
    """
    texts = []
    for part in parts(root):
        rows = [["key", "type", "default", "meaning"], ["---"] * 4]
        for key in part.keys:
            mark = MARK if any(f"{key.name}.".startswith(f"{name}.") for name in volatile) else ""
            rows.append([f"`{key.name}`{mark}", key.kind, key.default or filled.get(key.name, REQUIRED), key.meaning])
        table = "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows)
        heading = [f"### `{part.name}`"] if part.name else []
        texts += [*heading, part.said, *([table] if part.keys else [])]
    return "\n\n".join(texts)


def parts(root: type[Section]) -> Iterator[Part]:
    """The sections of a recipe, each before those in it."""
    earlier: list[tuple[str, type[Section]]] = []
    waiting: list[tuple[str, type[Section]]] = [("", root)]
    while waiting:
        name, section = waiting.pop(0)
        said = docstring(section)
        same = next((known for known in earlier if issubclass(known[1], section)), None)
        if same is not None:
            more = [f"`{key}`" for key in same[1].model_fields if key not in section.model_fields]
            without = f" without {' and '.join(more)}" if more else ""
            yield Part(name, f"{said} Its keys are those of `{same[0]}`{without}.", ())
            continue
        earlier.append((name, section))
        prefix = f"{name}." if name else ""
        hints = get_type_hints(section, include_extras=True)
        fields = section.model_fields.items()
        yield Part(name, said, tuple(_key(prefix, key, field, hints[key]) for key, field in fields))
        inner = [(f"{prefix}{key}", *held) for key in section.model_fields if (held := section_in(hints[key]))]
        waiting[:0] = [(f"{key}.<name>" if named else key, held) for key, held, named in inner]


def _key(prefix: str, name: str, field: FieldInfo, hint: Any) -> Key:
    held = section_in(hint)
    meaning = markup(field.description or "")
    if not meaning and held is not None:
        meaning = docstring(held[0]).partition(". ")[0].rstrip(".") + "."
    return Key(f"{prefix}{name}", words(hint), _default(field), meaning)


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is PydanticUndefined:
        return ""
    return "its keys' own" if isinstance(value, Section) else f"`{_as_yaml(value)}`"


def _as_yaml(value: Any) -> str:
    """A default on one line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, tuple):
        return f"[{', '.join(map(_as_yaml, value))}]"
    if isinstance(value, str):
        return value if re.fullmatch(r"[\w.-]+", value) else f'"{value}"'
    return f"{value:g}" if isinstance(value, float) else str(value)


def words(kind: Any) -> str:
    """A field's type as somebody who writes YAML understands it: ``int ≥ 1``, ``one of eigh, fast``.

    Args:
        kind: with its ``Annotated``.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        rules = [rule for found in arguments[1:] for rule in getattr(found, "metadata", [found])]
        said = [rule.words for rule in rules if isinstance(rule, InWords)]
        return said[0] if said else _bounded(words(arguments[0]), rules)
    if origin in (Union, UnionType):
        null = ", or null" if NoneType in arguments else ""
        return " or ".join(words(member) for member in arguments if member is not NoneType) + null
    if origin is Literal:
        return f"one of {', '.join(arguments)}"
    if origin is tuple:
        many = "list" if arguments[-1] is ... else f"list of {len(arguments)}"
        return f"{many}: {words(arguments[0])}"  # all of one kind
    if origin is dict:
        return f"mapping {'key' if arguments[1] is Any else 'name'} → {words(arguments[1])}"
    return "section" if _is_section(kind) else PLAIN[kind]


def _bounded(said: str, rules: Sequence[Any]) -> str:
    """With its bounds; a bound that only keeps a number exact in JSON is none that anybody writes."""
    low = max(_bounds(rules, gt=False, ge=True), default=None, key=lambda bound: (bound[0], not bound[1]))
    high = min(_bounds(rules, lt=False, le=True), default=None)
    if low is None or high is None:
        after = [f" {'≥' if low[1] else '>'} {low[0]:g}"] if low else []
        after += [f" {'≤' if high[1] else '<'} {high[0]:g}"] if high else []
        return "".join([said, *after])
    return f"{low[0]:g} {'≤' if low[1] else '<'} {said} {'≤' if high[1] else '<'} {high[0]:g}"


def _bounds(rules: Sequence[Any], **inclusive: bool) -> Iterator[tuple[float, bool]]:
    """The bounds of some kinds, and whether each is itself allowed."""
    for name, allowed in inclusive.items():
        for rule in rules:
            value = getattr(rule, name, None)
            if value is not None and abs(value) != MOST:
                yield value, allowed


def section_in(kind: Any) -> tuple[type[Section], bool] | None:
    """The section that a value is or holds, and whether by names of the writer's choice."""
    if _is_section(kind):
        return kind, False
    named = get_origin(kind) is dict
    for argument in get_args(kind):
        found = section_in(argument)
        if found is not None:
            return found[0], named or found[1]
    return None


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)


def docstring(section: type[Section]) -> str:
    """What a section says of itself, in one paragraph."""
    return markup(inspect.getdoc(section) or "")


def markup(text: str) -> str:
    """A docstring as Markdown on one line, other pages as links."""
    return re.sub(r"docs/(\w+\.md)", r"[\1](\1)", " ".join(text.split()).replace("``", "`"))


def after_calibration() -> list[str]:
    """The keys that no null space depends on, whole sections where all of theirs are among them."""
    found: list[str] = []
    for part in parts(Recipe):
        for key in part.keys:
            if AFTER_CALIBRATION.match(key.name) and not any(key.name.startswith(f"{known}.") for known in found):
                found.append(key.name)
    return found


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


if __name__ == "__main__":
    sys.stdout.write(page())
