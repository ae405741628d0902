"""The thread that sees to it that a rank ends: when asked to, when another rank is gone, when nothing goes on.

It never waits for anything, so that it still acts while the main thread hangs in a collective.
"""

import logging
import os
import select
import signal
import sys
import threading
import time
from contextlib import suppress
from types import FrameType
from typing import Any

from nslora_dist import logs, watch
from nslora_dist.errors import (
    BY_STATUS,
    EXIT_PREEMPTED,
    EXIT_RANK_LOST,
    Preempted,
    RankLost,
    UserError,
)
from nslora_dist.peers import Peers, Verdict
from nslora_dist.reasons import described, is_loss, lost_message

log = logging.getLogger("nslora_dist")

POLL_SECONDS = 0.25
HEARTBEAT_SECONDS = 25.0
LOST_AFTER = 60.0
"""Seconds without a sign of life after which a rank counts as gone, while nothing else speaks for it."""
QUICK = 6.0
"""The same once something else does: a collective failed here, or a launcher sent SIGTERM, as it does to survivors."""
AGAIN_SECONDS = 2.0
"""A second signal sooner than this is the first one on another way: terminal and launcher both pass it on."""
LEAVE_SECONDS = 3.0
"""How long a rank may take to end by itself after another has given the verdict."""
FIRST_SECONDS = 1.5
"""How long rank 0 is given to say what all ranks may have to say."""
SETTLE_SECONDS = 60.0
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def launchers() -> list[tuple[int, int]]:
    """Processes that started this rank, and their parents at this moment: (process whose parent it is, parent)."""
    mine = os.getppid()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return [(os.getpid(), mine)]
    if "CROSS_SIZE" in os.environ:  # deepspeed: what the person started, its launch.py, this rank
        above = _parent(mine)
        return [(os.getpid(), mine)] + ([(mine, above)] if above is not None else [])
    return []  # started by hand, perhaps by a shell that is meant to go


def _parent(process: int) -> int | None:
    if process == os.getpid():
        return os.getppid()
    try:
        with open(f"/proc/{process}/stat", encoding="utf-8", errors="replace") as file:
            return int(file.read().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return None


class Guard:
    """One rank's guard; ``peers`` is set once the ranks have met."""

    def __init__(
        self,
        *,
        timeout_seconds: float,
        grace_seconds: float,
        heartbeat_seconds: float = HEARTBEAT_SECONDS,
    ) -> None:
        """Starts watching.

        Args:
            timeout_seconds: without any progress of any rank, after which the ranks count as stalled.
            grace_seconds: after a signal until the process ends, boundary or not.
            heartbeat_seconds: between two lines of a long phase.
        """
        self.timeout, self.grace, self.heartbeat = timeout_seconds, grace_seconds, heartbeat_seconds
        self.lost_after = min(LOST_AFTER, timeout_seconds)
        # A collective's own time-out comes first where it raises: it knows best what it waited for.
        self.stalled_after = timeout_seconds + max(3.0, 0.02 * timeout_seconds)
        self.peers: Peers | None = None
        self._settling: float | None = None
        self._deciding = threading.RLock()
        self._agreed: Verdict | None = None
        self._asked: float | None = None
        self._told = time.monotonic()
        self._stop = threading.Event()
        self._launchers = launchers()
        self._before: dict[int, Any] = {}
        self._pipe = os.pipe()
        for end in self._pipe:
            os.set_blocking(end, False)
        self._fd_before = -1
        with suppress(ValueError):  # not in the main thread: signals are somebody else's
            # Python's own handlers wait until the main thread leaves its collective; the file descriptor does not.
            self._fd_before = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
            for number in SIGNALS:
                self._before[number] = signal.signal(number, _leave_it_to_the_guard)
        self._thread = threading.Thread(target=self._run, name="guard", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """All ranks are done: from now on they may go in any order."""
        self._stop.set()
        if self.peers is not None:
            self.peers.stop()

    def stop(self) -> None:
        """Stops watching and gives the signals back."""
        self._stop.set()
        if self.peers is not None:
            self.peers.stop()
        self._thread.join(5.0)
        with suppress(ValueError):
            if self._before:
                signal.set_wakeup_fd(self._fd_before)
            for number, handler in self._before.items():
                signal.signal(number, handler)
        for end in self._pipe:
            os.close(end)

    # In the guard's thread.

    def _run(self) -> None:
        while not self._stop.is_set():
            ready, _, _ = select.select([self._pipe[0]], [], [], POLL_SECONDS)
            if ready:
                for number in os.read(self._pipe[0], 64):
                    self._signalled(number)
            if self._stop.is_set():
                return
            try:
                self._look()
            except Exception:  # a guard that died silently would be worse than one that complains
                log.exception("the guard thread failed; it goes on")

    def _signalled(self, number: int) -> None:
        if number not in SIGNALS:
            return
        name, now = signal.Signals(number).name, time.monotonic()
        if self._asked is None:
            self._asked = now
            watch.ask_stop(name)
            again = "; Ctrl-C again ends it at once" if number == signal.SIGINT else ""
            said = "%s: stopping at the next boundary, within %.0f s%s"
            log.info(said, name, self.grace, again)
        elif now - self._asked > AGAIN_SECONDS and self._settling is None:
            self._end(Verdict(EXIT_PREEMPTED, self._stopped(f"{name} again: ended at once"), self._rank))

    def _look(self) -> None:
        now, peers = time.monotonic(), self.peers
        if self._settling is not None:
            if now - self._settling > SETTLE_SECONDS:
                self._leave(EXIT_RANK_LOST)
            return
        if peers is not None and peers.verdict is not None:
            if peers.verdict.at_once and now - peers.verdict_since > LEAVE_SECONDS:
                _note(peers.verdict, mine=False)
                self._leave(peers.verdict.status)
            return
        for process, parent in self._launchers:
            if _parent(process) != parent:
                self._lost("the launcher is gone")
        if peers is not None:
            # A launcher sends SIGTERM to the ranks that survive another's death, too.
            found = peers.lost(min(QUICK, self.lost_after) if self._asked is not None else self.lost_after)
            if found is None and peers.nobody_goes_on(self.stalled_after):
                found = peers.stalled()
            if found is not None:
                self._lost(found)
        if self._asked is not None and now - self._asked > self.grace:
            said = self._stopped(f"{watch.why_stop()}: no boundary came within {self.grace:.0f} s")
            self._end(Verdict(EXIT_PREEMPTED, said, self._rank))
        place = watch.current()
        if now - self._told >= self.heartbeat and place.seconds >= self.heartbeat:
            self._told = now
            log.info("alive: %s, %.0f s in this phase", place, place.seconds)

    @property
    def _rank(self) -> int:
        return 0 if self.peers is None else self.peers.rank

    def _stopped(self, why: str) -> str:
        return f"{watch.current()}: {why}; the same command continues from {watch.continues_from()}"

    def _lost(self, found: str) -> None:
        self._end(Verdict(EXIT_RANK_LOST, lost_message(found), self._rank))

    def _end(self, verdict: Verdict) -> None:
        """Ends this process with ``verdict``, or with the one that another rank has given before."""
        with self._deciding:  # the main thread may come to the same end, and must not leave before this is said
            verdict, mine = self._agree(verdict)
            if mine:
                logs.say(f"error: {verdict.message}")
            elif self._settling is not None:
                return
        self._leave(verdict.status)

    def _leave(self, status: int) -> None:
        peers = self.peers
        if peers is not None:
            peers.leave()
            peers.linger(LEAVE_SECONDS + 3.0)
            peers.stop()
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):
                stream.flush()
        os._exit(status)

    # In either thread.

    def _agree(self, verdict: Verdict) -> tuple[Verdict, bool]:
        """The verdict that holds, and whether this rank is the one that says it."""
        with self._deciding:
            if self._agreed is None:
                self._agreed, mine = self._claim(verdict)
                return self._agreed, mine
            return self._agreed, False

    def _claim(self, verdict: Verdict) -> tuple[Verdict, bool]:
        peers = self.peers
        if peers is None:
            _note(verdict, mine=True)
            return verdict, True
        mine = peers.claim(verdict)
        if mine is None:  # the store is gone
            claimed = logs.claim()
            mine = peers.first_survivor() if claimed is None else claimed
        else:
            assert peers.verdict is not None
            verdict = peers.verdict
            # For ranks that find the store gone, or had no answer in time and have spoken already.
            mine = mine and logs.claim() is not False
        _note(verdict, mine=mine)
        return verdict, mine

    # In the main thread.

    def settle(self, error: BaseException) -> UserError:
        """What this rank ends with after ``error``: its own verdict, or the one another rank has given before.

        Returns:
            The exception; ``silent`` where another rank says it.
        """
        peers = self.peers
        self._settling = time.monotonic()
        watch.back_to(error)
        if is_loss(error):
            log.info("a collective failed: %s", error, exc_info=error)
            found: UserError = RankLost(lost_message(self._find_loss(error)))
            first = True
        else:
            found, first = described(error), self._rank == 0
        if not first and peers is not None:  # where all ranks end alike, rank 0 says so
            deadline = time.monotonic() + FIRST_SECONDS
            while peers.ask() is None and not peers.broken and time.monotonic() < deadline:
                time.sleep(0.05)
        at_once = not isinstance(found, Preempted)
        verdict, mine = self._agree(Verdict(found.status, str(found), self._rank, at_once))
        if peers is None:
            return found
        ended = BY_STATUS.get(verdict.status, UserError)(verdict.message)
        ended.silent = not mine
        peers.leave()
        peers.linger(LEAVE_SECONDS + 3.0)
        return ended

    def _find_loss(self, error: BaseException) -> str:
        peers, first_line = self.peers, str(error).strip().partition("\n")[0]
        if peers is None:
            return f"the ranks' connection failed: {first_line}"
        peers.waited = True
        deadline = time.monotonic() + QUICK + 3.0
        while time.monotonic() < deadline:
            found = peers.lost(min(QUICK, self.lost_after))
            if found is not None:
                return found
            if peers.verdict is not None:
                return peers.verdict.message
            time.sleep(0.1)
        if "imed out" in str(error) or "imeout" in str(error):
            return peers.stalled()
        cause = str(error).rpartition("Last error:")[2] if "Last error:" in str(error) else ""  # NCCL's own words
        said = "; ".join(line.strip() for line in (first_line, *cause.splitlines()) if line.strip())
        return f"the connection to another rank failed, though all are alive: {said}"


def _note(verdict: Verdict, *, mine: bool) -> None:
    said = verdict.message if mine else f"said by another rank: {verdict.message}"
    level = logging.INFO if verdict.status == EXIT_PREEMPTED else logging.ERROR
    logs.note(f"{said} (exit status {verdict.status})", level=level)


def _leave_it_to_the_guard(number: int, frame: FrameType | None) -> None:
    """Python wants a handler of its own for the file descriptor to be written to."""
