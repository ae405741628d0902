"""What an adapter was made on, and what its files were, in a file beside them.

Tools that merge adapters compare the one before they compute; whoever reads such a folder verifies the other.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nslora_dist.artifacts import read_sealed, write_sealed
from nslora_dist.errors import UserError
from nslora_dist.manifests import describe_file, wrong_file

PROVENANCE_FILE = "nslora.json"
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
UPDATE_GRAMS_FILE = "update_grams.safetensors"
PROVEN = (CONFIG_FILE, WEIGHTS_FILE, UPDATE_GRAMS_FILE)
"""What is hashed; the card, README.md, is people's to edit."""
REMEDY = (
    f"fetch or export the adapter again; or, if that was on purpose, delete {PROVENANCE_FILE}: the folder then counts "
    "as any other project's adapter"
)


@dataclass(frozen=True)
class Provenance:
    """Where an adapter comes from.

    Attributes:
        base: sha256 fingerprint of the base checkpoint (``BaseFiles.fingerprint``).
        calibration: hash over the calibration that fixed its A; None for an adapter without one.
        base_model: hub name or folder of the base, for messages.
    """

    base: str
    calibration: str | None
    base_model: str


def write_provenance(folder: Path, provenance: Provenance) -> None:
    """Writes ``nslora.json`` into an adapter's folder, atomically; after the files that it is to prove."""
    files = {name: describe_file(folder / name) for name in PROVEN if (folder / name).exists()}
    write_sealed(folder / PROVENANCE_FILE, asdict(provenance) | {"files": files})


def read_provenance(folder: Path) -> Provenance | None:
    """Reads ``nslora.json``; the files that it describes are ``verify_files``'s to look at.

    Returns:
        None where there is no such file: an adapter of another project.

    Raises:
        UserError: the file is broken or altered, or lacks a value.
    """
    value = _read(folder)
    return None if value is None else Provenance(value["base"], value["calibration"], value["base_model"])


def verify_files(folder: Path) -> None:
    """Compares an adapter's files with what ``nslora.json`` says of them; without one there is nothing to compare.

    Raises:
        UserError: one is missing, truncated, altered or was not there when the adapter was written.
    """
    value = _read(folder)
    if value is None:
        return
    for name in PROVEN:
        if name in value["files"]:
            wrong = wrong_file(folder, name, value["files"][name], by=PROVENANCE_FILE, links=True)
        else:
            wrong = f"{PROVENANCE_FILE} does not list it" if (folder / name).exists() else ""
        if wrong:
            raise UserError(f"{folder / name}: {wrong}; {REMEDY}")


def _read(folder: Path) -> dict[str, Any] | None:
    path = folder / PROVENANCE_FILE
    if not path.exists():
        return None
    value = read_sealed(path, remedy=REMEDY)
    texts = all(isinstance(value.get(key), str) for key in ("base", "base_model"))
    if not texts or not isinstance(value.get("calibration"), str | None) or not isinstance(value.get("files"), dict):
        raise UserError(
            f"{path}: wants the texts 'base' and 'base_model', a text or null 'calibration', and 'files'; {REMEDY}"
        )
    return {"calibration": None} | value
