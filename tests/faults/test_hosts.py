"""Two hosts for real: ``torchrun`` in two network namespaces, a cable that is pulled, a host that is lost.

Most of it by ``make faults`` alone; each start of ``torchrun`` takes seconds.
"""

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from faults.hosts import (
    PORT,
    HostOutcome,
    Launcher,
    Network,
    NoNamespaces,
    keep,
    launchers,
    network,
    start,
    until,
)
from faults.jobs import Zygote
from faults.kill import FULL, compare, finished, results
from helpers.launching import free_port
from helpers.world import make_base, make_recipe, make_texts
from nslora_dist.errors import EXIT_RANK_LOST

Begin = Callable[[str], HostOutcome]
full_only = pytest.mark.skipif(not FULL, reason="NSLORA_FAULTS=full tries this (make faults)")


class Runs:
    """Runs of one recipe, each in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        """Makes the toy world: forty steps, a checkpoint every five."""
        self.folder = folder
        make_base(folder / "base")
        make_texts(folder)
        task = {"path": str(folder / "task.jsonl"), "samples": 3}
        recipe = make_recipe(
            folder,
            folder / "base",
            folder / "unused",
            calibration={"samples": 6, "heldout_fraction": 0.34, "batch_size": 6},
            train={"max_steps": 40, "global_batch_size": 12, "micro_batch_size": 3},
            checkpoint={"every": 5, "keep_last": 2},
            engine={"name": "fsdp2"},
            evaluation={"adaptation": task},
        )
        tree = yaml.safe_load(recipe.to_yaml())
        del tree["output_dir"]
        self.recipe = folder / "toy.yaml"
        self.recipe.write_text(yaml.safe_dump(tree))

    def output(self, name: str) -> Path:
        """A run's folder."""
        return self.folder / name / "run"

    def checkpoints(self, name: str) -> list[int]:
        """The steps of its whole checkpoints."""
        found = (re.fullmatch(r"step-(\d+)", path.name) for path in (self.output(name) / "checkpoints").glob("*"))
        return sorted(int(match[1]) for match in found if match)

    def until_saved(self, name: str, launcher: Launcher) -> None:
        """Waits for the first checkpoint."""
        until(lambda: self.checkpoints(name) or launcher.over(), "no checkpoint comes")
        assert not launcher.over(), launcher.errors

    def on_hosts(self, net: Network, name: str, *overrides: str, **env: str) -> list[Launcher]:
        """The same command on both hosts, as the example script's header has it."""
        (self.folder / name).mkdir(exist_ok=True)
        command = ["launch/torchrun_2nodes.sh", str(self.recipe), f"output_dir={self.output(name)}", *overrides]
        started = []
        for number, host in enumerate(net.hosts):
            mine = {"HEAD": net.address(0), "PORT": PORT, "GPUS": "1", "NODE_RANK": str(number)} | env
            if "NODES" in env or "RESTARTS" in env:
                mine["ADDRESS"] = net.address(number)
            started.append(start(command, self.folder / name / f"{host}.err", host=host, **mine))
        return started


@pytest.fixture(scope="module")
def hosts() -> Iterator[Network]:
    try:
        with network() as made:
            yield made
    except NoNamespaces as error:
        pytest.skip(f"two hosts need network namespaces: {error}")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("hosts"))


@pytest.fixture(scope="module")
def one_host(runs: Runs, zygote: Zygote) -> dict[str, Any]:
    """What the same two ranks leave on one host, undisturbed."""
    output = runs.output("one host")
    arguments = ["launch/train.py", "--recipe", str(runs.recipe), f"output_dir={output}"]
    finished(zygote.job(runs.folder / "one host", *arguments, output=output).wait())
    return results(output)


@pytest.fixture
def running() -> Iterator[list[Launcher]]:
    with launchers() as started:
        yield started


@pytest.fixture
def outcome() -> Iterator[Begin]:
    """Gives a case its entry among the figures, which is kept when the test is over."""
    made: list[HostOutcome] = []

    def begin(case: str) -> HostOutcome:
        made.append(HostOutcome(case))
        return made[-1]

    yield begin
    for one in made:
        keep(one, full=FULL)


def ended(started: list[Launcher], *, status: int) -> None:
    """Waits for the end of all, which has to be ``status``."""
    # Each is asked every time, for the moment at which it is first seen to have ended.
    until(lambda: sum(launcher.over() for launcher in started) == len(started), "torchrun does not end")
    for launcher in started:
        assert launcher.process.returncode == status, launcher.errors[-3000:]


def exit_codes(launcher: Launcher) -> list[int]:
    """The ranks' own statuses, from torchrun's table."""
    return [int(code) for code in re.findall(r"exitcode\s+: (-?\d+) \(pid", launcher.errors)]


@full_only
def test_two_hosts_train_as_one(
    hosts: Network,
    runs: Runs,
    one_host: dict[str, Any],
    running: list[Launcher],
    outcome: Begin,
) -> None:
    found = outcome("two hosts, undisturbed")
    running += runs.on_hosts(hosts, "two hosts")
    ended(running, status=0)
    found.different = compare(results(runs.output("two hosts")), one_host)
    assert not found.different


@pytest.mark.parametrize("cut", [1, pytest.param(0, marks=full_only)])
def test_a_host_is_cut_off(
    hosts: Network,
    runs: Runs,
    one_host: dict[str, Any],
    running: list[Launcher],
    outcome: Begin,
    cut: int,
) -> None:
    """Neither can tell the other; each ends by itself, and with a shared folder one of them says why."""
    name = f"cut {cut}"
    found = outcome(f"the cable of host {cut} is pulled in training")
    # Nothing but a time-out finds a pulled cable. The other runs have time: a busy machine may take long over a plot.
    running += runs.on_hosts(hosts, name, "engine.timeout_seconds=12")
    runs.until_saved(name, running[0])
    at = time.monotonic()
    hosts.cut(cut)
    try:
        ended(running, status=1)
    finally:
        hosts.join(cut)
    found.seconds = [launcher.ended - at for launcher in running]
    found.said = [line for launcher in running for line in launcher.said]
    assert [exit_codes(launcher) for launcher in running] == [[EXIT_RANK_LOST]] * 2
    assert len(found.said) == 1, found.said
    who = r"rank 1 is gone, stopped or cut off|the launcher of the first machine, which .* does not answer"
    assert re.search(f"training null_space, step [0-9]+ of 40, .*({who}) ", found.said[0]), found.said
    assert runs.checkpoints(name)[-1] < 40

    running += runs.on_hosts(hosts, name)
    ended(running[2:], status=0)
    found.different = compare(results(runs.output(name)), one_host)
    assert not found.different


@full_only
def test_torchrun_restarts_the_ranks_of_one_host(
    runs: Runs,
    one_host: dict[str, Any],
    running: list[Launcher],
    outcome: Begin,
) -> None:
    name = "restart"
    found = outcome("a rank is killed, one host, --max-restarts 1")
    (runs.folder / name).mkdir()
    command = ["torchrun", "--nproc-per-node", "2", "--max-restarts", "1", "--master-port", free_port()]
    command += ["launch/train.py", "--recipe", str(runs.recipe), f"output_dir={runs.output(name)}"]
    running.append(start(command, runs.folder / name / "err"))
    runs.until_saved(name, running[0])
    at, before = time.monotonic(), running[0].ranks()
    os.kill(before[1], signal.SIGKILL)
    until(lambda: set(running[0].ranks()).isdisjoint(before) and running[0].ranks(), "the ranks are not restarted")
    found.seconds = [time.monotonic() - at]
    ended(running, status=0)
    found.said = running[0].said
    assert len(found.said) == 1 and "rank 1 is gone" in found.said[0]
    found.different = compare(results(runs.output(name)), one_host)
    assert not found.different


@full_only
def test_torchrun_restarts_the_ranks_of_both_hosts(
    hosts: Network,
    runs: Runs,
    one_host: dict[str, Any],
    running: list[Launcher],
    outcome: Begin,
) -> None:
    name = "restart both"
    found = outcome("a rank is killed, two hosts, RESTARTS=1")
    running += runs.on_hosts(hosts, name, RESTARTS="1")
    runs.until_saved(name, running[0])
    at, before = time.monotonic(), [launcher.ranks() for launcher in running]
    os.kill(before[1][0], signal.SIGKILL)
    for launcher, old in zip(running, before, strict=True):
        until(lambda one=launcher, old=old: one.ranks() and one.ranks() != old, "the ranks are not restarted")
        found.seconds.append(time.monotonic() - at)
    ended(running, status=0)
    found.said = [line for launcher in running for line in launcher.said]
    assert len(found.said) == 1 and "rank 1 is gone" in found.said[0], found.said
    found.different = compare(results(runs.output(name)), one_host)
    assert not found.different


@full_only
def test_one_of_two_hosts_is_lost_for_good(
    hosts: Network,
    runs: Runs,
    one_host: dict[str, Any],
    running: list[Launcher],
    outcome: Begin,
) -> None:
    """The other goes on alone: another number of ranks, so equal within rounding."""
    name = "elastic"
    found = outcome("host 1 is lost, NODES=1:2 RESTARTS=1: host 0 goes on alone")
    conf = "keep_alive_interval=1,keep_alive_max_attempt=3"
    running += runs.on_hosts(hosts, name, NODES="1:2", RESTARTS="1", LAST_CALL="3", RDZV_CONF=conf)
    runs.until_saved(name, running[0])
    at, before = time.monotonic(), running[0].ranks()
    running[1].lose()
    until(lambda: set(running[0].ranks()).isdisjoint(before) and running[0].ranks(), "the rank is not restarted")
    found.seconds = [time.monotonic() - at]
    ended(running[:1], status=0)
    found.said = running[0].said
    assert len(found.said) == 1 and "rank 1 is gone" in found.said[0], found.said
    losses = results(runs.output(name))["losses"]
    wanted = one_host["losses"]
    worst = max(abs(mine - other) for mine, other in zip(losses, wanted, strict=True))
    found.different = [] if worst <= 1e-5 else [f"losses by {worst}"]
    assert not found.different
