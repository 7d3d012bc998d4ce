"""What owners may use: set by admins, read where it is enforced here. Calls over time are counted at the gateway."""

import time

from tuneloom.config import Settings
from tuneloom.control import audit
from tuneloom.control.key_fields import check_owner
from tuneloom.control.retry import retry
from tuneloom.domain import Actor, Allowance, AuditTarget, OwnerLimits, Principal
from tuneloom.errors import InsufficientQuota
from tuneloom.store.base import Write
from tuneloom.store.records import Records


def find(records: Records, owner: str) -> OwnerLimits | None:
    stored = records.owner_limits.find(check_owner(owner))
    return None if stored is None else stored.value


def list_all(records: Records) -> list[OwnerLimits]:
    return [stored.value for stored in records.owner_limits.query()]


def put(records: Records, owner: str, allowance: Allowance, actor: Actor) -> OwnerLimits:
    """Set all limits of an owner; those that are None are again as the settings say."""
    check_owner(owner)

    def once() -> OwnerLimits:
        stored = records.owner_limits.find(owner)
        before = stored.value.allowance if stored else Allowance()
        limits = OwnerLimits(id=owner, owner=owner, allowance=allowance, updated_at=time.time())
        table = records.owner_limits
        write: Write = table.create(limits) if stored is None else table.replace(stored, limits)
        changed = audit.changes(before, allowance, *Allowance.model_fields)
        records.commit(write, audit.entry(actor, "rate_limit.updated", _target(owner), changed))
        return limits

    return retry(once)


def clear(records: Records, owner: str, actor: Actor) -> None:
    """An owner has again what the settings say; fine if they had nothing else."""
    check_owner(owner)

    def once() -> None:
        stored = records.owner_limits.find(owner)
        if stored is not None:
            entry = audit.entry(actor, "rate_limit.deleted", _target(owner))
            records.commit(records.owner_limits.delete(stored), entry)

    retry(once)


def allowance_of(settings: Settings, records: Records, principal: Principal) -> Allowance:
    return settings.limits.allowance(principal, find(records, principal.owner))


def check_room(settings: Settings, records: Records, principal: Principal, size_bytes: int) -> None:
    """Raise InsufficientQuota unless the owner may store that much more.

    What is stored at the same moment may go beyond it, each file once.
    """
    limit = allowance_of(settings, records, principal).files_bytes
    if limit is None:
        return
    now = time.time()
    stored = [file.value for file in records.files.query({"owner": principal.owner})]
    coming = [upload.value for upload in records.uploads.query({"owner": principal.owner})]
    used = sum(file.size_bytes for file in stored)
    used += sum(each.size_bytes for each in coming if each.status == "pending" and each.expires_at > now)
    if used + size_bytes > limit:
        raise InsufficientQuota(
            f"Your files may take {limit:,} bytes, take {used:,} and would take {used + size_bytes:,}. "
            "Delete some first.",
            param="file",
        )


def _target(owner: str) -> AuditTarget:
    return AuditTarget(owner=owner, type="rate_limit", id=owner)
