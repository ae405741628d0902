"""Two hosts on one machine: network namespaces, each with a cable of its own to a switch that is a third one."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from faults.jobs import HANG, Hangs
from helpers.launching import ROOT, environment

PORT = "29533"  # the namespaces have nobody else's ports
INTERFACE = "cable"


class NoNamespaces(RuntimeError):
    """This machine, or this user, cannot make network namespaces; the message says why."""


@dataclass
class Network:
    """The hosts' namespaces and their switch's.

    Attributes:
        hosts: names of the namespaces.
        switch: the namespace of the switch.
    """

    hosts: tuple[str, str]
    switch: str

    @staticmethod
    def address(host: int) -> str:
        """The address of a host, in a network that exists in these namespaces alone."""
        return f"10.231.0.{host + 1}"

    def cut(self, host: int) -> None:
        """Pulls a host's cable: it keeps its address, and its packets go nowhere."""
        _ip("-n", self.switch, "link", "set", f"port{host}", "down")

    def join(self, host: int) -> None:
        """Plugs it in again."""
        _ip("-n", self.switch, "link", "set", f"port{host}", "up")


def _ip(*arguments: str) -> None:
    try:
        subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=30)
    except FileNotFoundError as error:
        raise NoNamespaces("there is no ip command (iproute2)") from error
    except subprocess.CalledProcessError as error:
        raise NoNamespaces(f"ip {' '.join(arguments)}: {error.stderr.strip()}") from error


@contextmanager
def network() -> Iterator[Network]:
    """Two hosts, until the block ends.

    Raises:
        NoNamespaces: they cannot be made here.
    """
    name = f"nsl{os.getpid()}"
    made = Network((f"{name}-0", f"{name}-1"), f"{name}-switch")
    try:
        for space in (made.switch, *made.hosts):
            _ip("netns", "add", space)
            _ip("-n", space, "link", "set", "lo", "up")
        _ip("-n", made.switch, "link", "add", "bridge0", "type", "bridge")
        _ip("-n", made.switch, "link", "set", "bridge0", "up")
        for number, host in enumerate(made.hosts):
            peer = ("peer", "name", f"port{number}", "netns", made.switch)
            _ip("-n", host, "link", "add", INTERFACE, "type", "veth", *peer)
            _ip("-n", made.switch, "link", "set", f"port{number}", "master", "bridge0", "up")
            _ip("-n", host, "addr", "add", f"{made.address(number)}/24", "dev", INTERFACE)
            _ip("-n", host, "link", "set", INTERFACE, "up")
        yield made
    finally:
        for space in (*made.hosts, made.switch):
            with suppress(NoNamespaces):
                _ip("netns", "del", space)


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # it has ended meanwhile
        return b""


@dataclass
class Launcher:
    """A ``torchrun`` with its ranks, in a process group and with files of its own."""

    process: subprocess.Popen[bytes]
    errors_file: Path
    ended: float = 0.0

    @property
    def errors(self) -> str:
        """What it and its ranks wrote to stderr."""
        return self.errors_file.read_text(errors="replace")

    @property
    def said(self) -> list[str]:
        """The lines for the person."""
        return [line for line in self.errors.splitlines() if line.startswith("error: ")]

    def ranks(self) -> list[int]:
        """The processes of its ranks."""
        text = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [pid for pid in map(int, text.split()) if b"launch/train.py" in _command(pid)]

    def over(self) -> bool:
        """Whether the launcher has ended; then ``ended`` says when it was first seen so."""
        if self.process.poll() is None:
            return False
        self.ended = self.ended or time.monotonic()
        return True

    def lose(self) -> None:
        """SIGKILL for the launcher and its ranks at once, as a power cut."""
        if self.process.poll() is not None:
            return
        os.kill(self.process.pid, signal.SIGSTOP)  # it is to start no rank meanwhile
        for pid in self.ranks():  # torchrun gives each a session of its own
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        os.killpg(self.process.pid, signal.SIGKILL)


@contextmanager
def launchers() -> Iterator[list[Launcher]]:
    """A list whose launchers and ranks are gone when the block ends, however it ends."""
    started: list[Launcher] = []
    try:
        yield started
    finally:
        for launcher in started:
            launcher.lose()
            launcher.process.wait(timeout=HANG)


def start(command: list[str], errors: Path, *, host: str | None = None, **env: str) -> Launcher:
    """Starts a launcher, on a host of the network or, without one, beside the test."""
    prefix = [] if host is None else ["ip", "netns", "exec", host]
    if host is not None:
        env = {"GLOO_SOCKET_IFNAME": INTERFACE, **env}
    with errors.open("ab") as file:
        process = subprocess.Popen(
            [*prefix, *command],
            cwd=ROOT,
            env=environment(**env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=file,
            start_new_session=True,
        )
    return Launcher(process, errors)


def until(true: Any, otherwise: str, *, seconds: float = HANG) -> None:
    """Waits until ``true()``.

    Raises:
        Hangs: not within ``seconds``; ``otherwise`` says what.
    """
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            raise Hangs(otherwise)
        time.sleep(0.01)


@dataclass
class HostOutcome:
    """What was done to two hosts and what came of it, for the figures.

    Attributes:
        case: in words.
        seconds: from the fault until each survivor's launcher had ended, or its ranks went on.
        different: what was not as in the undisturbed run; empty where all was.
        said: the lines for the person.
    """

    case: str
    seconds: list[float] = field(default_factory=list)
    different: list[str] = field(default_factory=lambda: ["it did not come to its end"])
    said: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """For the file of figures."""
        return {"hosts": asdict(self)}


host_outcomes: list[HostOutcome] = []
"""What this session has tried, for the figures."""


def keep(outcome: HostOutcome, *, full: bool) -> None:
    """Adds to the session's figures, and to the file at once."""
    host_outcomes.append(outcome)
    if full:
        (ROOT / "build").mkdir(exist_ok=True)
        with (ROOT / "build" / "faults.jsonl").open("a") as file:
            file.write(json.dumps(outcome.as_json()) + "\n")


def host_summary(outcomes: list[HostOutcome]) -> str:
    """The figures as a Markdown table."""
    lines = ["| two hosts | seconds until the others had ended or went on | as undisturbed |", "|---|---|---|"]
    for outcome in outcomes:
        seconds = ", ".join(f"{value:.1f}" for value in outcome.seconds) or "-"
        lines.append(f"| {outcome.case} | {seconds} | {'; '.join(outcome.different) or 'yes'} |")
    return "\n".join(lines)
