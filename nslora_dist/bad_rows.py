"""Rows that cannot be used: what is wrong with a row, what the recipe wants done about it, and the counts of it."""

import logging
import reprlib
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Literal

from nslora_dist.errors import UserError

log = logging.getLogger("nslora_dist")

_SHOWN = 5  # numbers of bad rows in the warning

_brief = reprlib.Repr()  # never the whole of a value: it may be 100 MB of anything
_brief.maxstring = _brief.maxother = 40
_brief.maxlevel = 2


@dataclass(frozen=True)
class Problem:
    """Why a row cannot be used.

    Attributes:
        reason: The key it is counted under: ``not_utf8``, ``not_json``, ``not_an_object``, ``missing``, ``null``,
            ``not_text``, ``empty_response`` or ``line_too_long``.
        said: The same for a person, about this row.
        field: The field at fault; None where it is the whole row.
    """

    reason: str
    said: str
    field: str | None = None


@dataclass(frozen=True)
class RowCounts:
    """What became of the rows of one set.

    Attributes:
        rows: Rows that were read, the bad ones included.
        bad: Reason → rows left out for it, in the order of their first appearance; empty under ``on_bad_row: error``.
        duplicates: Rows whose tokens, after any cut, are exactly those of an earlier row; they are kept.
        too_long: Rows longer than the limit.
        left_out: Those of them that are not used at all; the others are cut at the end.
    """

    rows: int = 0
    bad: dict[str, int] = field(default_factory=dict)
    duplicates: int = 0
    too_long: int = 0
    left_out: int = 0

    def facts(self) -> dict[str, Any]:
        """The counts for ``report.json``: flat, the bad rows one key a reason, ``bad_rows_<reason>``, where any."""
        bad = {f"bad_rows_{reason}": count for reason, count in self.bad.items()}
        lengths = {"too_long": self.too_long, "left_out": self.left_out}
        total = {"rows": self.rows, "bad_rows": sum(self.bad.values())}
        return {**total, **bad, "duplicates": self.duplicates, **lengths}


class Tally:
    """Bad rows of one set as they are met: the first is an error, or all are counted and left out."""

    def __init__(self, policy: Literal["error", "skip"], *, where: str, name: str, lines: bool) -> None:
        """Starts at none.

        Args:
            policy: The recipe's ``on_bad_row``.
            where: Key and path of the set, which messages start with.
            name: The section's place in the recipe.
            lines: Whether numbers are those of lines in a file, from 1, or of rows, from 0.
        """
        self.policy, self.where, self.name, self.lines = policy, where, name, lines
        self.counts: Counter[str] = Counter()
        self._first: list[int] = []

    def place(self, number: int) -> str:
        """Which row it is, for a message."""
        return place(number, lines=self.lines)

    def add(self, number: int, problem: Problem) -> None:
        """Counts a bad row.

        Raises:
            UserError: the recipe says ``on_bad_row: error``; names the row, the field, the reason and the remedy.
        """
        if self.policy == "error":
            what = "line" if self.lines else "row"
            raise UserError(
                f"{self.where}: {self.place(number)}: {problem.said}; "
                f"mend or remove that {what}, or set {self.name}.on_bad_row=skip to leave such rows out"
            )
        self.counts[problem.reason] += 1
        if len(self._first) < _SHOWN:
            self._first.append(number)

    def warn(self) -> None:
        """One warning for all bad rows, if there were any."""
        if self.counts:
            log.warning("%s: left out %s", self.where, self.summary())

    def summary(self) -> str:
        """How many, why and where; for a tally that is not empty."""
        total = sum(self.counts.values())
        reasons = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in self.counts.items())
        kind, start = ("line", 1) if self.lines else ("row", 0)
        at = ", ".join(map(str, self._first)) + (", ..." if total > len(self._first) else "")
        many = "s" if total > 1 else ""
        return f"{total} bad row{many} ({reasons}): {kind}{many} {at} (the first is {start})"


def place(number: int, *, lines: bool) -> str:
    """A row for a message: both ways of counting are common, so it says which one holds."""
    return f"line {number} (the first is 1)" if lines else f"row {number} (the first is 0)"


def judge_text(value: object, name: str, *, filled: Collection[str]) -> Problem | None:
    """What is wrong with one field's value; None where it is usable text.

    Args:
        value: The value.
        name: The field.
        filled: Fields that must not be empty.
    """
    if value is None:
        return Problem("null", f"field '{name}' is null, not text", name)
    if not isinstance(value, str):
        shown = " ".join(_brief.repr(value).split())
        return Problem("not_text", f"field '{name}' is {type(value).__name__} {shown}, not text", name)
    if not value and name in filled:
        return empty_response(name)
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            code = f"U+{ord(value[error.start]):04X}"
            said = f"field '{name}' has half a surrogate pair ({code}) at character {error.start}, which is no text"
            return Problem("not_text", said, name)
    return None


def empty_response(name: str) -> Problem:
    """A response without any token."""
    return Problem("empty_response", f"field '{name}' is empty, there is nothing to predict", name)


def duplicates_warning(where: str, duplicates: int, rows: int) -> None:
    """One warning where rows repeat earlier ones; they stay, since repeating may be meant as a weight."""
    if duplicates:
        log.warning(
            "%s: %d of %d rows have exactly the tokens of an earlier row; they are kept", where, duplicates, rows
        )
