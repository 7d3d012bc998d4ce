"""Counts that hold: of two creates of one kind by one owner at the same moment, one is decided again."""

import time

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
