"""What an adapter was made on, in a file beside it: tools that merge adapters compare it before they compute."""

from dataclasses import asdict, dataclass
from pathlib import Path

from nslora_dist.artifacts import read_json, write_json
from nslora_dist.errors import UserError

PROVENANCE_FILE = "nslora.json"


@dataclass(frozen=True)
class Provenance:
    """Where an adapter comes from.

    Attributes:
        base: sha256 fingerprint of the base checkpoint (``Checkpoint.fingerprint``).
        calibration: hash over the calibration that fixed its A; None for an adapter without one.
        base_model: hub name or folder of the base, for messages.
    """

    base: str
    calibration: str | None
    base_model: str


def write_provenance(folder: Path, provenance: Provenance) -> None:
    """Writes ``nslora.json`` into an adapter's folder, atomically."""
    write_json(folder / PROVENANCE_FILE, asdict(provenance))


def read_provenance(folder: Path) -> Provenance | None:
    """Reads ``nslora.json``.

    Returns:
        None where there is no such file: an adapter of another project.

    Raises:
        UserError: the file is broken or lacks a value.
    """
    path = folder / PROVENANCE_FILE
    if not path.exists():
        return None
    value = read_json(path)
    texts = [value.get(key) for key in ("base", "base_model")] if isinstance(value, dict) else [None]
    if not all(isinstance(text, str) for text in texts) or not isinstance(value.get("calibration"), str | None):
        raise UserError(
            f"{path}: wants the texts 'base' and 'base_model' and a text or null 'calibration'; export it again"
        )
    return Provenance(value["base"], value["calibration"], value["base_model"])
