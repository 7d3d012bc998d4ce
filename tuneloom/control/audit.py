"""The audit log: entries that are written in the same commit as the change they tell of. No HTTP beyond who asked.

    records.commit(records.keys.replace(stored, key), audit.entry(actor, "api_key.updated", target, {...}))

An action is named in OpenAI's manner: the type of the thing, a dot, what was done. Secrets never go into `data`.
"""

import getpass
import logging
import os
import secrets
import time
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel
from starlette.requests import Request

from tuneloom.domain import Actor, AuditEntry, AuditTarget, Job, Principal, model_name
from tuneloom.store.base import Create, Delete, Range, StoreConflict
from tuneloom.store.records import Records

logger = logging.getLogger(__name__)

# In one commit.
SWEPT = 300


def entry(actor: Actor, action: str, target: AuditTarget, data: Mapping[str, Any] | None = None) -> Create:
    """The write that records an act. A commit that is made again needs no new one, but each act has its own."""
    now = time.time()
    made = AuditEntry(
        # Sorts by time to the microsecond, as the times themselves do.
        id=f"audit_log-{int(now * 1_000_000):016x}{secrets.token_hex(5)}",
        owner=target.owner,
        created_at=now,
        action=action,
        actor=actor,
        target=target,
        data=dict(data or {}),
    )
    return Create(AuditEntry.collection, made.id, made.model_dump(mode="json"))


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


def of_job(actor: Actor, job: Job, participle: str, data: Mapping[str, Any] | None = None) -> Create:
    """The write that records what was done to a job."""
    target = AuditTarget(owner=job.owner, type="fine_tuning.job", id=job.id, name=model_name(job.spec, job.id))
    return entry(actor, f"fine_tuning.job.{participle}", target, data)


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


def cli_actor() -> Actor:
    """Who runs a command on this machine."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError):
        # A container may run under a number that no name belongs to.
        name = str(os.getuid())
    return Actor(kind="cli", id=name)


def changes(before: BaseModel, after: BaseModel, *fields: str) -> dict[str, Any]:
    """Of `fields` those that differ, each as `{"from": ..., "to": ...}`."""
    old, new = before.model_dump(mode="json"), after.model_dump(mode="json")
    return {name: {"from": old[name], "to": new[name]} for name in fields if old[name] != new[name]}
