"""Checkpoints as files: written behind training, whole or not there, thinned out, and the newest whole one taken up."""

import errno
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.kept_state import BELONGS, State, checkpoints, facts
from nslora_dist import artifacts, checkpoint, checkpoint_files, folders, manifests
from nslora_dist.calibration.parts import Part, Parts
from nslora_dist.errors import StorageError, UserError


def write(folder: Path, *steps: int, **section: Any) -> None:
    kept = checkpoints(folder, **section)
    for step in steps:
        kept.write(State.drawn(step), step, facts(step))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_was_written_is_taken_up(tmp_path: Path) -> None:
    write(tmp_path, 3)
    found = checkpoints(tmp_path)
    found.look()
    state = State.drawn(0)
    assert found.step == 3 and found.restore(state) == facts(3)
    assert state.same(State.drawn(3)) and not state.same(State.drawn(0)) and state.updates == 3
    manifest = manifests.read_manifest(tmp_path / "step-3")
    assert manifest["history"] == [{"engine": "single", "world_size": 1, "from": 0, "to": 3}]
    assert manifest["optimizer"] == {"name": "AdamW", "updates": 3, "betas": [0.9, 0.999], "weight_decay": 0.1}
    # Nothing but the trained state: three float32 numbers for each of 39 parameters, and headers.
    assert (tmp_path / "step-3" / "rank-00000.safetensors").stat().st_size < 39 * 3 * 4 + 800


def mapped(folder: Path) -> list[str]:
    """Files of a folder that this process has mapped or open."""
    opened = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
    lines = Path("/proc/self/maps").read_text().splitlines() + opened
    return [line for line in lines if f"{folder.resolve()}/" in line]


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs /proc")
def test_a_folder_that_was_taken_up_is_not_held(tmp_path: Path) -> None:
    """NFS keeps a deleted file that is still mapped, and its folder with it."""
    write(tmp_path, 3)
    found = checkpoints(tmp_path)
    found.look()
    assert mapped(tmp_path) == []
    found.restore(State.drawn(0))
    assert mapped(tmp_path) == []


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs /proc")
def test_a_calibrated_block_that_was_taken_up_is_not_held(tmp_path: Path) -> None:
    parts = Parts(tmp_path / "parts", "key")
    parts.write(0, Part({}, {"basis": torch.ones(3)}))
    part = parts.read(0)
    assert part is not None and mapped(tmp_path) == []
    parts.clear()
    assert torch.equal(part.tensors["basis"], torch.ones(3)) and not (tmp_path / "parts").exists()


@pytest.mark.parametrize("number", [errno.ENOTEMPTY, errno.EBUSY])
def test_a_folder_in_use_is_deleted_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def fails(with_number: int) -> None:
        def rmtree(folder: Path, **_: Any) -> None:
            raise OSError(with_number, os.strerror(with_number), str(folder))

        monkeypatch.setattr(folders.shutil, "rmtree", rmtree)

    write(tmp_path, 2, 4, keep_last=2)
    fails(number)
    write(tmp_path, 6, 8, keep_last=2)
    assert names(tmp_path) == [".step-2.old", ".step-4.old", "step-6", "step-8"]
    monkeypatch.undo()
    write(tmp_path, 10, keep_last=2)
    assert names(tmp_path) == ["step-10", "step-8"]
    fails(errno.EIO)
    with pytest.raises(UserError, match="Input/output error"):
        write(tmp_path, 12, keep_last=2)


def test_nothing_there(tmp_path: Path) -> None:
    found = checkpoints(tmp_path / "none")
    found.look()
    assert found.step == 0 and found.restore(State.drawn(0)) == {} and found.history == []


def test_the_last_few_are_kept(tmp_path: Path) -> None:
    write(tmp_path, 2, 4, 6, 10, keep_last=2)
    assert names(tmp_path) == ["step-10", "step-6"]


def test_a_damaged_one_is_named_and_skipped_and_left(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, 2, 4, 6, keep_last=9)
    part = tmp_path / "step-6" / "rank-00000.safetensors"
    part.write_bytes(part.read_bytes()[:-1])
    (tmp_path / "step-4" / "manifest.json").unlink()
    found = checkpoints(tmp_path)
    with caplog.at_level("INFO", "nslora_dist"):
        found.look()
    assert found.step == 2
    said = [record.getMessage() for record in caplog.records]
    assert f"{part}: " in said[0] and "skipped" in said[0]
    assert str(tmp_path / "step-4" / "manifest.json") in said[1]
    # Training on, the step that was damaged is written anew; until then it neither counts nor vanishes.
    found.write(State.drawn(3), 3, facts(3))
    assert names(tmp_path) == ["step-2", "step-3", "step-4", "step-6"]
    found.write(State.drawn(6), 6, facts(6))
    again = checkpoints(tmp_path)
    again.look()
    assert again.step == 6


def test_the_state_of_another_training_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, 2)
    with pytest.raises(
        UserError, match=r"step-2: was written by a training with another rows; give another output_dir"
    ):
        checkpoints(tmp_path, belongs_to=BELONGS | {"rows": "others"}).look()
    with pytest.raises(UserError, match="another adapter, rows"):
        checkpoints(tmp_path, belongs_to=BELONGS | {"rows": "others", "adapter": {"rank": 4}}).look()


def test_training_waits_for_the_copy_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the disk hangs, steps go on, change the state, and pass the next time at which one is due."""
    go, kept = threading.Event(), checkpoints(tmp_path, every=2)
    part = checkpoint_files.write_part

    def slow(path: Path, shards: Any) -> dict[str, Any]:
        assert go.wait(60)
        return part(path, shards)

    monkeypatch.setattr(checkpoint, "write_part", slow)
    state = State.drawn(2)
    assert not kept.due(1) and kept.due(2)
    kept.start(state, 2, facts(2))  # type: ignore[arg-type]
    for values in state.values.values():
        for value in values.values():
            value.zero_()  # as the optimizer writes on
    for step in (3, 4, 5):
        kept.settle()
        assert not kept.due(step)
    assert names(tmp_path) == [".step-2.partial"] and kept.last is None
    go.set()
    kept.finish()
    assert names(tmp_path) == ["step-2"] and kept.last == 2
    assert kept.due(5), "the one of step 4 is made up for"
    found = checkpoints(tmp_path)
    found.look()
    taken = State.drawn(0)
    found.restore(taken)  # type: ignore[arg-type]
    assert taken.same(State.drawn(2)), "the copy was taken before the state changed"


def test_a_dropped_one_leaves_nothing(tmp_path: Path) -> None:
    write(tmp_path, 2)
    kept = checkpoints(tmp_path)
    kept.look()
    kept.start(State.drawn(4), 4, facts(4))  # type: ignore[arg-type]
    kept.abandon(4)
    kept.finish()
    assert names(tmp_path) == ["step-2"] and kept.last == 2


def test_one_that_a_good_step_has_followed_is_not_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slow storage: step 4's is still on its way when the step after step 5 is not finite."""
    kept, go = checkpoints(tmp_path), threading.Event()
    write_part = checkpoint.write_part

    def slow(path: Path, shards: Any) -> dict[str, Any]:
        assert go.wait(30)
        return write_part(path, shards)

    monkeypatch.setattr(checkpoint, "write_part", slow)
    kept.start(State.drawn(4), 4, facts(4))  # type: ignore[arg-type]
    threading.Timer(0.2, go.set).start()
    kept.abandon(5)
    assert names(tmp_path) == ["step-4"] and kept.last == 4


def test_a_failed_write_is_an_error_and_the_last_one_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 2)
    kept = checkpoints(tmp_path)
    kept.look()

    def full(path: Path, shards: Any) -> dict[str, Any]:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(checkpoint, "write_part", full)
    with pytest.raises(StorageError, match=r"No space left"):
        kept.write(State.drawn(4), 4, facts(4))  # type: ignore[arg-type]
    found = checkpoints(tmp_path)
    found.look()
    assert found.step == 2
    monkeypatch.undo()
    found.write(State.drawn(4), 4, facts(4))  # type: ignore[arg-type]
    assert names(tmp_path) == ["step-2", "step-4"]


@pytest.mark.parametrize("moment", ["write_manifest", "take_place", "open_partial"])
def test_death_at_any_moment_leaves_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    write(tmp_path, 2)
    kept = checkpoints(tmp_path)

    def die(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(manifests if moment == "write_manifest" else folders, moment, die)
    with pytest.raises(KeyboardInterrupt):
        kept.write(State.drawn(4), 4, facts(4))  # type: ignore[arg-type]
    monkeypatch.undo()
    found = checkpoints(tmp_path)
    found.look()
    assert found.step == 2
    found.write(State.drawn(4), 4, facts(4))  # type: ignore[arg-type]
    assert names(tmp_path) == ["step-2", "step-4"]


def test_pieces_must_cover_a_parameter(tmp_path: Path) -> None:
    """Hashes that fit prove the bytes and not the writer."""
    write(tmp_path, 2)
    folder = tmp_path / "step-2"
    manifest = json.loads((folder / "manifest.json").read_text())
    name = "model.layers.0.q_proj.lora_B"
    with pytest.raises(UserError, match=rf"holds 15 of 18 elements of {name}"):
        checkpoint_files.Pieces(folder, manifest | {"tensors": manifest["tensors"] | {name: [6, 3]}})
    tensors = artifacts.load_tensors(folder / "rank-00000.safetensors")
    tensors[f"{name}/value/4"] = tensors.pop(f"{name}/value/0")
    artifacts.save_tensors(folder / "rank-00000.safetensors", tensors)
    with pytest.raises(UserError, match=r"value starts at 4, and 0 was to follow"):
        checkpoint_files.Pieces(folder, manifest)
