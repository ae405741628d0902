"""The files of a checkpoint: every rank writes the elements it keeps, any number of ranks read the elements they need.

    manifest.json              what the state is and belongs to, every file's SHA-256 and its own
    rank-00003.safetensors     ``<parameter>/<kind>/<start>`` → (n,) float32: elements start to start + n, row-major

``kind`` is ``value``, ``exp_avg`` or ``exp_avg_sq``. A parameter's pieces cover it once, however many ranks of
whatever engine wrote them; nothing is gathered to write them, and nothing but its own part is read by a rank. At 70B,
r = 16, that is 1.3 GB over all ranks; the frozen base, and A where it is frozen, are never written.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nslora_dist import artifacts, manifests
from nslora_dist.engines.base import MOMENTS, Shard
from nslora_dist.errors import UserError

KINDS = ("value", *MOMENTS)


def part_name(rank: int) -> str:
    """The file of one rank."""
    return f"rank-{rank:05d}.safetensors"


def on_host(shards: list[Shard]) -> list[Shard]:
    """A copy of the shards in host memory: all that training waits for."""
    copies = [{key: value.to("cpu", torch.float32, copy=True) for key, value in s.values.items()} for s in shards]
    return [replace(shard, values=values) for shard, values in zip(shards, copies, strict=True)]


def write_part(path: Path, shards: list[Shard]) -> dict[str, Any]:
    """Writes one rank's file and waits until it is on the disk.

    Returns:
        Its manifest entry.
    """
    tensors = {f"{s.name}/{key}/{s.start}": value for s in shards for key, value in s.values.items() if value.numel()}
    artifacts.save_tensors(path, tensors)
    return manifests.describe_file(path)


class Pieces:
    """Every part's tensors by parameter and kind, from the files' headers.

    No file stays open, or mapped, beyond a method: the folder will be deleted while training goes on.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        """Reads the headers of a checkpoint's files.

        Raises:
            UserError: a file is unreadable, or the pieces do not cover every parameter exactly once.
        """
        self.folder = folder
        found: dict[tuple[str, str], list[tuple[int, int, str, str]]] = {}
        for file in manifest["files"]:
            try:
                with safe_open(folder / file, framework="pt", device="cpu") as opened:
                    for key in opened.keys():  # noqa: SIM118 (no mapping)
                        name, kind, start = key.rsplit("/", 2)
                        (count,) = opened.get_slice(key).get_shape()
                        found.setdefault((name, kind), []).append((int(start), count, file, key))
            except (SafetensorError, OSError, ValueError) as error:
                raise UserError(f"{folder / file}: not a checkpoint's part ({error})") from error
        self._found = {key: sorted(pieces) for key, pieces in found.items()}
        self.shapes = {name: tuple(shape) for name, shape in manifest["tensors"].items()}
        for name, shape in self.shapes.items():
            for kind in KINDS:
                end = 0
                for start, count, file, _ in self._found.get((name, kind), []):
                    if start != end:
                        raise UserError(f"{folder / file}: {name}'s {kind} starts at {start}, and {end} was to follow")
                    end += count
                if end != torch.Size(shape).numel():
                    raise UserError(f"{folder}: holds {end} of {torch.Size(shape).numel()} elements of {name}'s {kind}")

    def _read(self, opened: Mapping[str, Any], name: str, kind: str, start: int, count: int) -> Tensor:
        """Elements ``start`` to ``start + count`` of a parameter's ``kind``, (count,) float32 on the CPU."""
        whole = torch.empty(count)
        for begin, length, file, key in self._found[name, kind]:
            low, high = max(start, begin), min(start + count, begin + length)
            if low < high:
                whole[low - start : high - start] = opened[file].get_slice(key)[low - begin : high - begin]
        return whole

    def fill(self, shards: list[Shard]) -> list[Shard]:
        """The same runs of elements with the checkpoint's values.

        Raises:
            UserError: the checkpoint holds other parameters.
        """
        theirs, ours = self.shapes, {shard.name: shard.shape for shard in shards}
        if theirs != ours:
            name = min(n for n in theirs.keys() | ours.keys() if theirs.get(n) != ours.get(n))
            raise UserError(
                f"{self.folder}: {name} is {theirs.get(name, 'missing')} there and {ours.get(name, 'missing')} in this "
                "training; give another output_dir"
            )
        with ExitStack() as stack:
            files = {file for pieces in self._found.values() for *_, file, _ in pieces}
            opened = {f: stack.enter_context(safe_open(self.folder / f, framework="pt", device="cpu")) for f in files}
            read = [
                {key: self._read(opened, s.name, key, s.start, len(v)) for key, v in s.values.items()} for s in shards
            ]
        return [replace(shard, values=values) for shard, values in zip(shards, read, strict=True)]
