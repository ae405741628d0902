"""Local JSON files, one object a line or one array: read a row at a time, so that every bad row has its number.

The ``datasets`` reader would take such a file whole or not at all, guess types (a text that looks like a date becomes
one), and let other encodings through.
"""

import codecs
import json
import mmap
import re
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import datasets
import numpy as np
import pyarrow as pa

from nslora_dist import watch
from nslora_dist.bad_rows import Problem, Tally, judge_text
from nslora_dist.errors import StorageError, UserError
from nslora_dist.explain import nearest

LONGEST_LINE = 2**30
"""Bytes; a longer line is a bad row, whatever is in it: a file without line breaks must not fill the memory."""

IN_MEMORY = 64 * 2**20
"""Bytes of text up to which the rows of a file are held in memory, and past which they are mapped from disk."""

_BATCH_ROWS, _BATCH_BYTES = 1000, 8 * 2**20
_ENCODINGS = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}


@dataclass(frozen=True)
class ReadRows:
    """The usable rows of a file.

    Attributes:
        table: One column a field, all text.
        numbers: (rows,), int64: each row's line from 1, in an array its item from 0.
        sizes: (rows,), int64: characters of each row's text.
        read: Rows read, the bad ones included.
    """

    table: pa.Table
    numbers: np.ndarray
    sizes: np.ndarray
    read: int


@dataclass(frozen=True)
class _Source:
    """A file's rows in order, each with its number and as yet unread, and how one is read."""

    rows: Callable[[], Iterable[tuple[int, Any]]]
    parse: Callable[[Any], "dict[str, Any] | Problem"]


def refuse_other_encodings(path: Path, *, where: str) -> None:
    """Raises a UserError where a text file looks like UTF-16 or UTF-32: none of its rows can be read."""
    with path.open("rb") as file:
        start = file.read(4)
    found = next((kind for mark, kind in _ENCODINGS.items() if start.startswith(mark)), None)
    if found is None and len(start) == 4 and start.count(0) >= 2 and (start[0] == 0 or start[1] == 0):
        found = "UTF-32" if start.count(0) == 3 else "UTF-16"
    if found:
        raise UserError(f"{where}: looks like {found}; convert the file to UTF-8")


def is_by_line(path: Path) -> bool:
    """Whether a JSON file has one object a line: by its suffix, or as its first line has it."""
    if path.suffix != ".json":
        return True
    with path.open("rb") as file:
        first = next((line for line in iter(lambda: file.readline(LONGEST_LINE), b"") if line.strip()), b"")
    first = first.removeprefix(codecs.BOM_UTF8).strip()
    return first.startswith(b"{") and first.endswith(b"}")


def is_array(path: Path) -> bool:
    """Whether a JSON file holds one array."""
    with path.open("rb") as file:
        return file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


def read_json(
    path: Path, fields: Sequence[str], *, filled: Sequence[str], split: str, limit: int | None, tally: Tally
) -> ReadRows:
    """Reads a file that ``is_by_line`` or ``is_array``.

    Args:
        path: The file.
        fields: Columns to keep.
        filled: Those of them that must not be empty.
        split: ``train``, or a slice such as ``train[:100]``; it counts every row of the file, bad ones included.
        limit: Usable rows after which nothing more is judged.
        tally: Where bad rows go.

    Raises:
        UserError: a bad row where the tally takes none, no row with one of the fields, a split that cannot be
            understood, or a file that is no JSON array.
        OSError: a file that cannot be read.
    """
    source = _lines_of(path) if tally.lines else _array_of(path, where=tally.where)
    ranges = _ranges(split, source, path=path, tally=tally)
    store = _Store(fields)
    numbers, indices, sizes = array("q"), array("q"), array("q")
    rows = _Fields(fields, where=tally.where)
    read = 0
    in_order = all(before[1] <= after[0] for before, after in zip(ranges, ranges[1:], strict=False))
    last = max((end for _, end in ranges), default=0)
    whole = len(ranges) == 1 and ranges[0][0] == 0
    unread = iter(source.rows())
    for index, (number, raw) in enumerate(unread):
        if index >= last or (in_order and limit is not None and len(numbers) >= limit):
            break
        if not whole and not any(start <= index < end for start, end in ranges):
            continue
        if read % _BATCH_ROWS == 0:
            watch.progress(f"{tally.name}, {read} rows read")
        read += 1
        row = source.parse(raw)
        problem = row if isinstance(row, Problem) else rows.judge(row, filled=filled)
        if problem is not None:
            if tally.policy == "error" and problem.reason == "missing" and problem.field not in rows.seen:
                later = (source.parse(raw) for _, raw in unread)
                rows.look_for(str(problem.field), (row for row in later if isinstance(row, dict)))
            tally.add(number, problem)
            continue
        assert isinstance(row, dict)
        texts = [row[field] for field in fields]
        store.add(texts)
        numbers.append(number)
        indices.append(index)
        sizes.append(sum(map(len, texts)))
    if not numbers and read and set(tally.counts) == {"missing"}:
        rows.none_has_all()
    found = ReadRows(store.table(), np.array(numbers, np.int64), np.array(sizes, np.int64), read)
    return found if in_order else _reordered(found, np.array(indices, np.int64), ranges)


class _Fields:
    """The fields to be read, and which fields the rows have so far."""

    def __init__(self, fields: Sequence[str], *, where: str) -> None:
        self._fields, self._where = fields, where
        self.seen: dict[str, None] = {}

    def judge(self, row: dict[str, Any], *, filled: Sequence[str]) -> Problem | None:
        if not row.keys() <= self.seen.keys() and len(self.seen) < 100:
            self.seen |= dict.fromkeys(row)
        for field in self._fields:
            if field not in row:
                return Problem("missing", f"field '{field}' is missing", field)
            if (problem := judge_text(row[field], field, filled=filled)) is not None:
                return problem
        return None

    def look_for(self, field: str, later: Iterable[dict[str, Any]]) -> None:
        """Raises a UserError where no later row has the field either: then its name is wrong, and no row."""
        for row in later:
            if len(self.seen) < 100:
                self.seen |= dict.fromkeys(row)
            if field in row:
                return
        self._refuse(field)

    def none_has_all(self) -> None:
        """Raises a UserError where one of the fields was in no row at all."""
        for field in self._fields:
            if field not in self.seen:
                self._refuse(field)

    def _refuse(self, field: str) -> None:
        known = list(self.seen)
        shown = ", ".join(known[:20]) + (", ..." if len(known) > 20 else "") or "none"
        raise UserError(f"{self._where}: no field '{field}'{nearest(field, known)}; its fields are {shown}")


class _Store:
    """Rows of text on their way into a table: in memory while they are few, else mapped from a file without a name."""

    def __init__(self, fields: Sequence[str]) -> None:
        self._schema = pa.schema([(field, pa.large_string()) for field in fields])
        self._pending: list[list[str]] = [[] for _ in fields]
        self._batches: list[pa.RecordBatch] = []
        self._characters = self._bytes = 0
        self._file: BinaryIO | None = None
        self._writer: Any = None

    def add(self, texts: Sequence[str]) -> None:
        for column, text in zip(self._pending, texts, strict=True):
            column.append(text)
            self._characters += len(text)
        if len(self._pending[0]) >= _BATCH_ROWS or self._characters >= _BATCH_BYTES:
            self._flush()

    def table(self) -> pa.Table:
        self._flush()
        if self._file is None:
            return pa.Table.from_batches(self._batches, self._schema)
        with self._told():
            self._writer.close()
            self._file.flush()
        mapped = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        return pa.ipc.open_stream(pa.py_buffer(mapped)).read_all()

    def _flush(self) -> None:
        batch = pa.record_batch([pa.array(column, pa.large_string()) for column in self._pending], self._schema)
        self._pending = [[] for _ in self._pending]
        self._characters = 0
        self._batches.append(batch)
        self._bytes += batch.nbytes
        if self._bytes <= IN_MEMORY:
            return
        with self._told():
            if self._file is None:
                folder = Path(datasets.config.HF_DATASETS_CACHE)
                folder.mkdir(parents=True, exist_ok=True)
                self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (it lives as long as the table)
                self._writer = pa.ipc.new_stream(self._file, self._schema)
            for batch in self._batches:
                self._writer.write_batch(batch)
        self._batches = []

    @staticmethod
    @contextmanager
    def _told() -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(
                f"{datasets.config.HF_DATASETS_CACHE}: rows that are too many for memory cannot be written there "
                f"({error.strerror or error}); make room, or name another folder with HF_DATASETS_CACHE"
            ) from error


def _lines_of(path: Path) -> _Source:
    def rows() -> Iterator[tuple[int, bytes]]:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(LONGEST_LINE):
                number += 1
                if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
                    while (rest := file.readline(2**20)) and not rest.endswith(b"\n"):
                        pass
                if not line.isspace():
                    yield number, line

    return _Source(rows, _parse_line)


def _parse_line(line: bytes) -> dict[str, Any] | Problem:
    if len(line) >= LONGEST_LINE:
        return Problem("line_too_long", f"the line is longer than {LONGEST_LINE} bytes")
    try:
        text = (
            line.rstrip().removeprefix(codecs.BOM_UTF8).decode()
        )  # files put together of several have marks inside too
    except UnicodeDecodeError as error:
        byte = line[error.start]
        return Problem("not_utf8", f"not UTF-8 (byte 0x{byte:02X} at position {error.start} of the line)")
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        return Problem("not_json", f"not JSON ({error.msg[0].lower() + error.msg[1:]} at column {error.colno})")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets thousands deep
        return Problem("not_json", f"not JSON that can be read ({str(error)[:60]})")
    return _as_object(row)


def _as_object(row: Any) -> dict[str, Any] | Problem:
    if isinstance(row, dict):
        return row
    return Problem("not_an_object", f"a JSON {type(row).__name__}, not an object of fields")


def _array_of(path: Path, *, where: str) -> _Source:
    """The whole file at once: where one item of an array ends is not known before it is read."""
    try:
        found = json.loads(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 (byte {error.start} of the file); convert the file to UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{where}: cannot be read as a JSON array: {str(error)[:100]}; mend it, "
            "or write one object a line (.jsonl), where single lines can be left out"
        ) from error
    return _Source(lambda: enumerate(found), _as_object)


def _ranges(split: str, source: _Source, *, path: Path, tally: Tally) -> list[tuple[int, int]]:
    """From and to of each part of a split such as ``train[:10%]+train[50:]``, over all rows of the file."""
    if re.fullmatch(r"\w+", split):
        return [(0, 2**62)]
    name = re.match(r"\w+", split)
    count = sum(1 for _ in source.rows())
    try:
        parts = datasets.ReadInstruction.from_spec(split).to_absolute({name.group() if name else "train": count})
    except (ValueError, AssertionError) as error:  # what it raises for what it does not understand
        raise UserError(f"{tally.name}.split '{split}' of {path}: {' '.join(str(error).split())}") from error
    return [(part.from_ or 0, count if part.to is None else part.to) for part in parts]


def _reordered(found: ReadRows, indices: np.ndarray, ranges: Sequence[tuple[int, int]]) -> ReadRows:
    chosen = [np.arange(*np.searchsorted(indices, [start, end])) for start, end in ranges]
    order = np.concatenate(chosen)
    return ReadRows(found.table.take(order), found.numbers[order], found.sizes[order], found.read)
