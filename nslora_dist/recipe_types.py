"""The kinds of values that recipes are made of."""

import re
from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

MIXTURE = "calibration"
"""Name under which the weighted mixture of all sources is measured, beside each source and probe of its own."""
MOST = 2**53
"""Largest count: what every language's JSON can hold exactly."""
LONGEST_NAME = 100
"""Letters; a file system takes 255 bytes."""
LONGEST_PATH, LONGEST_PART = 4000, 255
"""Bytes; a system refuses more."""


@dataclass(frozen=True)
class InWords:
    """What somebody who writes YAML calls a kind of value, where its type does not say it; for ``recipe_page``."""

    words: str


def _plain_name(name: str) -> str:
    if re.fullmatch(r"[\w-][\w.-]*", name) is None:
        raise ValueError(
            f"a name becomes a file name: use letters, digits, - and _, and dots not in front; this is {name!r}"
        )
    if len(name) > LONGEST_NAME or len(name.encode()) > 2 * LONGEST_NAME:
        raise ValueError(
            f"a name becomes a file name, and this one is {len(name)} letters long; use {LONGEST_NAME} at most"
        )
    return name


def _path_text(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty; give a path or a name")
    if len(text.encode()) > LONGEST_PATH or any(len(part.encode()) > LONGEST_PART for part in text.split("/")):
        raise ValueError(f"is {len(text)} letters long, which no path and no name on the hub is")
    return text


Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Count = Annotated[int, Field(ge=1, le=MOST)]
Seed = Annotated[int, Field(ge=-MOST, le=MOST)]
Name = Annotated[str, AfterValidator(_plain_name), InWords("name")]
"""Of something that gets a file or a folder of its own."""
Where = Annotated[str, AfterValidator(_path_text), InWords("path or hub name")]
LocalPath = Annotated[str, AfterValidator(_path_text), InWords("path")]
Names = Annotated[
    tuple[str, ...],
    Field(min_length=1),
    BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v),
    InWords("list of names"),
]


class Section(BaseModel):
    """A part of the recipe: unknown keys and wrong types are errors, and values do not change after loading.

    The text under a field is what ``docs/recipe.md`` says of its key.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
