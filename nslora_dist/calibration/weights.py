"""The null spaces of the weights themselves, decomposed block by block (docs/methods.md §2.1), and the same on disk.

All ranks read a block together, each its share of the rows, and exchange them, as the calibration pass does; then each
decomposes the weights that it owns and frees the block, and what it found goes to rank 0. A 4-bit base is decomposed
as it computes, dequantised.

``weight_null_space/<key>/weight_null_space.safetensors`` holds, all float32, for the arms of one base, ``null_dim``,
``null_threshold`` and targets:

    <module>.right  (d_in, k_in)    V, orthonormal columns, ascending singular value; absent where there is none
    <module>.left   (d_out, k_out)  U, likewise

That is 4 · (d_in + d_out) · null_dim bytes a module at most, held by rank 0 while the run lasts: 166 MB a block and
13 GB in all for a 70B LLaMA at null_dim 256. In training the ranks share the same numbers in the compute dtype.
"""

import logging
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from nslora_dist import artifacts, dist, watch
from nslora_dist.base_files import BaseFiles
from nslora_dist.base_model import blocks
from nslora_dist.base_weights import empty_unit, fill_unit
from nslora_dist.calibration import store
from nslora_dist.calibration.parts import AGAIN, Part, Parts
from nslora_dist.calibration.store import Stored
from nslora_dist.errors import Preempted, UserError
from nslora_dist.frozen import FrozenLinear
from nslora_dist.input_groups import InputGroup, LinearShape
from nslora_dist.recipe import Recipe
from nslora_dist.recipe_adapter import AdapterSection
from nslora_dist.recipe_data import CalibrationSection
from nslora_dist.weight_null import NullSide, NullSizes, WeightNull, weight_null_space

log = logging.getLogger("nslora_dist")


@dataclass(frozen=True)
class WeightNullSpace(Stored):
    """The null spaces of all target weights."""

    FOLDER = "weight_null_space"
    FILE = "weight_null_space.safetensors"

    @classmethod
    def place(cls, run: Path, key: str) -> Path:
        """Each key has a folder of its own, for the arms of a run may have other settings."""
        return run / cls.FOLDER / key[:16]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors that ``bases`` sends."""
        if not self.manifest["modules"]:
            raise ValueError("no modules")
        if not self.manifest["settings"]["threshold"] + self.manifest["settings"]["dim"] > 0:
            raise ValueError("a threshold and a dim")
        for entry in self.manifest["modules"].values():
            if not all(entry[side]["second"] >= 0 and entry[side]["kept"] >= 0 for side in ("right", "left")):
                raise ValueError("a module's singular value or number of directions")
        return {
            f"{name}.{side}": (entry[side]["size"], entry[side]["kept"])
            for name, entry in self.manifest["modules"].items()
            for side in ("right", "left")
            if entry[side]["kept"]
        }

    def sizes(self, rank: int) -> dict[str, NullSizes]:
        """Every target module's sizes at the recipe's ``rank``; those without a rank have to be left out.

        Raises:
            UserError: no module has null directions on both sides.
        """
        modules = self.manifest["modules"]
        found = {
            name: NullSizes.fitted(rank, right=entry["right"]["kept"], left=entry["left"]["kept"])
            for name, entry in modules.items()
        }
        if not any(sizes.rank for sizes in found.values()):
            needs = {name: max(entry[side]["second"] for side in ("right", "left")) for name, entry in modules.items()}
            nearest = min(needs, key=needs.__getitem__)
            raise UserError(
                f"adapter.null_threshold {self.manifest['settings']['threshold']:g}: no target weight has two null "
                f"directions on either side; the nearest, {nearest}, has its second smallest singular value at "
                f"{needs[nearest]:.3g} of the largest: set adapter.null_threshold above that"
            )
        return found

    def left_out(self, rank: int) -> list[str]:
        """The target modules that have no null space to move in."""
        return [name for name, sizes in self.sizes(rank).items() if not sizes.rank]

    def bases(self, module: str, *, device: torch.device) -> tuple[Tensor, Tensor]:
        """V (d_in, k_in) and U (d_out, k_out), sent from rank 0: call it on every rank, in the same order."""
        entry = self.manifest["modules"][module]
        right, left = ((entry[side]["size"], entry[side]["kept"]) for side in ("right", "left"))
        return self.send(f"{module}.right", right, device), self.send(f"{module}.left", left, device)

    def facts(self, rank: int) -> dict[str, Any]:
        """For the report: the threshold, and per module what was found and what rank that leaves."""
        return {
            "threshold": self.manifest["settings"]["threshold"],
            "dim": self.manifest["settings"]["dim"],
            "left_out": self.left_out(rank),
            "modules": {
                name: {"rank": sizes.rank, **self.manifest["modules"][name]} for name, sizes in self.sizes(rank).items()
            },
        }


def weight_null_spaces(
    model: PreTrainedModel,
    checkpoint: BaseFiles,
    groups: Sequence[InputGroup],
    *,
    adapter: AdapterSection,
    section: CalibrationSection,
    device: torch.device,
    parts: Parts | None = None,
) -> WeightNullSpace:
    """Decomposes every target weight; collective.

    Args:
        model: empty, on the meta device, and so again afterwards.
        checkpoint: of the base.
        groups: the target modules.
        adapter: null_dim and null_threshold.
        section: solver (method and placement) and seed.
        device: this rank's.
        parts: keeps the blocks that are done.

    Returns:
        The null spaces, without their key and hashes.

    Raises:
        UserError: a weight is missing or not finite; on every rank, naming it.
        Preempted: a rank was asked to stop; the blocks that are done are on disk, where there are ``parts``.
    """
    tensors: dict[str, Tensor] = {}
    entries: dict[str, Any] = {}
    loads = [0.0] * dist.world_size()
    every = blocks(model)
    bar = tqdm(every, desc="null spaces of the weights", unit="block", disable=not dist.is_main())
    for number, (name, block) in enumerate(bar):
        watch.progress(f"block {number + 1} of {len(every)}")
        if dist.stopping():
            raise Preempted(f"null spaces of the weights: stopped before {name}, as asked; {AGAIN}")
        shapes = [shape for group in groups for shape in group.modules if shape.name.startswith(f"{name}.")]
        owners = _deal(shapes, loads, adapter=adapter, spread=section.solver.placement == "spread")
        part = None if parts is None else parts.read(number)
        if part is None:
            fill_unit(block, name, checkpoint, device=device)
            part = _decompose(name, block, shapes, owners, adapter=adapter, section=section, device=device)
            empty_unit(block)
            if parts is not None:
                parts.write(number, part)
        entries |= part.entries
        tensors |= part.tensors
    settings = {"dim": adapter.null_dim, "threshold": adapter.null_threshold}
    return WeightNullSpace(manifest={"settings": settings, "modules": entries}, tensors=tensors)


def _decompose(
    name: str,
    block: nn.Module,
    shapes: Sequence[LinearShape],
    owners: dict[str, int],
    *,
    adapter: AdapterSection,
    section: CalibrationSection,
    device: torch.device,
) -> Part:
    """The target weights of one block, each by its owner, all sent to rank 0."""
    tensors: dict[str, Tensor] = {}
    mine: dict[str, WeightNull] = {}
    with dist.together(f"decomposing the weights of {name}"):
        for shape in shapes:
            if owners[shape.name] == dist.rank():
                linear = block.get_submodule(shape.name.removeprefix(f"{name}."))
                mine[shape.name] = _solve(shape, linear, adapter=adapter, section=section)
    known: dict[str, Any] = {}
    for found in dist.gather({module: _entry(null) for module, null in mine.items()}):
        known |= found
    entries = {shape.name: known[shape.name] for shape in shapes}
    for shape in shapes:
        for side in ("right", "left"):
            entry = entries[shape.name][side]
            if entry["kept"] == 0:
                continue
            if shape.name in mine:
                basis: Tensor = getattr(mine[shape.name], side).basis.contiguous()
            else:
                basis = torch.empty(entry["size"], entry["kept"], device=device)
            dist.broadcast(basis, source=owners[shape.name])
            if dist.is_main():
                tensors[f"{shape.name}.{side}"] = basis.cpu()
    return Part(entries, tensors)


def _deal(
    shapes: Sequence[LinearShape], loads: list[float], *, adapter: AdapterSection, spread: bool
) -> dict[str, int]:
    """Module → the rank that decomposes it: rank 0, or the costliest first to whoever has the least work so far."""
    if not spread:
        return dict.fromkeys((shape.name for shape in shapes), 0)
    owners = {}
    for shape in sorted(shapes, key=lambda shape: -_cost(shape, adapter.null_dim)):
        owners[shape.name] = min(range(len(loads)), key=loads.__getitem__)
        loads[owners[shape.name]] += _cost(shape, adapter.null_dim)
    return owners


def _cost(shape: LinearShape, dim: int) -> float:
    """Multiply-adds in the order of: a Gram matrix n · d_in · d_out and a few n³, for each Gram that is needed."""
    d_in, d_out = shape.in_features, shape.out_features
    widths = ([d_in] if d_in - d_out < dim else []) + ([d_out] if d_out - d_in < dim else [])
    return sum(float(n) * d_in * d_out + 4.0 * n**3 for n in widths)


def _solve(
    shape: LinearShape, linear: nn.Module, *, adapter: AdapterSection, section: CalibrationSection
) -> WeightNull:
    assert isinstance(linear, FrozenLinear)
    try:
        return weight_null_space(
            linear.dense(linear.weight),
            dim=adapter.null_dim,
            threshold=adapter.null_threshold,
            method=section.solver.method,
            seed=zlib.crc32(f"{section.seed}/{shape.name}".encode()),
        )
    except ValueError as error:
        raise UserError(f"{shape.name}: its null space cannot be computed: {error}") from error


def _entry(found: WeightNull) -> dict[str, Any]:
    """What the manifest says of a module."""

    def side(one: NullSide) -> dict[str, Any]:
        size, kept = one.basis.shape
        largest = float(one.ratios[-1]) if kept else None
        return {"size": size, "kept": kept, "structural": one.structural, "largest": largest, "second": one.second}

    return {"right": side(found.right), "left": side(found.left), "solver": found.method}


def reuse_or_make(
    run: Path,
    checkpoint: BaseFiles,
    arm: Recipe,
    groups: Sequence[InputGroup],
    *,
    model: Callable[[], PreTrainedModel],
    fingerprint: str,
    device: torch.device,
) -> WeightNullSpace:
    """The weights' null spaces in the run's folder where base and settings are the same, else made and kept there.

    Args:
        run: the run's folder.
        checkpoint: of the base.
        arm: the recipe of a Null-LoRA arm; its rank does not count, for smaller ranks use a part of the same spaces.
        groups: the target modules.
        model: builds the empty base.
        fingerprint: the base's.
        device: this rank's.

    Raises:
        UserError: a damaged artifact, or a weight that cannot be decomposed.
    """
    adapter, section = arm.adapter, arm.calibration
    hashes = {
        "base": fingerprint,
        "settings": artifacts.hash_json(
            {
                "base": arm.base_model.model_dump(include={"dtype", "quantization"}),
                "null": [adapter.null_dim, adapter.null_threshold, section.solver.method, section.seed],
                "modules": [shape.name for group in groups for shape in group.modules],
            }
        ),
    }
    digest = artifacts.hash_json(hashes)
    folder = WeightNullSpace.place(run, digest)
    found = store.reusable(folder, digest, WeightNullSpace)
    if found is not None:
        log.info("null spaces of the weights: %s fits base and settings; used again", folder)
        return found
    parts = Parts(run / "calibration" / "weights", digest)
    made = weight_null_spaces(model(), checkpoint, groups, adapter=adapter, section=section, device=device, parts=parts)
    manifest = {"kind": "weight_null_space", "key": digest, "hashes": hashes, **made.manifest}
    found = WeightNullSpace(manifest=manifest, tensors=made.tensors)
    with dist.together("writing the weights' null spaces"):
        if dist.is_main():
            store.save(folder, found)
    parts.clear()
    return found
