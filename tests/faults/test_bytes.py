"""Damaged files are never loaded: one bit, a missing end or a byte too many, in every file that a run takes up again.

A short selection by default; the whole with ``NSLORA_FAULTS=full``.
"""

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from helpers.kept_state import State, checkpoints, facts
from nslora_dist.calibration import store
from nslora_dist.calibration.parts import Part, Parts
from nslora_dist.calibration.weights import WeightNullSpace
from nslora_dist.errors import UserError
from nslora_dist.export import Factors, write_adapter
from nslora_dist.live_calibration import calibrate
from nslora_dist.merging.tasks import read_stored
from nslora_dist.provenance import Provenance, read_provenance, write_provenance
from nslora_dist.update_grams import read_update_grams, write_update_grams

FULL = os.environ.get("NSLORA_FAULTS") == "full"
CASES = 240 if FULL else 24
"""Of each kind of folder."""
UNPROVEN = {"README.md"}
"""The model card is people's to edit."""


def make_null_space(folder: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes))
    batches = [{"input_ids": torch.randint(0, 20, (2, 20))}]
    calibrate(model, batches, rank=3, folder=folder, target_modules=["q_proj", "down_proj"], a_init="projected")


def make_weight_null_space(folder: Path) -> None:
    side = {"size": 12, "kept": 4, "structural": 0, "largest": 0.1, "second": 0.01}
    manifest = {
        "kind": "weight_null_space",
        "key": "1" * 64,
        "settings": {"dim": 4, "threshold": 0.1},
        "modules": {"layers.0.q_proj": {"right": side, "left": side, "solver": "eigh"}},
    }
    tensors = {f"layers.0.q_proj.{name}": torch.randn(12, 4) for name in ("right", "left")}
    store.save(folder, WeightNullSpace(manifest=manifest, tensors=tensors))


def make_adapter(folder: Path) -> None:
    names = [f"model.layers.0.self_attn.{target}" for target in ("q_proj", "v_proj")]

    def more(partial: Path) -> None:
        write_update_grams(partial, {name: torch.eye(4) for name in names})
        write_provenance(partial, Provenance("1" * 64, "2" * 64, "some/base"))

    write_adapter(
        folder,
        {name: Factors(torch.randn(4, 16), torch.randn(16, 4)) for name in names},
        scale=0.5,
        base_model="some/base",
        revision=None,
        target_modules=["q_proj", "v_proj"],
        card={"name": "toy"},
        more=more,
    )


def load_adapter(folder: Path) -> object:
    return read_stored("adapter", folder), read_provenance(folder), read_update_grams(folder)


def make_checkpoint(folder: Path) -> None:
    checkpoints(folder).write(State.drawn(2), 2, facts(2))  # type: ignore[arg-type]


def load_checkpoint(folder: Path) -> None:
    """A damaged one is skipped, which leaves nothing to take up."""
    found = checkpoints(folder)
    found.look()
    if found.step == 0:
        raise UserError("skipped")


def make_block(folder: Path) -> None:
    Parts(folder, "1" * 64).write(3, Part({"groups": {"g": {"leak": 0.5}}}, {"g.basis": torch.randn(8, 3)}))


def load_block(folder: Path) -> None:
    if Parts(folder, "1" * 64).read(3) is None:
        raise UserError("to be done again")


class Kind(NamedTuple):
    """A folder whose files prove themselves: how it is made, and the call that takes it up."""

    name: str
    make: Callable[[Path], None]
    load: Callable[[Path], object]


KINDS = [
    Kind("null space", make_null_space, store.load),
    Kind("weights' null space", make_weight_null_space, lambda folder: store.load(folder, WeightNullSpace)),
    Kind("adapter", make_adapter, load_adapter),
    Kind("checkpoint", make_checkpoint, load_checkpoint),
    Kind("calibrated block", make_block, load_block),
]


def damages(name: str, whole: bytes, dice: random.Random) -> Iterator[tuple[str, bytes]]:
    """Damaged versions of a file without end: the places that matter first, then anywhere."""

    def flipped(at: int, bit: int) -> tuple[str, bytes]:
        return f"{name}: bit {bit} of byte {at}", whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :]

    def cut(size: int) -> tuple[str, bytes]:
        return f"{name}: cut to {size}", whole[:size]

    yield flipped(len(whole) - 1, 0)
    yield cut(0)
    yield flipped(0, 0)
    yield from (cut(size) for size in (len(whole) - 1, 1, 8))
    yield from ((f"{name}: {end!r} appended", whole + end) for end in (b"\n", b"\0", b"}", whole))
    if name.endswith(".safetensors"):
        yield from (flipped(at, bit) for at, bit in ((7, 7), (4, 0), (1, 0), (0, 7), (3, 3)))  # the header's length
    header = 8 + int.from_bytes(whole[:8], "little") if name.endswith(".safetensors") else len(whole)
    while True:
        yield flipped(dice.randrange(header), dice.randrange(8))
        yield flipped(dice.randrange(len(whole)), dice.randrange(8))
        if header < len(whole):
            yield flipped(dice.randrange(header, len(whole)), dice.randrange(8))
        if dice.random() < 0.2:
            yield cut(dice.randrange(len(whole)))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_no_damaged_file_is_loaded(kind: Kind, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    kind.make(folder)
    kind.load(folder)
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in UNPROVEN)
    sources = [(path, path.read_bytes()) for path in paths]
    dice = random.Random(kind.name)
    streams = [damages(path.name, whole, dice) for path, whole in sources]
    loaded, tried = [], set()
    while len(tried) < CASES:
        for (path, whole), stream in zip(sources, streams, strict=True):
            said, damaged = next(stream)
            if said in tried or damaged == whole:
                continue
            tried.add(said)
            path.write_bytes(damaged)
            try:
                kind.load(folder)
            except UserError as error:
                assert "\n" not in str(error), said
            else:
                loaded.append(said)
            path.write_bytes(whole)
    assert not loaded
    kind.load(folder)  # it was the damage, then


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_no_folder_that_lacks_a_file_is_loaded(kind: Kind, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    kind.make(folder)
    (folder / "a person's note").write_text("is no damage")
    kind.load(folder)
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        if path.name in UNPROVEN or path.name in ("a person's note", "nslora.json"):
            continue  # without nslora.json it is another project's adapter
        whole = path.read_bytes()
        path.unlink()
        with pytest.raises(UserError):
            kind.load(folder)
        path.write_bytes(whole)
