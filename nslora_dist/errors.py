"""Errors meant for the person who started the run, and the exit statuses of every launch script."""

EXIT_USER_ERROR = 2
"""The recipe, a file or the data is at fault: one line on rank 0 says which value, where it came from, what to do."""


class UserError(ValueError):
    """A mistake the user can mend; shown as one line, without a traceback, and ends every rank with status 2."""
