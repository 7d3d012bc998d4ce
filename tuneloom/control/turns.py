"""Counts that hold: of two creates of one kind by one owner at the same moment, one is decided again."""

import time
from weakref import WeakValueDictionary

import anyio

from tuneloom.domain import Turn
from tuneloom.store.base import Write
from tuneloom.store.records import Records


def take(records: Records, owner: str, kind: str) -> Write:
    """The write that goes into the commit of a create. Take it before counting what there is.

    That commit conflicts if another one was made since; `retry` then counts anew.
    """
    table, id, now = records.turns, f"{owner}:{kind}", time.time()
    stored = table.find(id)
    if stored is None:
        return table.create(Turn(id=id, owner=owner, at=now))
    return table.replace(stored, stored.value.model_copy(update={"at": now}))


class OwnerLocks:
    """One create of an owner at a time in this process: those that came together would conflict with each other, each
    with all, until some give up. Of one event loop.
    """

    def __init__(self) -> None:
        self._locks: WeakValueDictionary[str, anyio.Lock] = WeakValueDictionary()

    def of(self, owner: str) -> anyio.Lock:
        """The lock of an owner, which lives as long as somebody holds or awaits it."""
        lock = self._locks.get(owner)
        if lock is None:
            lock = self._locks[owner] = anyio.Lock()
        return lock
