"""Removes what has had its time: expired files and uploads, rows of repetition. Each step may be done again."""

import logging
import time
from collections.abc import Callable

from tuneloom.config import UsageSettings
from tuneloom.control import audit, departures, files, repeat
from tuneloom.control.drafting.retention import sweep_drafts
from tuneloom.store import Store
from tuneloom.store.base import Range, StoreConflict, Write
from tuneloom.store.usage_rollup import drop_old, roll_up

logger = logging.getLogger(__name__)

BATCH = 200
DAY_S = 24 * 3600.0
# An upload that is over stays visible as such for a while.
UPLOAD_MEMORY_S = DAY_S
# What a file check found is read at once, and made anew if asked for later.
FILE_CHECK_MEMORY_S = 600.0
# How long after a job's end its states are looked for; the trainer removes them itself where it has the last word.
STATES_SWEEP_S = DAY_S


def sweep(store: Store, clock: Callable[[], float] = time.time, *, audit_days: int = 400, draft_days: int = 90) -> None:
    """One round; a few hundred records of each kind at most.

    Entries of the audit log are kept for `audit_days`, drafts that have ended for `draft_days`.
    """
    now = clock()
    sweep_drafts(store, now - draft_days * DAY_S)
    audit.sweep(store.records, now - audit_days * DAY_S)
    for step in (_sweep_files, _sweep_uploads, _sweep_repeats, _sweep_file_checks, _sweep_states, departures.carry_on):
        try:
            step(store, now)
        except StoreConflict:
            logger.info("sweep met a writer, the next round goes on: %s", step.__name__)


def sweep_usage(store: Store, settings: UsageSettings, clock: Callable[[], float] = time.time) -> None:
    """Fold what was used in past hours, and remove what is kept no longer; some seconds of a busy hour at once."""
    now = clock()
    roll_up(store.records, now)
    drop_old(store.records, now, keep_s=settings.retention_days * DAY_S)


def _sweep_files(store: Store, now: float) -> None:
    for stored in store.records.files.query(order_by="expires_at", bounds=Range(at_most=now), limit=BATCH):
        file = stored.value
        if file.expires_at is None or files.users_of(store.records, file.owner, file.id):
            continue
        told = files.told(audit.SYSTEM, "deleted", file, expired=True)
        store.records.commit(store.records.files.delete(stored), told)
        store.blobs.delete(file.blob)
        logger.info("expired file removed: %s", file.id)


def _sweep_uploads(store: Store, now: float) -> None:
    over = store.records.uploads.query(order_by="expires_at", bounds=Range(at_most=now), limit=BATCH)
    for stored in over:
        upload = stored.value
        if upload.status == "pending":
            expired = upload.model_copy(update={"status": "expired"})
            store.records.commit(store.records.uploads.replace(stored, expired))
        elif upload.expires_at <= now - UPLOAD_MEMORY_S:
            files.drop_parts(store, upload.id)
            store.records.commit(store.records.uploads.delete(stored))
        else:
            files.drop_parts(store, upload.id)


def _sweep_repeats(store: Store, now: float) -> None:
    bounds = Range(at_most=now - repeat.KEY_LIFE_S)
    old = store.records.repeats.query(order_by="created_at", bounds=bounds, limit=BATCH)
    writes: list[Write] = [store.records.repeats.delete(stored) for stored in old]
    if writes:
        store.records.commit(*writes)


def _sweep_file_checks(store: Store, now: float) -> None:
    bounds = Range(at_most=now - FILE_CHECK_MEMORY_S)
    old = store.records.file_checks.query(order_by="finished_at", bounds=bounds, limit=BATCH)
    writes: list[Write] = [store.records.file_checks.delete(s) for s in old if s.value.finished_at is not None]
    if writes:
        store.records.commit(*writes)


def _sweep_states(store: Store, now: float) -> None:
    """Remove what ended jobs had stored to go on from."""
    bounds = Range(at_least=now - STATES_SWEEP_S)
    ended = store.records.jobs.query(order_by="finished_at", descending=True, bounds=bounds, limit=BATCH)
    for stored in ended:
        # A process that is still alive may be writing there.
        if stored.value.is_terminal and not stored.value.attempt_open:
            for blob in store.blobs.list(f"jobs/{stored.value.id}/states"):
                store.blobs.delete(blob.key)
