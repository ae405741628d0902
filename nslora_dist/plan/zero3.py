"""Which parameters DeepSpeed ZeRO-3 gathers, and when: its parameter coordinator, replayed on shapes.

``PartitionedParameterCoordinator`` fetches a module's parameters before its forward and backward, prefetches along the
trace of the last micro-batch, and keeps what will be used again soon. How often a weight travels follows from sizes and
knobs in a way that no closed formula gives, so the bookkeeping of deepspeed 0.19 is replayed here; what a rank holds
gathered at most falls out of the same replay. The number of ranks enters only through padding.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile

from nslora_dist.plan.shapes import Param, Shapes
from nslora_dist.plan.traffic import FLOAT32, Traffic, padded, total
from nslora_dist.plan.zero3_events import HEAD, Event, micro_batch_events

NEVER = -(10**10)


@dataclass(frozen=True)
class Knobs:
    """The ``zero_optimization`` section as far as it changes memory or traffic, in elements; DeepSpeed's defaults."""

    prefetch: int = 50_000_000
    persistence: int = 100_000
    max_live: int = 1_000_000_000
    max_reuse: int = 1_000_000_000
    bucket: int = 500_000_000
    offload_param: bool = False
    offload_optimizer: bool = False

    @classmethod
    def of(cls, settings: dict[str, object]) -> "Knobs":
        """From the contents of ``engine.config``."""
        section = settings.get("zero_optimization", {})
        assert isinstance(section, dict)

        def number(key: str, default: int) -> int:
            return int(section.get(key, default))

        def offloaded(key: str) -> bool:
            return (section.get(key) or {}).get("device", "none") not in (None, "none")

        return cls(
            prefetch=number("stage3_prefetch_bucket_size", cls.prefetch),
            persistence=number("stage3_param_persistence_threshold", cls.persistence),
            max_live=number("stage3_max_live_parameters", cls.max_live),
            max_reuse=number("stage3_max_reuse_distance", cls.max_reuse),
            bucket=number("reduce_bucket_size", cls.bucket),
            offload_param=offloaded("offload_param"),
            offload_optimizer=offloaded("offload_optimizer"),
        )


@dataclass(frozen=True)
class Steady:
    """One optimizer step's gathers once the trace is known, as lists of coalesced calls.

    Attributes:
        first: of the first micro-batch after an optimizer step.
        later: of every further micro-batch of that step.
        after_step: persistent parameters, gathered again one by one after every step.
        forward: of a batch without a backward pass, after another one.
        hidden: the same where the head is not asked for logits.
        live: bytes gathered at most at any time, persistent parameters included.
    """

    first: tuple[tuple[Param, ...], ...]
    later: tuple[tuple[Param, ...], ...]
    after_step: tuple[tuple[Param, ...], ...]
    forward: tuple[tuple[Param, ...], ...]
    hidden: tuple[tuple[Param, ...], ...]
    live: int

    def traffic(self, which: str, world_size: int) -> list[Traffic]:
        """The calls of that name as all-gathers of element-padded parameters."""
        if world_size == 1:
            return []
        calls = getattr(self, which)
        size = sum(padded(p.numel, world_size) * p.itemsize for call in calls for p in call)
        return [Traffic("all_gather", len(calls), size)]


class _Replay:
    """The coordinator's state; names follow ``PartitionedParameterCoordinator``."""

    def __init__(self, own: dict[str, tuple[Param, ...]], events: list[Event], knobs: Knobs) -> None:
        self.own, self.events, self.knobs = own, events, knobs
        self.ids = {p: i for i, p in enumerate(dict.fromkeys(p for params in own.values() for p in params))}
        self.status: dict[Param, int] = dict.fromkeys(self.ids, 0)  # 0 partitioned, 1 in flight, 2 available
        self.active: dict[Param, set[str]] = {p: set() for p in self.ids}
        self.persistent = {p for p in self.ids if p.numel <= knobs.persistence}
        self.modules = [event.module for event in events if event.fetch]
        self.trace = [(p, step) for step, name in enumerate(self.modules) for p in sorted(own[name], key=self.ids.get)]  # type: ignore[arg-type]
        self.cache: dict[tuple[str, int], frozenset[Param]] = {}
        self.complete = False
        self.live = self.peak = 0
        self.calls: list[tuple[Param, ...]] = []

    def micro_batch(self) -> tuple[tuple[Param, ...], ...]:
        """One micro-batch: ``reset_step``, all events, ``release_backward_leftovers``."""
        self._begin()
        for event in self.events:
            self._do(event)
        for name in reversed(self.backward):
            for param in {*self.own[name], *self.recomputed.pop(name, ())}:
                self.active[param].discard(name)
                if param not in self.persistent:
                    self._release(param)
        self.complete = True
        return tuple(self.calls)

    def evaluated(self, *, with_head: bool) -> tuple[tuple[Param, ...], ...]:
        """A batch without a backward pass, and ``empty_partition_cache``: nothing stays gathered, persistent or not."""
        self._begin()
        for event in takewhile(lambda event: event.forward, self.events):
            if with_head or event.module != HEAD:
                self._do(event)
        for param in self.status:
            self.active[param].clear()
            self.status[param] = 0
        self.live = 0
        return tuple(self.calls)

    def _begin(self) -> None:
        self.calls = []
        for param, state in self.status.items():
            if state == 1:
                self.status[param] = 2
                self._release(param)
        self.queue = deque(self.trace)
        self.recent: dict[Param, int] = {}
        self.step_id = self.available = 0
        self.backward: dict[str, None] = {}
        self.recomputed: dict[str, set[Param]] = {}

    def _do(self, event: Event) -> None:
        if event.fetch:
            self._fetch(event)
        else:
            self._leave(event)

    def optimizer_step(self) -> tuple[tuple[Param, ...], ...]:
        """``release_and_reset_all``, then ``_post_step`` gathers the persistent parameters one by one."""
        for param in self.status:
            self.active[param].clear()
            self.status[param] = 0
        self.live = 0
        for param in self.persistent:
            self._gather((param,), counted=False)
            self.status[param] = 2
        return tuple((param,) for param in self.persistent)

    def _gather(self, params: Iterable[Param], *, counted: bool = True) -> None:
        wanted = tuple(p for p in params if self.status[p] == 0)
        if not wanted:
            return
        for param in wanted:
            self.status[param] = 1
            self.live += param.bytes
        if counted:
            self.available += sum(p.numel for p in wanted)
            self.calls.append(wanted)
        self.peak = max(self.peak, self.live)

    def _release(self, param: Param) -> None:
        if self.status[param] == 2 and not self.active[param]:
            self.status[param] = 0
            self.available -= param.numel
            self.live -= param.bytes

    def _fetch(self, event: Event) -> None:
        if not event.forward:
            self.backward.setdefault(event.module)
        params = self.own[event.module]
        self._gather(params)
        for param in params:
            self.active[param].add(event.module)
            if event.recompute and self.backward and not param.trained:
                owner = next(reversed(self.backward))
                self.recomputed.setdefault(owner, set()).add(param)
                self.active[param].add(owner)
            self.status[param] = 2
        if self.complete:
            self._prefetch(params)
        self.step_id += 1

    def _prefetch(self, params: tuple[Param, ...]) -> None:
        fresh = {p for p in params if self.recent.get(p, NEVER) < self.step_id}
        dropped: set[Param] = set()
        while self.queue and len(dropped) < len(fresh):
            param, step = self.queue.popleft()
            self.recent[param] = step
            dropped.add(param)
        assert dropped == fresh, "the trace and the events differ"
        room = min(self.knobs.max_live - self.available, self.knobs.prefetch)
        chosen: dict[Param, None] = {}
        size = 0
        while self.knobs.prefetch > 0 and self.queue and size < room:
            param, step = self.queue.popleft()
            self.recent[param] = max(self.recent.get(param, NEVER), step)
            if self.status[param] == 0 and param not in chosen:
                chosen[param] = None
                size += param.numel
        self._gather(chosen)

    def _leave(self, event: Event) -> None:
        name = event.module
        released = set(self._to_release(name)) if self.complete else set(self.own[name])
        params = set(self.own[name])
        if not event.forward:
            again = self.recomputed.pop(name, set())
            released |= again - self.persistent
            params |= again
            self.backward.pop(name, None)
        for param in params:
            self.active[param].discard(name)
            if param in released:
                self._release(param)

    def _to_release(self, name: str) -> frozenset[Param]:
        key = name, self.step_id
        if key not in self.cache:  # DeepSpeed caches it, with the prefetch state of the first time
            found = {
                p for p in self.own[name] if p not in self.persistent and self.recent.get(p, NEVER) <= self.step_id
            }
            passed = 0
            for module in self.modules[self.step_id :]:
                if passed >= self.knobs.max_reuse or not found:
                    break
                found.difference_update(self.own[module])
                passed += sum(p.numel for p in self.own[module])
            self.cache[key] = frozenset(found)
        return self.cache[key]


@lru_cache(maxsize=32)
def steady(shapes: Shapes, knobs: Knobs, *, checkpointing: bool) -> Steady:
    """Replays micro-batches and steps until the trace is known, and returns a step's gathers."""
    events = micro_batch_events(shapes, checkpointing=checkpointing)
    own: dict[str, tuple[Param, ...]] = {event.module: () for event in events}
    for unit in shapes.units:
        for param in unit.params:
            path = f"model.{param.name.rsplit('.', 1)[0]}"
            own[path] = (*own[path], param)
    if shapes.tied:
        own[HEAD] = own["model.model.embed_tokens"]
    replay = _Replay(own, events, knobs)
    replay.micro_batch()  # records
    replay.micro_batch()
    replay.optimizer_step()
    replay.peak = 0
    first = replay.micro_batch()
    later = replay.micro_batch()
    after, live = replay.optimizer_step(), replay.peak
    replay.evaluated(with_head=True)
    forward, hidden = (replay.evaluated(with_head=with_head) for with_head in (True, False))
    return Steady(first, later, after, forward, hidden, live)


def start(shapes: Shapes, world_size: int) -> list[Traffic]:
    """Setting up: DeepSpeed gathers every trained parameter once, as stored, beside what loading sends."""
    if world_size == 1:
        return []
    sizes = [padded(p.numel, world_size) * p.itemsize for p in shapes.trained]
    return [Traffic("all_gather", len(sizes), sum(sizes))]


def reduce_scatter(shapes: Shapes, knobs: Knobs, world_size: int) -> list[Traffic]:
    """Gradients of one micro-batch, in float32 (``communication_data_type``), in buckets of ``reduce_bucket_size``."""
    if world_size == 1:
        return []
    calls, filled = 0, 0
    for param in reversed(shapes.trained):
        if filled and filled + param.numel > knobs.bucket:
            calls, filled = calls + 1, 0
        filled += param.numel
    size = sum(padded(p.numel, world_size) for p in shapes.trained) * FLOAT32
    return [Traffic("reduce_scatter", calls + bool(filled), size)]


def step(shapes: Shapes, knobs: Knobs, world_size: int, *, accumulation: int, checkpointing: bool) -> list[Traffic]:
    """All of an optimizer step's parameter and gradient traffic."""
    found = steady(shapes, knobs, checkpointing=checkpointing)
    traffic = found.traffic("first", world_size) + found.traffic("after_step", world_size)
    for _ in range(accumulation - 1):
        traffic += found.traffic("later", world_size)
    return total(traffic + accumulation * reduce_scatter(shapes, knobs, world_size))
