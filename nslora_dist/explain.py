"""What is wrong with a recipe, in one line a person can act on."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Union, get_args, get_origin

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError


PLAIN = {
    "tuple_type": "wanted is a list, as [a, b]",
    "list_type": "wanted is a list, as [a, b]",
    "dict_type": "wanted is a section of keys, as {key: value}",
    "model_type": "wanted is a section of keys, as {key: value}",
}
"""Kinds of mistakes that pydantic names in Python's words."""


def nearest(word: str, known: Sequence[str]) -> str:
    """`` (did you mean 'x'?)`` where a known name is close, else nothing."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else ""


def hub_reason(error: Exception) -> str:
    """Why the Hugging Face hub gave nothing, in one line; its first line alone is a status and an address.

    Args:
        error: what ``huggingface_hub`` or ``transformers`` raised.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    known = any(sign in text for sign in ("401 Client Error", "403 Client Error", "gated repo"))
    remedy = (
        "; accept the licence on the model's page where it is gated, and run 'hf auth login' or set HF_TOKEN on every "
        "machine"
    )
    return f"{text[:300]}{'...' if len(text) > 300 else ''}{remedy if known else ''}"


def explain(error: ValidationError, root: type[BaseModel], *, origin: str = "", overridden: Sequence[str] = ()) -> str:
    """The first thing wrong: which value, where it came from, what to do.

    Args:
        error: what validation raised.
        root: the model that was validated; its fields are the known keys.
        origin: where the values were read, for the message.
        overridden: dotted keys that came from the command line instead.
    """
    first = error.errors()[0]
    location = first["loc"]
    if location[-1:] == ("[key]",) and first["type"] != "extra_forbidden":
        location = location[:-1]  # a name that is no good: the name itself
    location = _as_written(root, location)
    key = ".".join(str(part) for part in location)
    message = first["msg"].removeprefix("Value error, ")
    named = key or message.partition(":")[0]  # a check of the whole recipe says itself what it is about
    source = "on the command line" if any(_meet(named, o) for o in overridden) else origin
    where = f" ({source})" if source else ""
    if first["type"] == "extra_forbidden":
        known = _known_keys(root, location)
        hint = nearest(str(location[-1]), known) or f"; known here: {', '.join(known)}"
        return f"{key}: unknown key{hint}{where}"
    if first["type"] == "missing":
        return f"{key}: missing, and there is no default{where}"
    if first["type"] == "value_error":
        return f"{key}: {message}{where}" if key else f"{message}{where}"
    message = PLAIN.get(first["type"], message[0].lower() + message[1:])
    return f"{key}: {message}, got {_short(first['input'])}{where}"


def _meet(key: str, other: str) -> bool:
    """Whether one of two dotted keys is the other, or stands in it; the empty one is nobody's."""
    return bool(key) and (f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}."))


def _as_written(root: type[BaseModel], location: Sequence[str | int]) -> tuple[str | int, ...]:
    """A location without pydantic's own names of the members of a union."""
    kinds: list[Any] = [root]
    parts: list[str | int] = []
    for part in location:
        if len(kinds) > 1:  # int | float: it says which of them was tried
            kinds = []
        else:
            parts.append(part)
            kinds = _inside(kinds, part)
    return tuple(parts)


def _inside(kinds: Sequence[Any], part: str | int) -> list[Any]:
    """What a part of a value may be, None left out, where the value is of one known kind."""
    if len(kinds) != 1:
        return []
    fields, arguments = _fields(kinds[0]), get_args(kinds[0])
    if fields:
        return _members(fields[str(part)].annotation) if part in fields else []
    if not arguments:
        return []
    return _members(arguments[-1] if get_origin(kinds[0]) is dict else arguments[0])


def _members(kind: Any) -> list[Any]:
    if get_origin(kind) is Annotated:
        return _members(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        return [member for argument in get_args(kind) for member in _members(argument) if member is not NoneType]
    return [kind]


def _fields(kind: Any) -> dict[str, Any]:
    from pydantic import BaseModel  # a GPU benchmark runs where there is none

    return dict(kind.model_fields) if isinstance(kind, type) and issubclass(kind, BaseModel) else {}


def _known_keys(root: type[BaseModel], location: Sequence[str | int]) -> list[str]:
    """The keys allowed in the section that ``location``'s last part stands in."""
    kinds: list[Any] = [root]
    for part in location[:-1]:
        kinds = _inside(kinds, part)
    return list(_fields(kinds[0])) if len(kinds) == 1 else []


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
