"""What happens to the disk under a run: called in a rank, right before one of its file operations."""

import os
from pathlib import Path

BALLAST = "ballast"


def spoil(how: str, output: Path, touched: Path) -> None:
    """Spoils the disk.

    Args:
        how: ``full``: not a byte is left on the file system; ``forbidden``: the folder of the touched file loses its
            write permission; ``read-only``: an ext4 file system finds itself damaged and becomes read-only.
        output: the run's folder.
        touched: what the rank is about to write.
    """
    match how:
        case "full":
            fill(output.parent / BALLAST)
        case "forbidden":
            folder = next(parent for parent in (touched.parent, *touched.parents) if parent.is_dir())
            folder.chmod(0o555)
        case "read-only":
            device = os.stat(output).st_dev
            name = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve().name
            Path(f"/sys/fs/ext4/{name}/trigger_fs_error").write_text("made up by a test")


def fill(path: Path) -> None:
    """Writes until nothing more can be written."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        for size in (2**20, 4096, 1):
            try:
                while True:
                    os.write(handle, bytes(size))
            except OSError:
                continue
    finally:
        os.close(handle)
