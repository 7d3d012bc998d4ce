"""API keys: made, changed, given new secrets, revoked. Each change is one commit with its audit entry.

A secret is seen once, by who made it; the store keeps its keyed hash. Who may do what is in `key_rights`.
"""

import base64
import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from tuneloom.config import Pepper
from tuneloom.control import audit
from tuneloom.control.key_fields import check_name, check_owner, check_reach, check_scopes, expiry, parse_overlap
from tuneloom.control.retry import retry
from tuneloom.domain import (
    Actor,
    ApiKey,
    AuditTarget,
    PreviousSecret,
    Rates,
    Scope,
    new_id,
)
from tuneloom.errors import Conflict, NotFound
from tuneloom.store.base import Write
from tuneloom.store.records import Records, Stored

DEFAULT_SCOPES: tuple[Scope, ...] = ("inference", "training")
# Of a key that is made for one model.
MODEL_SCOPES: tuple[Scope, ...] = ("inference",)
NO_RATES = Rates()

# What the log tells of a key: all that can be changed of it, and no hash.
_TOLD = ("name", "scopes", "models", "rates", "expires_at")


@dataclass(frozen=True)
class Minted:
    """A key and, this once, its secret."""

    key: ApiKey
    secret: str


def mint(
    records: Records,
    pepper: Pepper,
    *,
    owner: str,
    name: str = "",
    scopes: Iterable[str] = DEFAULT_SCOPES,
    expires_in: str | int | None = None,
    models: tuple[str, ...] = (),
    rates: Rates = NO_RATES,
    actor: Actor | None = None,
) -> Minted:
    """Make a key of `owner` that ends after `expires_in` (`30d`, `12h`, seconds), or never; by this machine's user."""
    minted = draft(pepper, owner=owner, name=name, scopes=scopes, expires_in=expires_in, models=models, rates=rates)
    records.commit(*creation(records, minted.key, actor or audit.cli_actor()))
    return minted


def draft(
    pepper: Pepper,
    *,
    owner: str,
    name: str,
    scopes: Iterable[str],
    expires_in: str | int | None,
    models: tuple[str, ...] = (),
    rates: Rates = NO_RATES,
    id: str | None = None,
) -> Minted:
    """A checked key with a fresh secret, not stored. `models` are those that `check_models` gave.

    Raises:
        InvalidRequest: owner, name, scopes or expiry may not be so; `param` names which.
    """
    secret = new_secret()
    hashed = pepper.hash(secret)
    now = time.time()
    checked = check_scopes(scopes)
    key = ApiKey(
        id=id or new_id("key_"),
        owner=check_owner(owner),
        name=check_name(name),
        hash=hashed.hash,
        pepper=hashed.pepper,
        redacted=redact(secret),
        scopes=checked,
        created_at=now,
        expires_at=expiry(expires_in, now),
        models=check_reach(models, checked),
        rates=rates,
    )
    return Minted(key, secret)


def creation(records: Records, key: ApiKey, actor: Actor) -> list[Write]:
    data = key.model_dump(mode="json", include=set(_TOLD))
    return [records.keys.create(key), audit.entry(actor, "api_key.created", target_of(key), data)]


def list_keys(records: Records, owner: str | None = None) -> list[ApiKey]:
    """The keys of an owner, or of everybody, newest first."""
    where = None if owner is None else {"owner": owner}
    return [stored.value for stored in records.keys.query(where, order_by="created_at", descending=True)]


def update(records: Records, id: str, change: Callable[[ApiKey], ApiKey], actor: Actor) -> ApiKey:
    """Let `change` make another key of one; it decides on what is stored at that moment.

    Raises:
        NotFound: there is no such key.
        Conflict: it is revoked.
    """

    def once() -> ApiKey:
        stored = find_key(records, id)
        key = change(check_not_revoked(stored.value))
        changed = audit.changes(stored.value, key, *_TOLD)
        if changed:
            entry = audit.entry(actor, "api_key.updated", target_of(key), changed)
            records.commit(records.keys.replace(stored, key), entry)
        return key

    return retry(once)


def revoke(
    records: Records, id: str, actor: Actor | None = None, check: Callable[[ApiKey], None] = lambda _: None
) -> ApiKey:
    """End a key, once `check` lets it; one that is revoked already stays as it is.

    Raises:
        NotFound: there is no such key.
    """

    def once() -> ApiKey:
        stored = find_key(records, id)
        check(stored.value)
        if stored.value.revoked_at is not None:
            return stored.value
        revoked = stored.value.model_copy(update={"revoked_at": time.time(), "previous": None})
        entry = audit.entry(actor or audit.cli_actor(), "api_key.deleted", target_of(revoked), {"revoked": True})
        records.commit(records.keys.replace(stored, revoked), entry)
        return revoked

    return retry(once)


def rotate(
    records: Records, pepper: Pepper, id: str, overlap: str | int | None = None, actor: Actor | None = None
) -> Minted:
    """Give a key a new secret; the one before it ends after `overlap`, at once without."""

    def once() -> Minted:
        minted, writes = draft_rotation(records, pepper, find_key(records, id), overlap, actor or audit.cli_actor())
        records.commit(*writes)
        return minted

    return retry(once)


def draft_rotation(
    records: Records, pepper: Pepper, stored: Stored[ApiKey], overlap: str | int | None, actor: Actor
) -> tuple[Minted, list[Write]]:
    """A key with a new secret, and the writes that make it so. Of three secrets the oldest ends.

    Raises:
        Conflict: the key is revoked.
    """
    key, now = check_not_revoked(stored.value), time.time()
    overlap_s = parse_overlap(overlap)
    previous = PreviousSecret(hash=key.hash, pepper=key.pepper, ends_at=now + overlap_s) if overlap_s else None
    minted = _with_new_secret(pepper, key.model_copy(update={"previous": previous}))
    entry = audit.entry(actor, "api_key.rotated", target_of(key), {"overlap_s": overlap_s})
    return minted, [records.keys.replace(stored, minted.key), entry]


def reissue(records: Records, pepper: Pepper, id: str, actor: Actor) -> Minted:
    """Replace a secret that nobody has seen, since the answer with it was lost; one before it keeps its overlap."""

    def once() -> Minted:
        stored = find_key(records, id)
        minted = _with_new_secret(pepper, check_not_revoked(stored.value))
        entry = audit.entry(actor, "api_key.rotated", target_of(minted.key), {"answer_was_lost": True})
        records.commit(records.keys.replace(stored, minted.key), entry)
        return minted

    return retry(once)


def needed_peppers(records: Records) -> set[str]:
    """The ids of the peppers that some working secret still needs; an empty one stands for any."""
    now = time.time()
    live = [key for key in list_keys(records) if key.is_live(now)]
    previous = [key.previous.pepper for key in live if key.previous and now < key.previous.ends_at]
    return {key.pepper for key in live} | set(previous)


def find_key(records: Records, id: str, owner: str | None = None) -> Stored[ApiKey]:
    """A key, of `owner` if one is given. Raises NotFound alike for what is foreign and what is absent."""
    stored = records.keys.find(id)
    if stored is None or owner not in (None, stored.value.owner):
        raise no_such_key(id)
    return stored


def no_such_key(id: str) -> NotFound:
    return NotFound(f"No such key: `{id[:200]}`.", param="id")


def target_of(key: ApiKey) -> AuditTarget:
    return AuditTarget(owner=key.owner, type="api_key", id=key.id, name=key.name)


def new_secret() -> str:
    """`sk-` and 32 random bytes in 43 characters of URL-safe base 64."""
    return "sk-" + base64.urlsafe_b64encode(secrets.token_bytes(32)).decode().rstrip("=")


def redact(secret: str) -> str:
    return f"{secret[:6]}...{secret[-4:]}"


def check_not_revoked(key: ApiKey) -> ApiKey:
    if key.revoked_at is not None:
        raise Conflict(f"The key `{key.id}` is revoked. Create a new one.", code="revoked")
    return key


def _with_new_secret(pepper: Pepper, key: ApiKey) -> Minted:
    secret = new_secret()
    hashed = pepper.hash(secret)
    update: dict[str, Any] = {"hash": hashed.hash, "pepper": hashed.pepper, "redacted": redact(secret)}
    return Minted(key.model_copy(update=update), secret)
