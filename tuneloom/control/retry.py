"""Decisions taken again when another writer was faster."""

from collections.abc import Callable
from typing import TypeVar

from tuneloom.store.base import StoreConflict

ATTEMPTS = 8

T = TypeVar("T")


def retry(once: Callable[[], T]) -> T:
    """Run `once`, which reads, decides and commits, again while its commit conflicts; a bounded number of times."""
    for _ in range(ATTEMPTS - 1):
        try:
            return once()
        except StoreConflict:
            continue
    return once()
