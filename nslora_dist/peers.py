"""Signs of life between ranks, and the one verdict they end with.

Every rank writes a sign of life into the store that the ranks met in, and reads the others'. No collective can do that:
a rank that waits in one for a rank that is gone may wait for ever. Whoever finds out first writes the verdict, once.
"""

import json
import os
import sys
import threading
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from types import FrameType

import torch.distributed as dist

from nslora_dist import watch

BEAT_SECONDS = 1.0
ANSWER_SECONDS = 3.0
"""How long one question to the store may take before it counts as unanswered."""
NONE_YET = "-"
WAITS_IN = ("torch/distributed/", "deepspeed/comm/", "deepspeed/runtime/zero/partition")


@dataclass(frozen=True)
class Verdict:
    """Why the ranks end, as the first of them found it."""

    status: int
    message: str
    rank: int
    at_once: bool = True


@dataclass(frozen=True)
class Sign:
    """What a rank last said of itself; ``still`` is how long it has begun no unit of work."""

    beat: int
    count: int
    still: float
    waiting: bool
    node: str


def waits_in_collective(frame: FrameType | None) -> bool:
    """Whether a thread's stack stands in a collective, as far as Python shows it."""
    while frame is not None:
        if any(part in frame.f_code.co_filename for part in WAITS_IN):
            return True
        frame = frame.f_back
    return False


def this_node() -> str:
    """The launcher's number of this machine, else its name."""
    return os.environ.get("GROUP_RANK") or os.environ.get("CROSS_RANK") or os.uname().nodename


def named(ranks: list[int]) -> str:
    """``rank 3`` or ``ranks 3, 4 and 5``."""
    text = [str(rank) for rank in ranks]
    return f"rank {text[0]}" if len(text) == 1 else f"ranks {', '.join(text[:-1])} and {text[-1]}"


class Peers:
    """This rank's and the others' signs of life, exchanged by a thread that may hang in the store without harm."""

    def __init__(self, store: dist.PrefixStore, *, rank: int, world_size: int, keeper: int | None) -> None:
        """Announces this rank; ``start`` is for when all have.

        Args:
            store: to be cloned for two connections of its own, under a prefix that is this run's alone.
            rank: this rank.
            world_size: the number of ranks.
            keeper: the rank whose process keeps the store; None where a launcher does.
        """
        self.rank, self.world_size, self.keeper = rank, world_size, keeper
        self.verdict: Verdict | None = None
        self.verdict_since = 0.0
        self.broken = False
        self.waited = False  # set where a collective has failed: this rank is none that others wait for
        self.answered = time.monotonic()
        self.signs: dict[int, tuple[Sign, float]] = {}
        self._beats, self._claims = store.clone(), store.clone()  # type: ignore[attr-defined]
        for connection in (self._beats, self._claims):
            connection.set_timeout(timedelta(seconds=ANSWER_SECONDS))
        self._beat, self._count, self._moved = 0, -1, time.monotonic()
        self._stop = threading.Event()
        self._claiming = threading.Lock()
        self._main = threading.main_thread().ident
        self._say()
        if rank == 0:
            self._beats.set("verdict", NONE_YET)

    def start(self) -> None:
        """Begins to exchange signs of life."""
        threading.Thread(target=self._run, name="signs of life", daemon=True).start()

    def stop(self) -> None:
        """Ends that."""
        self._stop.set()

    @property
    def still(self) -> float:
        """Seconds since this rank last began a unit of work."""
        count = watch.current().count
        if count != self._count:
            self._count, self._moved = count, time.monotonic()
        return time.monotonic() - self._moved

    def _say(self) -> None:
        self._beat += 1
        still = self.still
        frame = sys._current_frames().get(self._main or 0)
        waiting = self.waited or (still > BEAT_SECONDS and (watch.is_waiting() or waits_in_collective(frame)))
        mine = Sign(self._beat, self._count, still, waiting, this_node())
        self._beats.set(f"alive/{self.rank}", json.dumps(asdict(mine)))

    def _run(self) -> None:
        keys = [f"alive/{rank}" for rank in range(self.world_size)]
        pause = max(BEAT_SECONDS, self.world_size / 64)
        while not self._stop.wait(pause if self.signs else 0.0):
            try:
                self._say()
                *said, verdict = self._beats.multi_get([*keys, "verdict"])
            except dist.DistNetworkError:
                if not self._stop.is_set():
                    self.broken = True
                return
            except RuntimeError:  # no answer in time: ``unanswered`` grows
                continue
            now = self.answered = time.monotonic()
            for rank, text in enumerate(said):
                sign = Sign(**json.loads(text))
                if rank not in self.signs or self.signs[rank][0].beat != sign.beat:
                    self.signs[rank] = (sign, now)
            self._found(verdict)

    def _found(self, text: bytes) -> None:
        if self.verdict is None and text.decode() != NONE_YET:
            self.verdict, self.verdict_since = Verdict(**json.loads(text)), time.monotonic()

    def ask(self) -> Verdict | None:
        """The verdict, if there is one; asks the store."""
        if self.verdict is None:
            self._briefly(lambda: self._found(self._claims.get("verdict")))
        return self.verdict

    def claim(self, verdict: Verdict) -> bool | None:
        """Makes ``verdict`` the ranks' own: whether it is, or None where the store does not answer.

        ``self.verdict`` is the one that holds afterwards, where the store answers.
        """

        def write() -> None:
            self._found(self._claims.compare_set("verdict", NONE_YET, json.dumps(asdict(verdict))))

        if self.verdict is None:
            self._briefly(write)
        return None if self.verdict is None else self.verdict == verdict

    def leave(self) -> None:
        """Tells the rank that keeps the store that this one needs it no more."""
        if self.rank != self.keeper:
            self._briefly(lambda: self._claims.add("left", 1))

    def linger(self, seconds: float) -> None:
        """Keeps the store up until the other living ranks have read the verdict."""
        if self.rank != self.keeper:
            return
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self.broken:
            living = self.world_size - 1 - len(self.silent(3 * BEAT_SECONDS + 1))
            left: list[int] = []
            self._briefly(lambda left=left: left.append(self._claims.add("left", 0)))
            if left and left[0] >= living:
                return
            time.sleep(0.05)

    def _briefly(self, question: object) -> None:
        """Runs a question to the store in a thread of its own, for a store that was stopped never answers."""
        assert callable(question)
        if self.broken or not self._claiming.acquire(timeout=ANSWER_SECONDS):
            return

        def ask() -> None:
            try:
                question()
            except RuntimeError:
                pass  # the store is gone, or answers too late
            finally:
                self._claiming.release()

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(ANSWER_SECONDS)

    def unanswered(self) -> float:
        """Seconds since the store last answered."""
        return time.monotonic() - self.answered

    def silent(self, seconds: float) -> list[int]:
        """The ranks that have given no sign of life for that long."""
        # Counted up to the last answer: while the store is silent nothing is known of the others.
        return [
            rank
            for rank, (_, since) in sorted(self.signs.items())
            if rank != self.rank and self.answered - since > seconds
        ]

    def lost(self, seconds: float) -> str | None:
        """Says which ranks are gone, having been silent for that long; None if none is."""
        keeper = "the launcher of the first machine" if self.keeper is None else named([self.keeper])
        if self.broken:
            return f"{keeper} is gone (it kept the ranks' meeting place, and the connection to it broke)"
        if self.unanswered() > seconds:
            where = "which keeps the ranks' meeting place, "
            return f"{keeper}, {where}does not answer (no sign of life for {self.unanswered():.0f} s)"
        silent = self.silent(seconds)
        if silent:
            longest = max(self.answered - self.signs[rank][1] for rank in silent)
            are = "is" if len(silent) == 1 else "are"
            return f"{named(silent)} {are} gone, stopped or cut off (no sign of life for {longest:.0f} s)"
        return None

    def nobody_goes_on(self, seconds: float) -> bool:
        """Whether no rank has begun a unit of work for that long: one that waits for another at work is not stalled."""
        now = time.monotonic()
        others = [sign.still + now - since for rank, (sign, since) in list(self.signs.items()) if rank != self.rank]
        return self.still > seconds and all(still > seconds for still in others)

    def stalled(self) -> str:
        """Says which ranks, all of them alive, the others wait for."""
        signs = {rank: sign for rank, (sign, _) in sorted(self.signs.items())}
        at_work = [rank for rank, sign in signs.items() if not sign.waiting]
        least = min((sign.count for sign in signs.values()), default=0)
        behind = [rank for rank, sign in signs.items() if sign.count == least]
        for found in (at_work, behind):
            if 0 < len(found) < len(signs):
                seconds = min(signs[rank].still for rank in found)
                do = "does" if len(found) == 1 else "do"
                return f"{named(found)} {do} not go on (alive, but nothing done for {seconds:.0f} s)"
        return "no rank goes on, though all are alive"

    def first_survivor(self) -> bool:
        """Whether this is the lowest rank that is neither the store's keeper nor on its machine."""
        gone = self.signs[self.keeper][0].node if self.keeper in self.signs else None
        one_machine = len({sign.node for sign, _ in self.signs.values()}) == 1
        left = [r for r, (sign, _) in self.signs.items() if r != self.keeper and (one_machine or sign.node != gone)]
        return self.rank == min(left, default=self.rank)
