"""The null space on disk: ``null_space/null_space.safetensors`` and ``manifest.json``.

Tensors, all float32:

    <group>.basis               (d_in, r)  U, orthonormal columns, ascending eigenvalues
    <group>.eigenvalues         (r,)       of the mixed Gram
    <group>.spectrum            (d_in,)    all eigenvalues, where d_in is small enough to afford them
    <group>.update_gram.<name>  (r, r)     Uᵀ G U per source and probe; C = A G Aᵀ = M (Uᵀ G U) Mᵀ
    <module>.mix                (r, r)     M with A₀ = M Uᵀ: S^½ Rᵀ of docs/methods.md §1b, absent for orthonormal A₀
    <module>.start_B            (d_out, r) B₀ = P S^½, in residual form alone

Keeping M instead of A₀ costs r × r a module where A₀ would cost r × d_in.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from nslora_dist import artifacts, dist, folders, manifests
from nslora_dist.errors import UserError
from nslora_dist.recipe_types import MIXTURE as MIXTURE  # recipes keep it free; whoever reads a null space looks for it


@dataclass(frozen=True)
class ModuleStart:
    """What one adapted module starts from.

    Attributes:
        a: (r, d_in) float32 A₀.
        b: (d_out, r) float32 B₀ in residual form, else None.
        update_grams: name → C = A₀ G A₀ᵀ (r, r) float32.
        references: name → tr(W G Wᵀ).
    """

    a: Tensor
    b: Tensor | None
    update_grams: dict[str, Tensor]
    references: dict[str, float]


@dataclass(frozen=True)
class Stored:
    """Null spaces as they are kept. ``tensors`` is filled on rank 0 alone; the manifest is known everywhere."""

    FOLDER: ClassVar[str]
    FILE: ClassVar[str]
    manifest: dict[str, Any]
    tensors: Mapping[str, Tensor]

    @classmethod
    def place(cls, run: Path, key: str) -> Path:
        """Where one of this ``key`` is kept in a run's folder."""
        return run / cls.FOLDER

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors that a reader needs, and their shapes, as the manifest has them.

        It looks at all else that is read of the manifest as well: what is not there, or of another kind, raises
        KeyError, TypeError, ValueError or AttributeError.
        """
        raise NotImplementedError

    def send(self, name: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """One float32 tensor from rank 0 on every rank: call it on all of them, in the same order."""
        if dist.is_main():
            value = self.tensors[name].to(device)
        else:
            value = torch.empty(shape, dtype=torch.float32, device=device)
        return dist.broadcast(value.contiguous())


S = TypeVar("S", bound=Stored)


@dataclass(frozen=True)
class NullSpace(Stored):
    """A calibrated null space."""

    FOLDER = "null_space"
    FILE = "null_space.safetensors"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors that ``starts`` sends."""
        rank = self.manifest["settings"]["rank"]
        texts = [self.manifest["settings"]["form"], *self.manifest["groups"], *self.manifest["modules"]]
        "".join([text for group in self.manifest["groups"].values() for text in group["modules"]] + texts)
        if not self.manifest["modules"]:
            raise ValueError("no modules")
        sum(value for value in self.leak().values() if value is not None)
        found: dict[str, tuple[int, ...]] = {}
        for module, entry in self.manifest["modules"].items():
            group = entry["group"]
            sum(entry["references"].values())
            found[f"{group}.basis"] = (self.manifest["groups"][group]["in_features"], rank)
            found |= {f"{group}.update_gram.{name}": (rank, rank) for name in entry["references"]}
            if entry["mixed"]:
                found[f"{module}.mix"] = (rank, rank)
            if entry["has_start_b"]:
                found[f"{module}.start_B"] = (entry["out_features"], rank)
        return found

    def starts(self, modules: Iterable[str], *, device: torch.device) -> Iterator[tuple[str, ModuleStart]]:
        """Each module's start, sent from rank 0 to every rank: call it on all of them, in the same order.

        What the modules of a group share travels once, if they follow each other.
        """
        rank = self.manifest["settings"]["rank"]
        last = None
        for module in modules:
            entry = self.manifest["modules"][module]
            group = entry["group"]
            if group != last:
                last, width = group, self.manifest["groups"][group]["in_features"]
                basis = self.send(f"{group}.basis", (width, rank), device)
                small = {
                    name: self.send(f"{group}.update_gram.{name}", (rank, rank), device) for name in entry["references"]
                }
            mix = self.send(f"{module}.mix", (rank, rank), device) if entry["mixed"] else None
            b = self.send(f"{module}.start_B", (entry["out_features"], rank), device) if entry["has_start_b"] else None
            yield (
                module,
                ModuleStart(
                    a=basis.T.contiguous() if mix is None else mix @ basis.T,
                    b=b,
                    update_grams={name: gram if mix is None else mix @ gram @ mix.T for name, gram in small.items()},
                    references=dict(entry["references"]),
                ),
            )

    def leak(self) -> dict[str, float | None]:
        """Mean over groups of the leak on calibration and on held-out tokens, and of a random basis's."""
        groups = self.manifest["groups"].values()
        leaks: dict[str, float | None] = {}
        for kind in ("calibration", "heldout", "random"):
            values = [group["leak"][kind] for group in groups if group["leak"][kind] is not None]
            leaks[kind] = sum(values) / len(values) if values else None
        return leaks


def save(folder: Path, stored: Stored) -> None:
    """Writes the artifact, whole or not at all; on rank 0."""
    with folders.replace_folder(folder) as fresh:
        artifacts.save_tensors(fresh / stored.FILE, stored.tensors)
        manifests.write_manifest(fresh, stored.manifest)


def load(folder: Path, kind: type[S] = NullSpace) -> S:  # type: ignore[assignment]
    """Reads and verifies the artifact; on rank 0.

    Raises:
        UserError: a file is missing, damaged or not as the manifest says.
    """
    manifest = manifests.read_manifest(folder, needs=[kind.FILE])
    found = kind(manifest=manifest, tensors=artifacts.load_tensors(folder / kind.FILE))
    try:
        wanted = found.shapes()
        said = "key" if not isinstance(manifest["key"], str) else ""
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # whole, but written by something else
        raise UserError(
            f"{folder / manifests.MANIFEST}: is not a null space's ({error!r}); give another folder"
        ) from error
    for name, shape in wanted.items():
        tensor = found.tensors.get(name)
        if tensor is None or tensor.dtype != torch.float32 or tuple(tensor.shape) != shape:
            said = name
    if said:
        raise UserError(f"{folder}: its '{said}' is missing or not as {manifests.MANIFEST} says; make it again")
    return found


def reusable(folder: Path, key: str, kind: type[S] = NullSpace) -> S | None:  # type: ignore[assignment]
    """The null space in ``folder`` where it was made from the same base, data and settings; on every rank.

    A damaged one is an error and not silently recomputed, for it may be somebody's only copy.
    """
    found: S | None = None
    with dist.together("reading the null space"):
        if dist.is_main() and (folder / "manifest.json").is_file():
            candidate = load(folder, kind)
            found = candidate if candidate.manifest["key"] == key else None
    manifest: Any = dist.share(found.manifest if found is not None else None)
    if manifest is None:
        return None
    return found if found is not None else kind(manifest=manifest, tensors={})
