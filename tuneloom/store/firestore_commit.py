"""A commit as Firestore takes it, and what is known of the fields that it adds to."""

import re
import secrets
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

from tuneloom.store.base import Create, Delete, Increment, Replace, StoreConflict, Write
from tuneloom.store.firestore_values import COMMIT, path_of, to_fields, to_value

MAX_KNOWN_NUMBERS = 10_000

_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d{1,9})?Z")


class Attempt:
    """One commit, under an id of its own.

    Raises:
        StoreConflict: a revision is none of Firestore's.
    """

    def __init__(self, root: str, writes: Sequence[Write]) -> None:
        self.id = secrets.token_hex(8)
        self.keys = [(write.collection, write.id) for write in writes]
        self.written = [(write.collection, write.id) for write in writes if not isinstance(write, Delete)]
        # One write that cannot hold twice is enough: all are applied or none. Deletes alone do no harm twice.
        self.is_repeatable = any(_holds_once(write) for write in writes) or not self.written
        self.body = {"writes": [self._write(root, write) for write in writes]}

    @property
    def names(self) -> str:
        listed = ", ".join(f"`{collection}/{id}`" for collection, id in self.keys[:3])
        return f"One of {listed}{' and others' if len(self.keys) > 3 else ''}" if len(self.keys) > 1 else listed

    def revs(self, answer: dict[str, Any]) -> dict[tuple[str, str], str]:
        times = [result.get("updateTime", answer["commitTime"]) for result in answer["writeResults"]]
        revs = dict(zip(self.keys, times, strict=True))
        return {key: revs[key] for key in self.written}

    def _write(self, root: str, write: Write) -> dict[str, Any]:
        name = f"{root}/{write.collection}/{write.id}"
        match write:
            case Create():
                fields = to_fields(write.id, write.data, self.id)
                return {"update": {"name": name, "fields": fields}, "currentDocument": {"exists": False}}
            case Replace():
                fields = to_fields(write.id, write.data, self.id)
                return {"update": {"name": name, "fields": fields}, "currentDocument": _at_rev(write)}
            case Delete():
                return {"delete": name, "currentDocument": _at_rev(write) if write.rev else {"exists": True}}
            case Increment():
                return {
                    "update": {"name": name, "fields": {COMMIT: to_value(self.id)}},
                    "updateMask": {"fieldPaths": [COMMIT]},
                    "updateTransforms": [{"fieldPath": path_of(write.field), "increment": to_value(write.by)}],
                    "currentDocument": {"exists": True},
                }


class KnownNumbers:
    """Fields that this process has seen to hold a number, or to be absent; the latest `MAX_KNOWN_NUMBERS` documents."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._fields: OrderedDict[tuple[str, str], set[str]] = OrderedDict()

    def __contains__(self, write: Increment) -> bool:
        return write.field in self._fields.get((write.collection, write.id), ())

    def learn(self, write: Increment) -> None:
        with self._lock:
            self._fields.setdefault((write.collection, write.id), set()).add(write.field)
            if len(self._fields) > MAX_KNOWN_NUMBERS:
                self._fields.popitem(last=False)

    def forget(self, writes: Iterable[Write]) -> None:
        with self._lock:
            for write in writes:
                self._fields.pop((write.collection, write.id), None)


def _holds_once(write: Write) -> bool:
    """Whether the write, once applied, makes itself impossible."""
    return isinstance(write, Create | Replace) or (isinstance(write, Delete) and write.rev is not None)


def _at_rev(write: Replace | Delete) -> dict[str, Any]:
    if write.rev is None or not _TIME.fullmatch(write.rev):
        raise StoreConflict(f"`{write.collection}/{write.id}` changed or is gone.")
    return {"updateTime": write.rev}
