"""Owners who leave: their jobs end, then every record and blob of theirs is removed, in rounds that may break off.

A blob goes before the record that names it, so that nothing is left which no record leads to. What is made meanwhile
goes too; that ends when nothing is left and every request that was under way has had its time.
"""

import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

from tuneloom.control import audit, jobs
from tuneloom.control.jobs import History, apply
from tuneloom.control.retry import retry
from tuneloom.control.writer import JobWriter
from tuneloom.domain import (
    UNFINISHED,
    Actor,
    AuditTarget,
    Checkpoint,
    Departure,
    Draft,
    File,
    Job,
    Record,
    UploadPart,
    Version,
)
from tuneloom.errors import TuneloomError
from tuneloom.store import Store
from tuneloom.store.base import StoreConflict, Write
from tuneloom.store.records import Records, Stored, Table

logger = logging.getLogger(__name__)

# Who calls and who is told goes before anything else, what others are found by at the end.
FIRST = ("keys", "webhook_endpoints", "webhook_deliveries")
REST = (
    *("upload_parts", "uploads", "files", "file_checks", "checkpoints", "versions", "models", "registrations"),
    *("adapter_pins", "events", "progress", "speeds", "drafters", "drafts", "repeats", "turns", "jobs"),
)
# What an owner has used and done is the installation's to know, and what limits them is not theirs to remove.
KEPT = ("usage_parts", "usage_folds", "usage_rows", "usage_months", "audit_entries", "owner_limits", "departures")
BATCH = 200
# The loop that does this does other things.
ROUND_S = 5.0
# Longer than any request takes, uploads of files among them.
SETTLE_S = 1800.0


def ask(records: Records, owner: str, actor: Actor) -> Departure:
    """Note that everything of the owner is to be removed; a second wish changes nothing."""

    def once() -> Departure:
        found = records.departures.find(owner)
        if found is not None:
            return found.value
        departure = Departure(id=owner, owner=owner, requested_at=time.time())
        told = audit.entry(actor, "account.deletion_requested", _target(owner))
        records.commit(records.departures.create(departure), told)
        return departure

    return retry(once)


def end_keys(store: Store, owner: str) -> list[str]:
    """Remove the owner's keys, which need not wait for the first round; returns their ids."""
    ids = [stored.value.id for stored in store.records.keys.query({"owner": owner})]
    retry(lambda: _empty(store, owner, ("keys",), lambda: False))
    return ids


def carry_on(store: Store, now: float, clock: Callable[[], float] = time.monotonic) -> None:
    """One round for everybody who leaves; it takes a few seconds at most."""
    deadline = clock() + ROUND_S
    for departure in store.records.departures.query(limit=BATCH):
        if clock() >= deadline:
            return
        try:
            _remove(store, departure, now, lambda: clock() >= deadline)
        except StoreConflict:
            logger.info("a departure met a writer, the next round goes on: %s", departure.value.owner)
        except TuneloomError as error:
            logger.warning("a departure does not get on: %s: %s", departure.value.owner, error.message)


def _remove(store: Store, departure: Stored[Departure], now: float, is_late: Callable[[], bool]) -> None:
    records, owner = store.records, departure.value.owner
    if not _empty(store, owner, FIRST, is_late) or not _end_work(records, owner, now):
        return
    if _empty(store, owner, REST, is_late) and now - departure.value.requested_at >= SETTLE_S:
        told = audit.entry(audit.SYSTEM, "account.deleted", _target(owner))
        records.commit(records.departures.delete(departure), told)
        logger.info("everything of an owner is removed: %s", owner)


def _end_work(records: Records, owner: str, now: float) -> bool:
    """End the owner's jobs and drafts; whether no process of theirs is left."""
    writer = JobWriter(records, lambda: now)
    for state in UNFINISHED:
        for stored in records.jobs.query({"owner": owner, "state": state}, limit=BATCH):
            after = apply(stored.value, jobs.Cancelled(now))
            writer.commit(stored, after, [History(after, now).line("The job was cancelled: its owner leaves")])
    drafts = records.drafts.query({"owner": owner, "is_open": True}, limit=BATCH)
    for draft in drafts:
        if draft.value.cancel_requested_at is None:
            ended = draft.value.model_copy(update={"cancel_requested_at": now})
            records.commit(records.drafts.replace(draft, ended))
    return not drafts and not records.jobs.query({"owner": owner, "attempt_open": True}, limit=1)


def _empty(store: Store, owner: str, names: tuple[str, ...], is_late: Callable[[], bool]) -> bool:
    """Remove what the owner has in those tables; False if time was over before."""
    for name in names:
        table: Table[Any] = getattr(store.records, name)
        while found := table.query({"owner": owner}, limit=BATCH):
            done: list[Write] = []
            for stored in found:
                for key in _blobs_of(store, stored.value):
                    store.blobs.delete(key)
                done.append(table.delete(stored))
                if is_late():
                    break
            store.records.commit(*done)
            if is_late():
                return False
    return True


def _blobs_of(store: Store, record: Record) -> Iterator[str]:
    if isinstance(record, File | UploadPart):
        yield record.blob
    elif isinstance(record, Version | Checkpoint):
        yield from (blob.key for blob in store.blobs.list(record.adapter.uri))
    elif isinstance(record, Job):
        yield from (blob.key for blob in store.blobs.list(f"jobs/{record.id}"))
    elif isinstance(record, Draft):
        yield from (blob.key for blob in store.blobs.list(f"drafts/{record.id}"))


def _target(owner: str) -> AuditTarget:
    return AuditTarget(owner=owner, type="account", id=owner)
