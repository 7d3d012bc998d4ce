"""Drafts that ended long ago are removed; their Files, with what is known of their rows, stay."""

import logging

from tuneloom.store import Store
from tuneloom.store.base import Range, StoreConflict

logger = logging.getLogger(__name__)

BATCH = 100


def sweep_drafts(store: Store, before: float) -> None:
    """Remove drafts that had ended at that time; a hundred at most."""
    records = store.records
    for stored in records.drafts.query(order_by="finished_at", bounds=Range(at_most=before), limit=BATCH):
        draft = stored.value
        if draft.is_open:
            # Control has still to tidy up behind it.
            continue
        # What a drafter wrote that was killed before it could note or drop it.
        for blob in store.blobs.list(f"drafts/{draft.id}"):
            store.blobs.delete(blob.key)
        try:
            records.commit(records.drafts.delete(stored))
        except StoreConflict:
            logger.info("another one removes the draft: %s", draft.id)
