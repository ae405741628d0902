"""Errors meant for the person who started the run, and the exit statuses of every launch script."""

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
