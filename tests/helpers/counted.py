"""What a stretch of a run sends and allocates, counted, to compare it with what a plan says."""

import contextlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import world
from nslora_dist.plan import traffic
from nslora_dist.recipe import Recipe

NAMES = {
    "allreduce_": "all_reduce",
    "all_reduce": "all_reduce",
    "reduce_": "reduce",
    "broadcast_": "broadcast",
    "_allgather_base_": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
}
Counts = dict[str, tuple[int, int]]


class Collectives(TorchDispatchMode):
    """Counts every collective where it enters the process group, whoever calls it: payload bytes and calls by kind.

    Python objects sent as tensors (``broadcast_object_list``, ``all_gather_object``), barriers and DeepSpeed's int64
    comparison of its traces go to ``others``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, list[int]] = {}
        self.others = 0
        self.objects = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, torch.distributed.tensor.DTensor) for kind in types):
            return NotImplemented  # its own dispatch first: the collectives inside are what counts
        namespace, _, name = str(func).partition(".")
        if namespace in ("c10d", "_c10d_functional"):
            self._count(name.partition(".")[0], list(_tensors(args)))
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, tensors: list[torch.Tensor]) -> None:
        if name in ("wait_tensor", "_wrap_tensor_autograd"):
            return
        if self.objects or name not in NAMES or tensors[0].dtype in (torch.int64, torch.int32):  # objects' sizes, flags
            self.others += 1
            return
        size = max(t.numel() * t.element_size() for t in tensors)
        if name == "all_gather_into_tensor":  # the functional form is given the rank's part alone
            size *= torch.distributed.get_world_size()
        entry = self.counts.setdefault(NAMES[name], [0, 0])
        entry[0] += 1
        entry[1] += size

    def take(self) -> Counts:
        """What was counted since the last call."""
        taken = {name: (calls, size) for name, (calls, size) in self.counts.items()}
        self.counts.clear()
        return taken


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


@contextlib.contextmanager
def counting() -> Iterator[Collectives]:
    counter = Collectives()
    functions = {name: getattr(torch.distributed, name) for name in ("broadcast_object_list", "all_gather_object")}

    def marked(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            counter.objects += 1
            try:
                return function(*args, **kwargs)
            finally:
                counter.objects -= 1

        return call

    try:
        for name, function in functions.items():
            setattr(torch.distributed, name, marked(function))
        with counter:
            yield counter
    finally:
        for name, function in functions.items():
            setattr(torch.distributed, name, function)


def as_counts(planned: list[traffic.Traffic]) -> Counts:
    return {one.collective: (int(one.calls), int(one.bytes)) for one in traffic.total(planned)}


def less(counts: Counts, other: Counts) -> Counts:
    pairs = {k: (counts[k][0] - other.get(k, (0, 0))[0], counts[k][1] - other.get(k, (0, 0))[1]) for k in counts}
    return {name: pair for name, pair in pairs.items() if pair != (0, 0)}


class Allocations:
    """Bytes that PyTorch's CPU allocator gave out while open and has not got back, at the end and at the highest.

    Mapped checkpoint files, which it reports too (each as the whole file's size), are left out.
    """

    def __init__(self, mapped: int) -> None:
        self.mapped = mapped
        activities = [torch.profiler.ProfilerActivity.CPU]
        self.profile = torch.profiler.profile(activities=activities, profile_memory=True)

    def __enter__(self) -> "Allocations":
        self.profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.profile.__exit__(*error)
        results: Any = self.profile.profiler.kineto_results.events()  # type: ignore[union-attr]
        found = [
            (e.start_ns(), e.nbytes()) for e in results if e.name() == "[memory]" and abs(e.nbytes()) != self.mapped
        ]
        self.live = self.peak = 0
        for _, size in sorted(found, key=lambda event: event[0]):
            self.live += size
            self.peak = max(self.peak, self.live)


def wide_toy(folder: Path, changes: dict[str, Any], engine: dict[str, Any]) -> Recipe:
    """Wide enough that matrices, and not small change, take the room; rows all of one length unless ``padded``."""
    padded = changes.get("data", {}).pop("padded", False)
    dice = random.Random(0)
    world.write_rows(folder / "long.jsonl", [{"text": world.words(dice, 90, 90)} for _ in range(40)])
    task = [
        {"prompt": world.words(dice, 20 if padded else 40, 40), "response": world.words(dice, 22, 22)}
        for _ in range(64)
    ]
    world.write_rows(folder / "task.jsonl", task)
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    base = world.make_base(folder / "base", **sizes)
    text = {"path": str(folder / "long.jsonl")}
    fixed = {
        "calibration": {
            "sources": {"a": text, "b": text},
            "probes": {"p": text},
            "samples": 16,
            "sequence_length": 64,
            "batch_size": 4,
        },
        "data": {"path": str(folder / "task.jsonl"), "max_length": 64},
        "train": {"micro_batch_size": 4, "global_batch_size": 8},
        "engine": engine,
    }
    return world.make_recipe(folder, base, folder / "out", **world.merge(fixed, changes))


def within(planned: float, measured: float, share: float) -> bool:
    print(f"planned {planned:,.0f}, measured {measured:,.0f}: {planned / measured - 1:+.1%}")
    return abs(planned - measured) <= share * measured
