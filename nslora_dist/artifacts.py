"""What goes to disk: JSON and safetensors, written atomically.

``folders.py`` replaces whole folders, ``manifests.py`` proves what lies in one. A reader finds the old version or the
new one, never half of one. One process writes a given path at a time (rank 0); any number may read.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nslora_dist.errors import UserError

SELF_HASH = "manifest_sha256"
"""Key under which a sealed JSON file keeps the hash of everything else in it."""
CHUNK_BYTES = 1 << 20


def write_json(path: Path, value: Any) -> None:
    """Writes ``value`` as strict, indented JSON, atomically.

    Raises:
        ValueError: it holds NaN or an infinity, which strict JSON cannot say.
        TypeError: it holds something that JSON has no form for.
    """
    write_text(path, _json_text(value))


def write_text(path: Path, text: str) -> None:
    """Writes ``text`` in UTF-8, atomically."""
    with _replaced(path) as partial:
        partial.write_text(text, encoding="utf-8")


def read_json(path: Path) -> Any:
    """Reads a file of strict JSON: no NaN, no infinity, no key twice.

    Raises:
        UserError: the file is missing, unreadable or no JSON.
    """
    return _parse(path, _read_text(path))


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON object that proves itself: ``value``, and under ``manifest_sha256`` the hash of it; atomically.

    Raises:
        ValueError: ``value`` has a key ``manifest_sha256`` of its own, or NaN or an infinity somewhere.
    """
    if SELF_HASH in value:
        raise ValueError(f"the key '{SELF_HASH}' is taken: it holds the hash of the others")
    kept = json.loads(_json_text(value))  # as a reader will find it: keys are texts, tuples lists
    write_json(path, kept | {SELF_HASH: hash_json(kept)})


def read_sealed(path: Path, *, remedy: str) -> dict[str, Any]:
    """Reads what ``write_sealed`` wrote, to the byte: another digit, or a blank more, is an error.

    Args:
        path: the file.
        remedy: what the person is to do about a file that is not as it was written.

    Returns:
        What was given to ``write_sealed``.

    Raises:
        UserError: the file is missing, broken, altered, or not sealed.
    """
    text = _read_text(path)
    value = _parse(path, text, remedy=remedy)
    if not isinstance(value, dict):
        raise UserError(f"{path}: lists no files, it is no JSON object; {remedy}")
    stated = value.pop(SELF_HASH, None)
    if stated is None:
        raise UserError(f"{path}: has no {SELF_HASH} (an older version's, or somebody's own); {remedy}")
    try:
        intact = stated == hash_json(value) and text == _json_text(value | {SELF_HASH: stated})
    except (ValueError, RecursionError):  # 1e999 is an infinity
        intact = False
    if not intact:
        raise UserError(f"{path}: altered, its {SELF_HASH} is not that of its contents; {remedy}")
    return value


def _json_text(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")  # not read_text: it makes a carriage return another byte
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: broken JSON ({error}); delete it and make it again") from error


def _parse(path: Path, text: str, *, remedy: str = "delete it and make it again") -> Any:
    try:
        return json.loads(text, parse_constant=_no_constant, object_pairs_hook=_no_key_twice)
    except ValueError as error:
        raise UserError(f"{path}: broken JSON ({error}); {remedy}") from error
    except RecursionError as error:
        raise UserError(f"{path}: broken JSON (nested too deeply); {remedy}") from error


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key '{next(key for key in keys if keys.count(key) > 1)}' stands there twice")
    return found


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes ``tensors`` as safetensors, atomically, dtypes and values unchanged.

    Args:
        path: the file to write.
        tensors: whole tensors of any shape, dtype, device and layout in memory; tied ones are written out once each.
        metadata: text kept in the file's header, beside ``format: pt``.
    """
    ready: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        copy = tensor.detach().to("cpu").contiguous()
        storage = copy.untyped_storage().data_ptr()
        if storage in storages:  # safetensors refuses two names for one piece of memory
            copy = copy.clone()
        storages.add(storage)
        ready[name] = copy
    with _replaced(path) as partial:
        save_file(ready, partial, metadata={"format": "pt"} | dict(metadata or {}))


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Reads a safetensors file onto the CPU.

    Raises:
        UserError: the file is missing, truncated or no safetensors file.
    """
    try:
        return load_file(path, device="cpu")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error
    except Exception as error:  # a header can name a dtype or a size that Python's side of safetensors stumbles over
        said = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: no whole safetensors file ({said}); delete it and make it again") from error


def hash_file(path: Path) -> str:
    """The file's SHA-256 in hexadecimal, read in pieces of a mebibyte."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def hash_json(value: Any) -> str:
    """SHA-256 of ``value``'s canonical JSON: key order, tuple or list, and layout do not count; 1 and 1.0 differ.

    Raises:
        ValueError: it holds NaN or an infinity.
        TypeError: it holds something that JSON has no form for.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def partial_beside(path: Path) -> Path:
    """Where what is to become ``path`` is written: a fixed name, of which a writer that was killed leaves one."""
    return path.with_name(f".{path.name}.partial")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Gives errors of writing the name of the file: write() and fsync() find a disk full without one."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if getattr(error, "filename", None) is None:
            error.filename = str(path)  # type: ignore[union-attr]
        raise


@contextmanager
def _replaced(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that replaces it when the block ends well."""
    partial = partial_beside(path)
    if partial.is_symlink():
        partial.unlink()  # or the text would go where it points
    try:
        with naming(path):
            yield partial
        sync(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Waits until a file's or a folder's contents are on the disk and not merely in the system's cache."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(handle)
    finally:
        os.close(handle)
