"""The kinds of values that recipes are made of."""

import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

MOST = 2**53
"""Largest count: what every language's JSON can hold exactly."""
LONGEST_NAME = 100
"""Letters; a file system takes 255 bytes."""


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


Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Count = Annotated[int, Field(ge=1, le=MOST)]
Seed = Annotated[int, Field(ge=-MOST, le=MOST)]
Name = Annotated[str, AfterValidator(_plain_name)]
"""Of something that gets a file or a folder of its own."""
Names = Annotated[
    tuple[str, ...], Field(min_length=1), BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)
]


class Section(BaseModel):
    """A part of the recipe: unknown keys and wrong types are errors, and values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
