"""Disks that fill up, turn read-only or take permission back: one clear line, nothing lost, and the run goes on."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from faults.jobs import Job
from faults.kill import FULL, Range, compare, finished, results
from faults.spoil import BALLAST
from nslora_dist import manifests
from nslora_dist.errors import EXIT_STORAGE

MEGABYTES = 48
SIZE = f"size={MEGABYTES}m"
ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a file system")
SLOW = pytest.mark.skipif(not FULL, reason="NSLORA_FAULTS=full, or make faults")


@contextmanager
def mounted(folder: Path, *command: str) -> Iterator[Path]:
    """A file system of its own at a new folder; skips where this machine allows none."""
    folder.mkdir()
    done = subprocess.run(["mount", *command, str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def check_refused(job: Job, *words: str) -> str:
    """Every rank ended with the status of storage errors, after one line that says all the ``words``."""
    said = [line for rank in range(job.world_size) for line in job.error_lines(rank)]
    statuses = [job.statuses[rank] for rank in range(job.world_size)]
    assert statuses == [EXIT_STORAGE] * job.world_size, (statuses, [job.errors(rank)[-1500:] for rank in (0, 1)])
    assert len(said) == 1, said
    assert all(word in said[0] for word in words), said
    assert "Traceback" not in job.errors(0) + job.errors(1)
    return said[0]


def check_whole(output: Path) -> int:
    """Every checkpoint of that name is whole; returns how many there are."""
    found = [path for path in output.glob("checkpoints/**/step-*") if path.is_dir()]
    for folder in found:
        for name, entry in manifests.open_manifest(folder)["files"].items():
            assert not manifests.wrong_file(folder, name, entry), folder / name
    return len(found)


PLACES: dict[str, tuple[str, int]] = {
    "null_space": (".null_space.partial/", 3),
    "checkpoint": ("checkpoints/.step-4.partial/", 2),
    "adapter": (".adapter.partial/", 4),
    "report": (".report.json.partial", 2),
}
"""Where it happens → part of the path, and before which operation on such a path; the last step is always written."""


class Spoiled:
    """A run on a disk of its own that is spoiled under it, and the same command afterwards."""

    def __init__(self, killing: Range, engine: str, disk: Path, *, unprivileged: bool = False) -> None:
        self.killing, self.engine, self.disk, self.unprivileged = killing, engine, disk, unprivileged
        self.output = disk / "run"

    def run(self, where: str, how: str) -> Job:
        """Spoils the disk at one of ``PLACES`` and waits for the end."""
        match, nth = PLACES[where]
        job = self._start({"rank": 0, "match": match, "nth": nth, "victim": how})
        job.wait()
        assert any(place.get("struck") == how for place in job.places(0)), job.errors(0)[-2000:]
        return job

    def again(self) -> None:
        """The same command finishes as if nothing had happened."""
        finished(self._start(None).wait())
        assert not compare(results(self.output), self.killing.reference(self.engine).result)

    def _start(self, strike: dict[str, Any] | None) -> Job:
        more = {"strike": strike, "unprivileged": self.unprivileged}
        job, _ = self.killing.start(self.engine, f"{self.disk.name}-said", output=self.output, **more)
        return job


@ROOT_ONLY
@pytest.mark.parametrize(
    ("engine", "where"),
    [
        pytest.param(engine, where, marks=() if (engine, where) == ("fsdp2", "checkpoint") else SLOW)
        for engine in ("zero3", "fsdp2")
        for where in PLACES
    ],
)
def test_disk_full(engine: str, where: str, killing: Range) -> None:
    with mounted(killing.folder / f"full-{engine}-{where}", "-t", "tmpfs", "-o", SIZE, "tmpfs") as disk:
        run = Spoiled(killing, engine, disk)
        job = run.run(where, "full")
        check_refused(job, str(run.output), "No space left on device", "free some disk space", "same command")
        assert check_whole(run.output) >= (0 if where == "null_space" else 1)
        (disk / BALLAST).unlink()
        run.again()


@pytest.mark.parametrize(
    "where", [pytest.param(where, marks=() if where == "adapter" else SLOW) for where in ("checkpoint", "adapter")]
)
def test_permission_lost(where: str, killing: Range) -> None:
    disk = killing.folder / f"forbidden-{where}"
    disk.mkdir()
    run = Spoiled(killing, "fsdp2", disk, unprivileged=True)
    job = run.run(where, "forbidden")
    check_refused(job, str(run.output), "Permission denied", "give the permission back")
    assert check_whole(run.output) >= 1
    for folder in (path for path in [run.output, *run.output.rglob("*")] if path.is_dir()):
        folder.chmod(0o755)
    run.again()


@ROOT_ONLY
@SLOW
@pytest.mark.parametrize("where", ["null_space", "checkpoint", "adapter"])
def test_turned_read_only(where: str, killing: Range) -> None:
    """An ext4 file system that finds an error turns read-only while files are open on it."""
    image = killing.folder / f"{where}.ext4"
    with image.open("wb") as file:
        file.truncate(MEGABYTES * 2**20)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
    folder = killing.folder / f"read-only-{where}"
    with mounted(folder, "-o", "loop,errors=remount-ro", str(image)) as disk:
        if not Path("/sys/fs/ext4").is_dir():
            pytest.skip("this kernel shows no /sys/fs/ext4")
        run = Spoiled(killing, "zero3", disk)
        job = run.run(where, "read-only")
        check_refused(job, str(run.output), "Read-only file system", "mount it for writing")
        assert check_whole(run.output) >= (0 if where == "null_space" else 1)
    subprocess.run(["fsck.ext4", "-p", "-f", str(image)], check=False, capture_output=True)
    folder.rmdir()
    with mounted(folder, "-o", "loop", str(image)) as disk:
        Spoiled(killing, "zero3", disk).again()


@ROOT_ONLY
@SLOW
def test_read_only_from_the_start(killing: Range) -> None:
    with mounted(killing.folder / "read-only", "-t", "tmpfs", "-o", SIZE, "tmpfs") as disk:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        run = Spoiled(killing, "fsdp2", disk)
        job = run._start(None).wait()
        check_refused(job, str(run.output), "Read-only file system")
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        run.again()
