"""Folders replaced whole, or deleted: a reader finds the old one or the new one, never half of one.

One process does so with a given folder at a time; its contents may come from several.
"""

import errno
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nslora_dist.artifacts import partial_beside, sync
from nslora_dist.errors import UserError

log = logging.getLogger("nslora_dist")


@contextmanager
def replace_folder(target: Path) -> Iterator[Path]:
    """Yields a fresh folder beside ``target`` which takes its place when the block ends well, and vanishes otherwise.

    The old folder is moved aside before the new one is renamed, and deleted only afterwards: whenever the process dies,
    the old or the new contents are whole on disk. What a dead process left behind is put back, or cleared, on entry.
    A link is followed: the folder that it points to is replaced.

    Raises:
        UserError: ``target`` is a file.
    """
    partial = open_partial(target)
    try:
        yield partial
        take_place(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def open_partial(target: Path) -> Path:
    """The first half of ``replace_folder``, for contents that come from several processes: an empty folder beside it.

    Raises:
        UserError: ``target`` is a file.
    """
    target = target.resolve()
    if target.exists() and not target.is_dir():
        raise UserError(f"{target}: is a file, and a folder has to be written there; move it away")
    target.parent.mkdir(parents=True, exist_ok=True)
    # Fixed names, not random ones: a writer that was killed leaves at most one of each, and the next one finds them.
    partial, aside = partial_beside(target), _aside(target)
    for path in (partial, aside):
        if path.is_symlink():  # nobody's writer makes one; what it points to stays
            path.unlink()
    if aside.exists():
        if target.exists():
            discard(aside)
        else:
            aside.rename(target)
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir()
    return partial


def partial_of(target: Path) -> Path:
    """The folder that ``open_partial`` makes for ``target``."""
    return partial_beside(target.resolve())


def aside_of(target: Path) -> Path:
    """Where an older folder waits while ``target`` is replaced."""
    return _aside(target.resolve())


def take_place(target: Path) -> None:
    """The second half: the folder that ``open_partial`` gave takes ``target``'s place, whole or not at all."""
    target = target.resolve()
    partial, aside = partial_beside(target), _aside(target)
    _sync_tree(partial)
    if target.exists():
        target.rename(aside)
    try:
        partial.rename(target)
    except BaseException:
        if aside.exists():
            aside.rename(target)
        raise
    sync(target.parent)
    if aside.exists():
        discard(aside)


def remove_folder(target: Path) -> None:
    """Deletes a folder: renamed first, so that a process that dies in the middle leaves none of that name in parts."""
    aside = _aside(target)
    if not aside.exists() or discard(aside):
        target.rename(aside)
        discard(aside)


def discard(folder: Path) -> bool:
    """Deletes a folder that nobody needs; whether it is gone.

    A network file system keeps, under another name, a file that some process still has open, and the folder with it:
    that is worth no job's life, and for another time.
    """
    try:
        shutil.rmtree(folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EBUSY):
            raise
        log.info("%s: cannot be deleted yet (%s)", folder, error.strerror)
    return not folder.exists()


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)
