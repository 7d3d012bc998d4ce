"""The audit log of control: entries (`store.audit_log`) with the callers of the API as actors; old ones go."""

import logging
from typing import Any

from pydantic import BaseModel
from starlette.requests import Request

from tuneloom.domain import Actor, AuditEntry, Principal
from tuneloom.store.audit_log import cli_actor, entry, of_job
from tuneloom.store.base import Delete, Range, StoreConflict
from tuneloom.store.records import Records

__all__ = ["SYSTEM", "actor_of", "changes", "cli_actor", "entry", "of_job", "sweep"]

logger = logging.getLogger(__name__)

# Who does what nobody asks for at that moment.
SYSTEM = Actor(kind="system", id="control")

# In one commit.
SWEPT = 300


def sweep(records: Records, before: float) -> None:
    """Remove the oldest entries that were made before that time; a few hundred at most."""
    old = records.audit_entries.query(order_by="created_at", bounds=Range(below=before), limit=SWEPT)
    writes = [Delete(AuditEntry.collection, stored.value.id) for stored in old]
    if not writes:
        return
    try:
        records.commit(*writes)
    except StoreConflict:
        logger.info("another one sweeps the audit log")


def actor_of(request: Request) -> Actor:
    """Who sends a request, as its Principal says."""
    principal: Principal = request.state.principal
    # What stands behind trusted proxies is known to whoever counts limits by address.
    address = request.scope["state"].get("address") or (request.client.host if request.client else None)
    return Actor(
        kind=principal.kind,
        id=principal.key_id if principal.kind == "key" else principal.owner,
        owner=principal.owner,
        address=address,
        request_id=request.headers.get("x-request-id"),
    )


def changes(before: BaseModel, after: BaseModel, *fields: str) -> dict[str, Any]:
    """Of `fields` those that differ, each as `{"from": ..., "to": ...}`."""
    old, new = before.model_dump(mode="json"), after.model_dump(mode="json")
    return {name: {"from": old[name], "to": new[name]} for name in fields if old[name] != new[name]}
