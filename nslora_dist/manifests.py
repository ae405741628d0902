"""Manifests: the JSON in a folder that says what its files are, and proves every byte of them and of itself."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nslora_dist.artifacts import hash_file, hash_json, read_sealed, write_sealed
from nslora_dist.errors import UserError
from nslora_dist.folders import aside_of

MANIFEST = "manifest.json"


def write_manifest(folder: Path, manifest: Mapping[str, Any], *, files: Mapping[str, Any] | None = None) -> None:
    """Writes ``manifest.json``: ``manifest`` and, under ``files``, SHA-256 and bytes of every other file in the folder.

    It is sealed, so that it proves itself as well.

    Args:
        folder: holds the files.
        manifest: whatever JSON can say.
        files: path in the folder → ``describe_file``, where other processes wrote and hashed them already.

    Raises:
        ValueError: ``manifest`` has a key ``files`` of its own, or NaN or an infinity somewhere.
    """
    if "files" in manifest:
        raise ValueError("the manifest key 'files' is taken: it lists the folder's files")
    if files is None:
        paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
        files = {path.relative_to(folder).as_posix(): describe_file(path) for path in paths}
    write_sealed(folder / MANIFEST, {**manifest, "files": files})


def read_manifest(folder: Path, *, needs: Iterable[str] = ()) -> dict[str, Any]:
    """Reads ``manifest.json`` and verifies it and every file that it lists; files that it does not list are left alone.

    Args:
        folder: what ``write_manifest`` described.
        needs: files that the caller is going to read; a manifest that does not list them is an error.

    Returns:
        What was given to ``write_manifest``, with ``files`` added.

    Raises:
        UserError: the manifest is missing, broken or altered, or a listed file is missing, truncated or altered.
    """
    manifest = open_manifest(folder)
    for name in needs:
        if name not in manifest["files"]:
            raise UserError(f"{folder / MANIFEST}: does not list {name}; delete {folder} and make it again")
    for name, entry in manifest["files"].items():
        wrong = wrong_file(folder, name, entry)
        if wrong:
            raise UserError(f"{folder / name}: {wrong}; delete {folder} and make it again")
    return manifest


def open_manifest(folder: Path) -> dict[str, Any]:
    """Reads ``manifest.json`` alone: its files are not looked at, ``wrong_file`` says of each whether it is whole.

    Raises:
        UserError: the manifest is missing or broken.
    """
    path = folder / MANIFEST
    if not path.exists():
        left = aside_of(folder)
        remedy = f"an interrupted write left the last one at {left}: move it back" if left.exists() else "make it again"
        raise UserError(f"{path}: missing, so the folder is not complete; {remedy}")
    manifest = read_sealed(path, remedy=f"delete {folder} and make it again")
    files = manifest.get("files")
    if not isinstance(files, dict):
        raise UserError(f"{path}: lists no files; delete {folder} and make it again")
    return manifest


def listed_files(folder: Path) -> str:
    """One hash over the hashes of all files that the folder's manifest lists."""
    return hash_json(open_manifest(folder)["files"])


def describe_file(path: Path) -> dict[str, Any]:
    """What ``wrong_file`` compares a file with: its SHA-256 and bytes."""
    return {"sha256": hash_file(path), "bytes": path.stat().st_size}


def wrong_file(folder: Path, name: str, entry: Any, *, by: str = MANIFEST, links: bool = False) -> str:
    """What keeps a file from being the one that was described; empty if nothing does.

    Args:
        folder: where it lies.
        name: its path in there.
        entry: ``describe_file`` of it as it was written.
        by: the file that holds ``entry``, for messages.
        links: whether it may be a link to a place outside the folder, as in a download cache.
    """
    if not isinstance(entry, dict) or not {"sha256", "bytes"} <= entry.keys():
        return f"{by} does not say its sha256 and bytes"
    path = folder / name
    try:
        if not links and not path.resolve().is_relative_to(folder.resolve()):
            return f"{by} lists a path outside its own folder"
        if not path.is_file():
            return "missing"
        size = path.stat().st_size  # before the hash: a truncated file need not be read
        if size != entry["bytes"]:
            return f"{size} bytes, {by} says {entry['bytes']}"
        return "" if hash_file(path) == entry["sha256"] else f"altered: its sha256 is not {by}'s"
    except (OSError, ValueError, RuntimeError) as error:  # no permission; a name with a zero byte; links in a circle
        return f"cannot be read ({getattr(error, 'strerror', None) or error})"
