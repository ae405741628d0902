"""``cells.jsonl``: one JSON line a finished cell, appended whole or not at all."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nslora_dist.study.cells import Cell

FILE = "cells.jsonl"
DIGITS = 6


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Appends one line in one write, on disk when this returns; several processes may do so at once.

    Raises:
        OSError: it could not be written, or only a part of it.
        ValueError: it holds a number that JSON has not.
    """
    text = (json.dumps(line, allow_nan=False) + "\n").encode()
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        written = os.write(handle, text)
        if written != len(text):  # a full disk takes a part; the reader passes over it
            os.write(handle, b"\n")
            raise OSError(28, os.strerror(28), str(path))
        os.fsync(handle)
    finally:
        os.close(handle)


def close_torn_line(path: Path) -> None:
    """Ends a last line that a crash has cut off, so that the next one starts on its own."""
    if not path.is_file() or not path.stat().st_size:
        return
    with path.open("rb+") as file:
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")
            file.flush()
            os.fsync(file.fileno())


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """All whole lines, of each id the first, and how many lines could not be read."""
    found: dict[str, dict[str, Any]] = {}
    torn = 0
    if not path.is_file():
        return [], 0
    for text in path.read_bytes().split(b"\n"):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            found.setdefault(str(line["id"]), line)
        except (ValueError, KeyError, TypeError):
            torn += 1
    return list(found.values()), torn


def of_cells(lines: Iterable[dict[str, Any]], cells: Iterable[Cell]) -> list[dict[str, Any]]:
    """The lines of a study as it is now, under its names of today: the file may hold more, of earlier settings.

    Each gets the ``grids`` that its cell belongs to. They come in the order of the cells, whoever finished first.
    """
    names = ("size", "task", "calibration", "arm", "grids")
    by_id = {line["id"]: line for line in lines}
    return [by_id[cell.id] | {name: getattr(cell, name) for name in names} for cell in cells if cell.id in by_id]


def round_floats(value: Any) -> Any:
    """Every float to six significant digits; NaN and infinities, which JSON has not, become null."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if abs(value) < float("inf") else None
    if isinstance(value, dict):
        return {key: round_floats(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [round_floats(inner) for inner in value]
    return value
