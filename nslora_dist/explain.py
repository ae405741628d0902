"""What is wrong with a recipe, in one line a person can act on."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError


def nearest(word: str, known: Sequence[str]) -> str:
    """`` (did you mean 'x'?)`` where a known name is close, else nothing."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else ""


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
    key = ".".join(str(part) for part in location)
    source = "on the command line" if any(key and (key == o or o.startswith(key)) for o in overridden) else origin
    where = f" ({source})" if source else ""
    if first["type"] == "extra_forbidden":
        known = _known_keys(root, location)
        hint = nearest(str(location[-1]), known) or f"; known here: {', '.join(known)}"
        return f"{key}: unknown key{hint}{where}"
    if first["type"] == "missing":
        return f"{key}: missing, and there is no default{where}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return f"{key}: {message}{where}" if key else f"{message}{where}"
    message = message[0].lower() + message[1:]
    return f"{key}: {message}, got {_short(first['input'])}{where}"


def _known_keys(root: type[BaseModel], location: Sequence[str | int]) -> list[str]:
    """The keys allowed in the section that ``location``'s last part stands in."""
    from pydantic import BaseModel  # a GPU benchmark runs where there is none

    model: Any = root
    for part in location[:-1]:
        if isinstance(model, type) and issubclass(model, BaseModel):
            model = model.model_fields[str(part)].annotation if part in model.model_fields else None
        else:  # a mapping of named entries: its values' type
            inner = [a for a in getattr(model, "__args__", ()) if isinstance(a, type) and issubclass(a, BaseModel)]
            model = inner[0] if inner else None
        for argument in getattr(model, "__args__", ()):  # Section | None
            if isinstance(argument, type) and issubclass(argument, BaseModel) and type(None) in model.__args__:
                model = argument
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
