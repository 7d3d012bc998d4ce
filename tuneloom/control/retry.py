"""Decisions taken again when another writer was faster."""

import random
import time
from collections.abc import Callable
from typing import TypeVar

from tuneloom.store.base import StoreConflict

ATTEMPTS = 8
FIRST_PAUSE_S, MAX_PAUSE_S = 0.005, 1.0

T = TypeVar("T")


def retry(once: Callable[[], T]) -> T:
    """Run `once`, which reads, decides and commits, again while its commit conflicts; a bounded number of times."""
    for attempt in range(ATTEMPTS - 1):
        started = time.monotonic()
        try:
            return once()
        except StoreConflict:
            # Writers that conflicted once would meet again in step, unless they part by longer than a try takes.
            took_s = max(FIRST_PAUSE_S, time.monotonic() - started)
            time.sleep(random.uniform(0, min(MAX_PAUSE_S, took_s * 2**attempt)))
    return once()
