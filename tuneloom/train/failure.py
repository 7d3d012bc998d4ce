"""Why a run failed, in one true sentence. Maps exceptions to `JobError`s; catches none."""

import errno
import logging
import shutil
from pathlib import Path

from tuneloom.domain import JobError
from tuneloom.errors import TuneloomError
from tuneloom.store.base import StoreRefused

logger = logging.getLogger(__name__)

FULL_DISK_BYTES = 64 << 20
# Of safetensors and numpy, and of SQLite, which raise errors of their own.
_DISK_TEXTS = ("No space left on device", "database or disk is full")

_SMALLER = (
    "Use shorter rows (`tuneloom.max_length` with `long_rows` `cut`), `tuneloom.quantization`, a lower "
    "`tuneloom.rank`, or a smaller base."
)


class NotFinite(TuneloomError):
    """The loss is no number any more."""

    code = "loss_not_finite"


class BaseUnreadable(TuneloomError):
    """The base's files do not load."""

    code = "base_unreadable"

    @classmethod
    def of(cls, base_id: str, reason: str) -> "BaseUnreadable":
        return cls(f"The base `{base_id}` cannot be loaded ({reason[:300]}). Add it again: `tuneloom bases add`.")


def describe(error: BaseException, home: Path) -> JobError:
    """The job error for what ended a run. `home` is the folder whose disk the run writes to."""
    if isinstance(error, StoreRefused):
        return store_refused(error)
    if isinstance(error, TuneloomError) and error.status != 503:
        return JobError(code=error.code or "server_error", message=error.message, param=error.param)
    if _is_disk_full(error, home):
        return JobError(
            code="disk_full", message=f"The disk of `{home}` is full. Free some space and start the job again."
        )
    if is_out_of_memory(error):
        return JobError(
            code="out_of_memory",
            message=f"The run needs more memory than there is, even with one row at a time. {_SMALLER}",
        )
    return JobError(code="internal_error", message=f"The run ended with {type(error).__name__}: {str(error)[:500]}")


def store_refused(error: StoreRefused) -> JobError:
    """The reason is for the operator and goes to the log: it names what an owner has no part in."""
    logger.error("the store refuses this process: %s", error.message)
    return JobError(
        code="store_unavailable",
        message="The server could not get at its store. Its operator finds why in the log; create the job again.",
    )


def worker_lost(restarts: int) -> JobError:
    return JobError(
        code="worker_lost",
        message=f"The training process died {restarts} times and gave no reason; often the machine has run out of "
        f"memory. {_SMALLER}",
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on the device or in host memory."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    # torch's CPU allocator raises a plain RuntimeError.
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)


def _is_disk_full(error: BaseException, home: Path) -> bool:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(text in str(cause) for text in _DISK_TEXTS):
            return True
        cause = cause.__cause__ or cause.__context__
    # The writer of torch says only that it failed.
    return isinstance(error, Exception) and shutil.disk_usage(home).free < FULL_DISK_BYTES
