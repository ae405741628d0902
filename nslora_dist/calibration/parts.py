"""The blocks of a calibration that are done, on disk, so that a killed pass goes on behind them.

    calibration/block-12/block.safetensors   the block's tensors, as they will lie in the finished artifact
    calibration/block-12/manifest.json       key, the block's entries, hashes

Hidden states are not kept: a pass that goes on runs its texts through the blocks that are done once more, without
Grams and solutions. At 70B that reads the checkpoint (141 GB) and costs a forward pass, 2 · 70e9 · tokens operations,
a minute on eight GPUs for 256 sequences; keeping the hidden states would write 8.6 GB behind each of 80 blocks.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from nslora_dist import artifacts, dist, folders, manifests
from nslora_dist.errors import UserError

FILE = "block.safetensors"
AGAIN = "the same command continues behind the blocks that are done"


@dataclass(frozen=True)
class Part:
    """One block's share of the artifact: entries on every rank, tensors on rank 0 alone."""

    entries: dict[str, Any]
    tensors: dict[str, Tensor]


class Parts:
    """The done blocks of one pass, ``folder/block-N``; every method is collective."""

    def __init__(self, folder: Path, key: str) -> None:
        """``key`` is that of the artifact: blocks of another base, other texts or settings are not taken up."""
        self.folder, self.key = folder, key

    def read(self, number: int) -> Part | None:
        """Block ``number`` where it is done and whole; a damaged one is done again, for it is nobody's only copy."""
        found: Part | None = None
        with dist.together("reading a calibrated block"):
            if dist.is_main():
                found = self._read(self._of(number))
        entries: Any = dist.share(None if found is None else found.entries)
        return found if found is not None or entries is None else Part(entries, {})

    def _read(self, folder: Path) -> Part | None:
        if not folder.is_dir():
            return None
        try:
            manifest = manifests.read_manifest(folder)
            same = manifest.get("kind") == "calibrated_block" and manifest.get("key") == self.key
            if not same:
                return None
            # Copies, for what is read lies in the mapped file, and the folder is deleted before they are.
            tensors = {name: tensor.clone() for name, tensor in artifacts.load_tensors(folder / FILE).items()}
            return Part(manifest["entries"], tensors)
        except UserError:
            return None

    def write(self, number: int, part: Part) -> None:
        """Keeps a block."""
        with dist.together("keeping a calibrated block"):
            if dist.is_main():
                with folders.replace_folder(self._of(number)) as fresh:
                    artifacts.save_tensors(fresh / FILE, part.tensors)
                    manifest = {"kind": "calibrated_block", "key": self.key, "entries": part.entries}
                    manifests.write_manifest(fresh, manifest)

    def clear(self) -> None:
        """Deletes them, once the artifact is whole on disk."""
        with dist.together("clearing calibrated blocks"):
            if dist.is_main() and self.folder.is_dir():
                folders.discard(self.folder)
                with contextlib.suppress(OSError):  # the other pass's blocks may lie there
                    self.folder.parent.rmdir()

    def _of(self, number: int) -> Path:
        return self.folder / f"block-{number}"
