"""How long a run's phases take, and how much memory each of them holds at most, for the report."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from nslora_dist import machine, watch


class Clock:
    """Names a run's phases and measures them.

    Attributes:
        seconds: phase → seconds, of this process.
        peaks: phase → bytes that this process held at most: on the GPU where there is one, else in host memory.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, int] = {}
        self._between = 0

    @contextmanager
    def phase(self, name: str, of: str = "") -> Iterator[None]:
        """One phase, as in ``training``; ``of`` says of which arm."""
        started = time.perf_counter()
        self._between = max(self._between, machine.peak_memory())
        machine.forget_peak()
        with watch.phase(f"{name} {of}".rstrip()):
            yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
        self.peaks[name] = max(self.peaks.get(name, 0), machine.peak_memory())

    @property
    def highest(self) -> int:
        """Bytes that this process held at most, in a phase or between two."""
        return max(self._between, machine.peak_memory(), *self.peaks.values())
