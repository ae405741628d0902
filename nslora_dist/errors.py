"""Errors meant for the person who started the run, and the exit statuses of every launch script."""

import errno
import os
import re

EXIT_BUG = 1
"""A fault of this program: a traceback is in the rank's log."""

EXIT_USER_ERROR = 2
"""The recipe, a file or the data is at fault: one line on rank 0 says which value, where it came from, what to do."""

EXIT_STORAGE = 74
"""A file could not be written: disk full, read-only, permission lost. What was written before is intact."""

EXIT_PREEMPTED = 75
"""Asked to stop (SIGTERM): the state is on disk, and the same command continues."""

EXIT_RANK_LOST = 76
"""Another rank died, was cut off or stalled; the same command continues from the last checkpoint."""


def _visible(sign: str) -> str:
    return " " if sign.isspace() else sign.encode("unicode_escape").decode()


class UserError(ValueError):
    """A mistake the user can mend; shown as one line, without a traceback, and ends every rank with its status."""

    status = EXIT_USER_ERROR
    silent = False
    """Whether another rank says it."""

    def __init__(self, message: str = "") -> None:
        """Keeps the message in one line: values and other packages' words in it may hold breaks and control codes."""
        super().__init__("".join(sign if sign.isprintable() else _visible(sign) for sign in str(message)))


class StorageError(UserError):
    """A file could not be written; the message names it and says what is still good."""

    status = EXIT_STORAGE


class Preempted(UserError):
    """The job was asked to stop and has put its state on disk."""

    status = EXIT_PREEMPTED


class RankLost(UserError):
    """Another rank is gone or does not answer; the message names it and the phase."""

    status = EXIT_RANK_LOST


class Fault(UserError):
    """A fault of this program, not the person's: said in one line, with the traceback in the rank's log."""

    status = EXIT_BUG


BY_STATUS = {kind.status: kind for kind in (Fault, UserError, StorageError, Preempted, RankLost)}
"""How a status that came from another rank is raised here."""

STORAGE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
REMEDIES = {
    errno.ENOSPC: "free some disk space",
    errno.EDQUOT: "free some of your quota",
    errno.EROFS: "mount it for writing",
    errno.EACCES: "give the permission back",
    errno.EPERM: "give the permission back",
    errno.EIO: "check that disk",
}


def unwritable(where: str, error: OSError) -> UserError:
    """What a person is told of ``where``, a value of theirs that names a place at which nothing can be written."""
    said = f"{where}: cannot be written ({error.strerror or error})"
    remedy = REMEDIES.get(error.errno or 0)
    if remedy is None:  # a path that can be none, such as one below a file
        return UserError(f"{said}; give another path")
    return StorageError(f"{said}; {remedy} and run the same command again")


def known_error(error: BaseException, where: str) -> UserError | None:
    """What a person is told of an exception that is no fault of this program, in the phase ``where``; else None."""
    return storage_error(error) or machine_error(error, where)


def machine_error(error: BaseException, where: str) -> UserError | None:
    """What a person is told of memory that is full, or of GPUs that ranks share; None for any other exception.

    Args:
        error: any, NCCL's too, whose cause stands in its last lines; of what is told already nothing is made.
        where: the phase that it came from.
    """
    if isinstance(error, UserError):
        return None
    text = str(error)
    said = text.strip().partition("\n")[0]
    if "Duplicate GPU detected" in text:
        return UserError(
            f"{where}: two ranks have the same GPU (NCCL: Duplicate GPU detected); start one process a GPU, look at "
            "CUDA_VISIBLE_DEVICES on every machine"
        )
    full = type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError)
    if full or re.search(r"out of memory|can't allocate memory|Cannot allocate memory", text):
        return UserError(
            f"{where}: {said or 'no memory is left'}; lower train.micro_batch_size, calibration.batch_size or "
            "evaluation.batch_size, whichever this phase reads, set train.activation_checkpointing: true, or ask "
            "launch/plan.py what fits"
        )
    return None


def storage_error(error: BaseException) -> StorageError | None:
    """What a person is told of a full, read-only, forbidden or broken disk; None for any other exception."""
    if isinstance(error, StorageError):
        return error
    number = error.errno if isinstance(error, OSError) else None
    if number is None and type(error).__name__ == "SafetensorError":  # it carries the system's error as text
        found = re.search(r"code: (\d+)|os error (\d+)", str(error))
        number = int(found[1] or found[2]) if found else None
    if number not in STORAGE_ERRORS:
        return None
    path = getattr(error, "filename", None)
    where = f"{path}: " if path else "a file could not be written: "
    return StorageError(
        f"{where}{os.strerror(number)}; {REMEDIES[number]} and run the same command again: "
        "what was completed before is intact"
    )
