"""A file as a lock between the processes of a machine. It ends with the process that holds it, however that ends."""

import contextlib
import fcntl
import time
from collections.abc import Iterator
from pathlib import Path

POLL_S = 0.05


@contextlib.contextmanager
def alone(path: Path, wait_s: float, refusal: Exception) -> Iterator[None]:
    """Hold the lock file `path`, which stays. Raises `refusal` if another process holds it for longer than `wait_s`."""
    with path.open("a") as lock:
        deadline = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise refusal from None
                time.sleep(POLL_S)
        yield
