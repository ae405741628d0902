"""Judging the rows of a ``datasets`` table (Parquet, hub, folders), which come in typed columns."""

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Json, Value

from nslora_dist.bad_rows import Problem, empty_response, judge_text

_TEXT = ("string", "large_string", "string_view")


def judge_rows(rows: Dataset, part: range, *, filled: Sequence[str]) -> tuple[list[Problem | None], list[int]]:
    """What is wrong with each row of a part, None where it is usable, and each row's bytes of text."""
    problems: list[Problem | None] = [None] * len(part)
    sizes = [0] * len(part)
    for field in rows.column_names:
        found, lengths = _judge_column(rows, part, field, filled=filled)
        problems = [earlier or now for earlier, now in zip(problems, found, strict=True)]
        sizes = [earlier + now for earlier, now in zip(sizes, lengths, strict=True)]
    return problems, sizes


def _judge_column(
    rows: Dataset, part: range, field: str, *, filled: Sequence[str]
) -> tuple[list[Problem | None], list[int]]:
    feature = rows.features[field]
    if isinstance(feature, Value) and feature.dtype in _TEXT:
        column = rows.with_format("arrow")[part.start : part.stop][field]
        column = column.cast(pa.large_string()) if feature.dtype == "string_view" else column
        lengths = pc.fill_null(pc.binary_length(column), 0).to_pylist()
        if column.null_count or (field in filled and 0 in lengths) or not _is_utf8(column):
            raw = column.cast(pa.large_binary()).to_pylist()
            return [_judge_bytes(value, field, filled=filled) for value in raw], lengths
        return [None] * len(part), lengths
    if isinstance(feature, Value | Json):
        values = rows[part.start : part.stop][field]
        lengths = [len(value) if isinstance(value, str) else 0 for value in values]
        return [_missing(value, field) or judge_text(value, field, filled=filled) for value in values], lengths
    # Decoding an image or a sound, only to say that it is none, may need packages that are not here.
    problem = Problem("not_text", f"field '{field}' is {type(feature).__name__}, not text", field)
    return [problem] * len(part), [0] * len(part)


def _is_utf8(column: pa.ChunkedArray) -> bool:
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:  # the JSON reader lets other encodings through, up to the first access
        return False
    return True


def _judge_bytes(value: bytes | None, field: str, *, filled: Sequence[str]) -> Problem | None:
    if value is None:
        return _missing(value, field)
    try:
        value.decode()
    except UnicodeDecodeError as error:
        return Problem("not_utf8", f"field '{field}' is not UTF-8 (at byte {error.start}); convert it to UTF-8", field)
    return empty_response(field) if not value and field in filled else None


def _missing(value: object, field: str) -> Problem | None:
    # In a typed column a field that is not there is null like any other.
    return Problem("null", f"field '{field}' is missing or null, not text", field) if value is None else None
