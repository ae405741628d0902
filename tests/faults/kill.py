"""SIGKILL of a rank or the launcher at some moment, what the others do about it, and what the same command does next.

A ``Case`` is made from a seed, so that a failing one can be tried again. Its moment is drawn from the time that
an uninterrupted run of the same engine spent in the case's phase, or is a file operation of that phase.
"""

import hashlib
import json
import os
import random
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from faults.jobs import Job, Who, Zygote
from helpers.launching import ROOT
from nslora_dist.errors import EXIT_RANK_LOST

FULL = os.environ.get("NSLORA_FAULTS") == "full"
outcomes: list["Outcome"] = []
"""What this session has tried, for the figures."""

PHASES = {
    "texts": r"^data",
    "calibration block": r"^calibration(?!.*solv)",
    "solve": r"^calibration.*solv",
    "loading": r"^load",
    "evaluation": r"^evaluation",
    "training step": r"^training",
    "checkpoint": r"^training",
    "export": r"^export",
    "report": r"^report",
}
"""Phase of a case → what a rank's place looks like there."""

FILES = {
    "calibration block": "calibration/",
    "solve": ".null_space.partial",
    "checkpoint": "checkpoints/",
    "export": "adapter",
    "report": "report.",
}
"""Phase → part of the paths that are written in it."""


@dataclass(frozen=True)
class Case:
    """One kill, or several in a row, and what has to come of it.

    Attributes:
        engine: of the run.
        phase: in which the first kill strikes; any later one strikes the resumed run wherever it is.
        victim: the launcher or a rank.
        seed: of the moments.
        at_file: whether the moment is right before a file operation, and not a time.
        kills: how many times; the run after the last is left alone.
        world_size: the number of ranks.
    """

    engine: str
    phase: str
    victim: Who
    seed: int
    at_file: bool = False
    kills: int = 1
    world_size: int = 2

    @property
    def name(self) -> str:
        """For pytest and the figures."""
        words = [self.engine, str(self.world_size), self.phase.replace(" ", "_")]
        words += ["file"] if self.at_file else []
        words += ["launcher" if self.victim == "launcher" else f"rank{self.victim}"]
        return "-".join([*words, *([f"x{self.kills}"] if self.kills > 1 else []), str(self.seed)])


@dataclass
class Kill:
    """One kill that struck.

    Attributes:
        place: what the rank was doing; rank 0 for the launcher.
        seconds: until everything else had ended.
        statuses: of all ranks, the victim's too.
        said: the lines for the person, of all that survived.
    """

    victim: Who
    place: str
    seconds: float
    statuses: list[int]
    said: list[str]


@dataclass
class Outcome:
    """A case's kills and how the undisturbed run after them compares with one that was never disturbed."""

    case: Case
    kills: list[Kill] = field(default_factory=list)
    different: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """For the file of figures; of paths only what is inside the run's folder."""
        found = asdict(self)
        for kill in found["kills"]:
            kill["said"] = [re.sub(r"/\S*/run\b", "output_dir", line) for line in kill["said"]]
        return found


@dataclass(frozen=True)
class Reference:
    """An uninterrupted run: what it left, and when which rank was where."""

    result: dict[str, Any]
    places: list[list[dict[str, Any]]]
    seconds: float


class Range:
    """Starts toy runs and kills them; one for a test session."""

    def __init__(self, zygote: Zygote, folder: Path, command: Callable[..., list[str]]) -> None:
        """``command`` gives the arguments of a run from its engine, folder and number of ranks."""
        self.zygote, self.folder, self.command = zygote, folder, command
        self._references: dict[tuple[str, int], Reference] = {}

    def start(
        self,
        engine: str,
        name: str,
        *,
        world_size: int = 2,
        output: Path | None = None,
        overrides: Sequence[str] = (),
        **more: Any,
    ) -> tuple[Job, Path]:
        """A run, and its folder; the same name, or ``output``, continues."""
        output = output or self.folder / name / "run"
        arguments = [*self.command(engine, output, world_size), *overrides]
        return self.zygote.job(self.folder / name, *arguments, output=output, world_size=world_size, **more), output

    def reference(self, engine: str, world_size: int = 2) -> Reference:
        """The uninterrupted run, made once."""
        key = engine, world_size
        if key not in self._references:
            started = time.monotonic()
            job, output = self.start(engine, f"{engine}-{world_size}-reference", world_size=world_size)
            finished(job.wait())
            places = [job.places(rank) for rank in range(world_size)]
            self._references[key] = Reference(results(output), places, time.monotonic() - started)
        return self._references[key]

    def run(self, case: Case) -> Outcome:
        """Kills as the case says, starts the same command after each kill, and compares what the last one left."""
        reference = self.reference(case.engine, case.world_size)
        dice = random.Random(case.name)
        outcome = Outcome(case)
        for number in range(case.kills):
            if number == 0:
                found, output = self._first(case, reference, dice)
            else:
                job, output = self.start(case.engine, case.name, world_size=case.world_size)
                victim = dice.choice(["launcher", *range(case.world_size)])
                found = self._later(job, victim, reference.seconds * dice.uniform(0.05, 0.4))
            if found is not None:
                outcome.kills.append(found)
        job, output = self.start(case.engine, case.name, world_size=case.world_size)
        finished(job.wait())
        outcome.different = compare(results(output), reference.result)
        return outcome

    def _first(self, case: Case, reference: Reference, dice: random.Random) -> tuple[Kill | None, Path]:
        watched = 0 if case.victim == "launcher" else case.victim
        places = reference.places[watched]
        victim = "launcher" if case.victim == "launcher" else "self"
        if case.at_file:
            match = FILES[case.phase]
            count = sum(match in p.get("path", "") for p in places)
            if not count:
                raise AssertionError(f"{case.name}: rank {watched} touches no file '{match}'")
            strike = {"rank": watched, "match": match, "nth": dice.randint(1, count), "victim": victim}
            job, output = self.start(case.engine, case.name, world_size=case.world_size, strike=strike)
            return self._struck(job, case.victim, watched), output
        nth, delay = draw(places, PHASES[case.phase], dice)
        strike = {"rank": watched, "pattern": PHASES[case.phase], "nth": nth, "delay": delay, "victim": victim}
        job, output = self.start(case.engine, case.name, world_size=case.world_size, strike=strike)
        return self._struck(job, case.victim, watched), output

    def _later(self, job: Job, victim: Who, delay: float) -> Kill | None:
        """Kills the run that continues an earlier one, once its ranks have met."""
        self.zygote.until(lambda: job.over() or entered(job.places(0), r"^(?!starting)", 1), f"{job.name}: no phase")
        return self._kill(job, victim, delay)

    def _kill(self, job: Job, victim: Who, delay: float) -> Kill | None:
        until = time.monotonic() + delay
        while (left := until - time.monotonic()) > 0 and not job.over():
            self.zygote.pump(min(left, 0.05))
        at = time.monotonic()
        if not job.kill(victim):  # it was done already
            job.wait()
            return None
        job.wait()
        before = [p for p in job.places(0 if victim == "launcher" else victim) if p["time"] <= at]
        return judge(job, victim, before[-1]["place"] if before else "", at)

    def _struck(self, job: Job, victim: Who, watched: int) -> Kill | None:
        job.wait()
        found = [p for p in job.places(watched) if "struck" in p]
        return judge(job, victim, found[-1]["place"], found[-1]["time"]) if found else None


def judge(job: Job, victim: Who, place: str, at: float) -> Kill:
    """What the others did about a kill."""
    ranks = [job.ended[rank] for rank in range(job.world_size)]
    said = [line for rank in range(job.world_size) if rank != victim for line in job.error_lines(rank)]
    statuses = [job.statuses[rank] for rank in range(job.world_size)]
    return Kill(victim, place, max(ranks) - at, statuses, said)


def keep(outcome: Outcome) -> None:
    """Adds to the session's figures, and to a file at once, where a long session can be followed."""
    outcomes.append(outcome)
    if FULL:
        (ROOT / "build").mkdir(exist_ok=True)
        with (ROOT / "build" / "faults.jsonl").open("a") as file:
            file.write(json.dumps(outcome.as_json()) + "\n")


def check(outcome: Outcome) -> None:
    """Asserts what the README promises of every kill."""
    assert outcome.kills, f"{outcome.case.name}: nothing was killed"
    for kill in outcome.kills:
        survivors = [status for rank, status in enumerate(kill.statuses) if rank != kill.victim]
        if all(status == 0 for status in survivors):  # it was killed when all was done
            continue
        assert set(survivors) == {EXIT_RANK_LOST}, kill
        assert len(kill.said) == 1, kill
    assert not outcome.different, outcome


def draw(places: list[dict[str, Any]], pattern: str, dice: random.Random) -> tuple[int, float]:
    """A moment of the time spent in a phase: during which of its stretches (from 1), and how far into it."""
    stretches = list(_stretches(places, pattern))
    if not stretches:
        raise AssertionError(f"no place matches {pattern}: {sorted({p['place'] for p in places})}")
    left = dice.uniform(0.0, sum(end - start for start, end in stretches))
    for number, (start, end) in enumerate(stretches, start=1):
        if left <= end - start:
            return number, left
        left -= end - start
    return len(stretches), 0.0


def entered(places: list[dict[str, Any]], pattern: str, nth: int) -> bool:
    """Whether the ``nth`` stretch of the phase has begun."""
    return len(list(_stretches(places, pattern))) >= nth


def _stretches(places: Iterable[dict[str, Any]], pattern: str) -> Iterable[tuple[float, float]]:
    start = end = None
    for place in places:
        if re.search(pattern, place["place"]):
            start = place["time"] if start is None else start
            end = place["time"]
        elif start is not None:
            yield start, place["time"]
            start = None
    if start is not None and end is not None:
        yield start, end


def finished(job: Job) -> None:
    """Asserts that a run came to its end."""
    ranks = range(job.world_size)
    said = "\n".join(f"rank {rank}: {job.errors(rank)[-2000:]}" for rank in ranks if job.statuses[rank] != 0)
    assert not said, said


def results(output: Path) -> dict[str, Any]:
    """What a killed and continued run has to have in common with one that was never disturbed."""
    report = json.loads((output / "report.json").read_text())
    weights = sorted(output.rglob("adapter_model.safetensors"))
    hashes = {str(p.relative_to(output)): hashlib.sha256(p.read_bytes()).hexdigest() for p in weights}
    kept = ("losses", "grad_norms", "evaluation", "interference", "interference_by_arm", "leak")
    return {"adapters": hashes} | {key: report[key] for key in kept}


def compare(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """What differs, to the bit."""
    return [f"{key}: {found.get(key)} for {wanted[key]}" for key in wanted if found.get(key) != wanted[key]]


def short_cases() -> list[Case]:
    """For every run of the tests."""
    return [
        Case("zero3", "training step", 1, seed=0),
        Case("zero3", "checkpoint", "launcher", seed=0, at_file=True),
        Case("fsdp2", "calibration block", 0, seed=0),
        Case("fsdp2", "export", 0, seed=0, at_file=True),
    ]


def all_cases() -> list[Case]:
    """Every phase, engine and victim; some at a file operation, some struck twice or thrice, some on three ranks."""
    cases: list[Case] = short_cases()
    number = 0
    for engine in ("zero3", "fsdp2"):
        for phase in PHASES:
            victims: tuple[Who, ...] = (0, 1, "launcher")
            for victim in victims:
                number += 1
                # Rank 1 writes its part of a checkpoint and no other file.
                at_file = phase in FILES and (phase == "checkpoint" or (victim != 1 and number % 2 == 0))
                kills = 3 if number % 9 == 0 else 2 if number % 4 == 0 else 1
                cases.append(Case(engine, phase, victim, seed=1, at_file=at_file, kills=kills))
        cases += [
            Case(engine, "training step", 2, seed=2, kills=2, world_size=3),
            Case(engine, "checkpoint", 1, seed=2, at_file=True, world_size=3),
        ]
    return cases


def figures(outcomes: list[Outcome], **more: Any) -> str:
    """The file of figures, a run a line; ``more`` are other keys, values or lists of them."""
    parts = {"summary": summary(outcomes).splitlines(), "runs": [outcome.as_json() for outcome in outcomes]} | more
    lines = [
        f"{json.dumps(key)}: [\n" + ",\n".join(map(json.dumps, value)) + "\n]"
        if isinstance(value, list)
        else f"{json.dumps(key)}: {json.dumps(value)}"
        for key, value in parts.items()
    ]
    return "{" + ",\n".join(lines) + "}\n"


def phase_of(place: str) -> str:
    """Which of ``PHASES`` a kill really struck."""
    if "checkpoints/" in place:
        return "checkpoint"
    found = (name for name, pattern in PHASES.items() if re.search(pattern, place))
    return next(found, "between two phases")


def summary(outcomes: list[Outcome]) -> str:
    """The figures as a Markdown table: kills by phase and engine, and what came of them."""
    counts: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    longest: dict[str, float] = defaultdict(float)
    for outcome in outcomes:
        for kill in outcome.kills:
            phase = phase_of(kill.place)
            counts[phase][outcome.case.engine] += 1
            longest[phase] = max(longest[phase], kill.seconds)
    lines = ["| killed during | zero3 | fsdp2 | the others' longest time to end |", "|---|---|---|---|"]
    for phase in [*(name for name in PHASES if name in counts), *(name for name in counts if name not in PHASES)]:
        by_engine = counts[phase]
        lines.append(f"| {phase} | {by_engine['zero3']} | {by_engine['fsdp2']} | {longest[phase]:.1f} s |")
    kills = sum(len(outcome.kills) for outcome in outcomes)
    same = sum(not outcome.different for outcome in outcomes)
    most = max(longest.values(), default=0.0)
    lines += [
        "",
        f"{kills} kills in {len(outcomes)} runs; the others ended within {most:.1f} s;",
        f"{same} of {len(outcomes)} then finished with adapters, losses and evaluation as if undisturbed, bit for bit.",
    ]
    return "\n".join(lines)
