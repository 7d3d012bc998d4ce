"""Why a run failed, in one true sentence. Maps exceptions to `JobError`s; catches none."""

import errno
import shutil
from pathlib import Path

from tuneloom.domain import JobError
from tuneloom.errors import TuneloomError

FULL_DISK_BYTES = 64 << 20


class NotFinite(TuneloomError):
    """The loss is no number any more."""

    code = "loss_not_finite"


class BaseUnreadable(TuneloomError):
    """The base's files do not load."""

    code = "base_unreadable"


def describe(error: BaseException, home: Path) -> JobError:
    """The job error for what ended a run. `home` is the folder whose disk the run writes to."""
    if isinstance(error, TuneloomError) and error.status != 503:
        return JobError(code=error.code or "server_error", message=error.message, param=error.param)
    if _is_disk_full(error, home):
        return JobError(
            code="disk_full", message=f"The disk of `{home}` is full. Free some space and start the job again."
        )
    if _is_out_of_memory(error):
        return JobError(
            code="out_of_memory",
            message="The run needs more memory than there is. Use a smaller `batch_size`, a smaller "
            "`tuneloom.max_length` with shorter rows, or a smaller base.",
        )
    return JobError(code="internal_error", message=f"The run ended with {type(error).__name__}: {str(error)[:500]}")


def worker_lost(restarts: int) -> JobError:
    return JobError(
        code="worker_lost",
        message=f"The training process died {restarts} times and gave no reason; often the machine has run out of "
        "memory. Use a smaller `batch_size` or shorter rows.",
    )


def _is_disk_full(error: BaseException, home: Path) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    # The writers of torch and safetensors raise errors of their own, whose texts differ by version.
    return isinstance(error, Exception) and shutil.disk_usage(home).free < FULL_DISK_BYTES


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    # torch's CPU allocator raises a plain RuntimeError.
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)
