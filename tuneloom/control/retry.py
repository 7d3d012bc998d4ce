"""Decisions taken again when another writer was faster."""

import random
import time
from collections.abc import Callable
from typing import TypeVar

from tuneloom.store.base import StoreConflict

ATTEMPTS = 8
FIRST_PAUSE_S = 0.005

T = TypeVar("T")


def retry(once: Callable[[], T]) -> T:
    """Run `once`, which reads, decides and commits, again while its commit conflicts; a bounded number of times."""
    for attempt in range(ATTEMPTS - 1):
        try:
            return once()
        except StoreConflict:
            # Writers that conflicted once would meet again in step.
            time.sleep(random.uniform(0, FIRST_PAUSE_S * 2**attempt))
    return once()
