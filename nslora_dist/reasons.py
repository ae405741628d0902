"""What an exception means: another rank's end, the person's to mend, or a fault of this program; each in one line."""

import logging
import traceback

from nslora_dist import logs, watch
from nslora_dist.errors import Fault, UserError, known_error, machine_error

log = logging.getLogger("nslora_dist")

LOST_WORDS = (
    "gloo/transport",
    "Connection closed by peer",
    "Connection reset by peer",
    "Timed out waiting",
    "Broken pipe",
    "NCCL error",
    "NCCL communicator",
    "Application timeout caused pair closure",
)


def is_loss(error: BaseException | None) -> bool:
    """Whether a collective failed because of another rank, as gloo, NCCL or the store say it."""
    while error is not None:
        if isinstance(error, UserError) or machine_error(error, "") is not None:
            return False
        if isinstance(error, RuntimeError) and type(error).__module__ in (
            "torch.distributed",
            "torch._C._distributed_c10d",
        ):
            return True
        if isinstance(error, RuntimeError) and any(words in str(error) for words in LOST_WORDS):
            return True
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False


def described(error: BaseException) -> UserError:
    """What a person is told of ``error``, which no other rank is to blame for; the traceback goes to the log."""
    if isinstance(error, UserError):
        return error
    log.error("%s", error, exc_info=error)
    known = known_error(error, str(watch.current()))
    if known is not None:
        return known
    where, text = logs.path(), str(error).strip().partition("\n")[0]
    if where is None:
        logs.say("".join(traceback.format_exception(error)).rstrip())
    kept = "its traceback is above" if where is None else f"traceback in {where}"
    return Fault(f"{watch.current()}: {type(error).__name__}: {text} (a fault of this program; {kept})")


def lost_message(found: str) -> str:
    """The one line about lost or stalled ranks: where this rank was, which ranks, what to do."""
    return f"{watch.current()}: {found}; run the same command again to continue from {watch.continues_from()}"
