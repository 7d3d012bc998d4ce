"""Entries of the audit log, as writes: whoever changes something commits its entry with the change. No HTTP.

    records.commit(records.keys.replace(stored, key), audit_log.entry(actor, "api_key.updated", target, {...}))

An action is named in OpenAI's manner: the type of the thing, a dot, what was done. Secrets never go into `data`.
"""

import getpass
import os
import secrets
import time
from collections.abc import Mapping
from typing import Any

from tuneloom.domain import Actor, AuditEntry, AuditTarget, Job, model_name
from tuneloom.store.base import Create


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


def of_job(actor: Actor, job: Job, participle: str, data: Mapping[str, Any] | None = None) -> Create:
    """The write that records what was done to a job."""
    target = AuditTarget(owner=job.owner, type="fine_tuning.job", id=job.id, name=model_name(job.spec, job.id))
    return entry(actor, f"fine_tuning.job.{participle}", target, data)


def cli_actor() -> Actor:
    """Who runs a command on this machine."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError):
        # A container may run under a number that no name belongs to.
        name = str(os.getuid())
    return Actor(kind="cli", id=name)
