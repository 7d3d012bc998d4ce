"""Endpoints of webhooks and the log of their deliveries: made, changed, tested, replayed. Each change is one commit."""

import time
from collections.abc import Iterable
from dataclasses import dataclass

from tuneloom.config import WebhookSettings
from tuneloom.control import audit, outbound, outbox, turns
from tuneloom.control.retry import retry
from tuneloom.control.webhook_secrets import Vault, hint, new_secret
from tuneloom.domain import (
    EVENT_TYPES,
    TEST_EVENT,
    Actor,
    AuditTarget,
    EventType,
    OldSecret,
    WebhookDelivery,
    WebhookEndpoint,
    new_id,
)
from tuneloom.errors import Conflict, InvalidRequest, NotFound
from tuneloom.store.base import Write
from tuneloom.store.records import Records, Stored

MAX_NAME = 128
DEFAULT_OVERLAP_S = 24 * 3600.0
# So many sign at once beside the newest; the header stays small.
MAX_OLD_SECRETS = 4
MAX_OVERLAP_S = 7 * 24 * 3600.0
BY_OWNER = "Disabled by its owner."


@dataclass(frozen=True)
class Changes:
    """What is asked of an endpoint; None stays as it is."""

    url: str | None = None
    name: str | None = None
    event_types: Iterable[str] | None = None
    enabled: bool | None = None


def create(
    records: Records,
    settings: WebhookSettings,
    vault: Vault,
    actor: Actor,
    *,
    owner: str,
    url: str,
    event_types: Iterable[str],
    name: str = "",
) -> tuple[WebhookEndpoint, list[Write]]:
    """A checked endpoint with a fresh secret, and the writes that make it.

    Raises:
        InvalidRequest: the URL, the name or a type may not be so; `param` names which.
        Conflict: the owner has as many as there may be.
    """
    now, secret = time.time(), new_secret()
    endpoint = WebhookEndpoint(
        id=new_id("we_"),
        owner=owner,
        url=_check_url(settings, url),
        name=_check_name(name),
        event_types=_check_types(event_types),
        secret=vault.seal(secret),
        secret_hint=hint(secret),
        created_at=now,
        updated_at=now,
    )
    turn, most = turns.take(records, owner, "webhook_endpoints"), settings.max_endpoints_per_owner
    if len(records.webhook_endpoints.query({"owner": owner}, limit=most)) >= most:
        raise Conflict(
            f"There may be {most} webhook endpoints, and there are. Delete one first.",
            code="too_many_webhook_endpoints",
        )
    entry = _entry(actor, "webhook_endpoint.created", endpoint, url=url, event_types=list(endpoint.event_types))
    return endpoint, [records.webhook_endpoints.create(endpoint), turn, entry]


def get(records: Records, owner: str, id: str) -> Stored[WebhookEndpoint]:
    stored = records.webhook_endpoints.find(id)
    if stored is None or stored.value.owner != owner:
        raise NotFound(f"No such webhook endpoint: `{id[:200]}`.", param="id")
    return stored


def get_delivery(records: Records, owner: str, endpoint_id: str, id: str) -> Stored[WebhookDelivery]:
    get(records, owner, endpoint_id)
    stored = records.webhook_deliveries.find(id)
    if stored is None or stored.value.endpoint_id != endpoint_id:
        raise NotFound(f"The webhook endpoint has no delivery `{id[:200]}`.", param="delivery")
    return stored


def update(
    records: Records, settings: WebhookSettings, actor: Actor, owner: str, id: str, asked: Changes
) -> WebhookEndpoint:
    def change(endpoint: WebhookEndpoint) -> WebhookEndpoint:
        changes: dict[str, object] = {}
        if asked.url is not None:
            changes["url"] = _check_url(settings, asked.url)
        if asked.name is not None:
            changes["name"] = _check_name(asked.name)
        if asked.event_types is not None:
            changes["event_types"] = _check_types(asked.event_types)
        if asked.enabled is True and endpoint.disabled_at is not None:
            changes |= {"disabled_at": None, "disabled_reason": None, "failing_since": None}
        if asked.enabled is False and endpoint.disabled_at is None:
            changes |= {"disabled_at": time.time(), "disabled_reason": BY_OWNER}
        return endpoint.model_copy(update=changes)

    def once() -> WebhookEndpoint:
        stored = get(records, owner, id)
        after = change(stored.value)
        if after == stored.value:
            return after
        after = after.model_copy(update={"updated_at": time.time()})
        told = audit.changes(stored.value, after, "url", "name", "event_types", "disabled_at")
        entry = _entry(actor, "webhook_endpoint.updated", after, **told)
        records.commit(records.webhook_endpoints.replace(stored, after), entry)
        return after

    return retry(once)


def draft_rotation(
    records: Records, vault: Vault, actor: Actor, owner: str, id: str, overlap_s: float
) -> tuple[WebhookEndpoint, list[Write]]:
    """An endpoint with a new secret, and the writes that make it so.

    For `overlap_s` the secret before signs too, and those before it as long as they were to. With 0 all of them end.
    """
    stored, secret, now = get(records, owner, id), new_secret(), time.time()
    before = OldSecret(secret=stored.value.secret, until=now + overlap_s)
    older = (old for old in stored.value.old_secrets if now < old.until)
    after = stored.value.model_copy(
        update={
            "secret": vault.seal(secret),
            "secret_hint": hint(secret),
            "old_secrets": (before, *older)[:MAX_OLD_SECRETS] if overlap_s else (),
            "updated_at": now,
        }
    )
    entry = _entry(actor, "webhook_endpoint.rotated", after, overlap_s=overlap_s)
    return after, [records.webhook_endpoints.replace(stored, after), entry]


def delete(records: Records, actor: Actor, owner: str, id: str) -> None:
    """What it was still to be told is not sent."""

    def once() -> None:
        stored = get(records, owner, id)
        entry = _entry(actor, "webhook_endpoint.deleted", stored.value, url=stored.value.url)
        records.commit(records.webhook_endpoints.delete(stored), entry)

    retry(once)


def send_test(records: Records, actor: Actor, owner: str, id: str, event_type: str) -> WebhookDelivery:
    """Write a sample event for an endpoint, to be sent once.

    Raises:
        Conflict: the endpoint is disabled.
        InvalidRequest: there is no such type.
    """
    if event_type != TEST_EVENT:
        _check_types([event_type], param="event_type")
    endpoint = get(records, owner, id).value
    _check_enabled(endpoint)
    what = "ftjob-test" if event_type.startswith("fine_tuning.") else endpoint.id
    row = outbox.delivery(endpoint, event_type, {"id": what, "test": True}, time.time())
    row = row.model_copy(update={"is_test": True})
    entry = _entry(actor, "webhook_endpoint.tested", endpoint, delivery_id=row.id, event_type=event_type)
    records.commit(records.webhook_deliveries.create(row), entry)
    return row


def replay(records: Records, actor: Actor, owner: str, endpoint_id: str, id: str) -> WebhookDelivery:
    """Make a delivery due at once, with all its tries before it, under the same `webhook-id`.

    Raises:
        Conflict: the endpoint is disabled.
    """

    def once() -> WebhookDelivery:
        endpoint = get(records, owner, endpoint_id).value
        stored = get_delivery(records, owner, endpoint_id, id)
        _check_enabled(endpoint)
        again = {"state": "pending", "next_at": time.time(), "attempts": 0, "lease": None, "done_at": None}
        row = stored.value.model_copy(update=again)
        entry = _entry(actor, "webhook_endpoint.replayed", endpoint, delivery_id=id, state=stored.value.state)
        records.commit(records.webhook_deliveries.replace(stored, row), entry)
        return row

    return retry(once)


def _entry(actor: Actor, action: str, endpoint: WebhookEndpoint, **data: object) -> Write:
    target = AuditTarget(owner=endpoint.owner, type="webhook_endpoint", id=endpoint.id, name=endpoint.name)
    return audit.entry(actor, action, target, data)


def _check_enabled(endpoint: WebhookEndpoint) -> None:
    if endpoint.disabled_at is not None:
        raise Conflict(
            f"The endpoint is disabled: {endpoint.disabled_reason} Enable it first (`enabled: true`).",
            code="webhook_endpoint_disabled",
        )


def _check_url(settings: WebhookSettings, url: str) -> str:
    outbound.check_url(url, allow_private=settings.allow_private)
    return url


def _check_name(name: str) -> str:
    if len(name) > MAX_NAME or not name.isprintable():
        raise InvalidRequest(f"Invalid `name`. Use at most {MAX_NAME} printable characters.", param="name")
    return name


def _check_types(types: Iterable[str], param: str = "event_types") -> tuple[EventType, ...]:
    wanted = set(types)
    unknown = sorted(wanted - set(EVENT_TYPES))
    if unknown or not wanted:
        what = f"Unknown type {unknown[0][:60]!r} in `{param}`" if unknown else f"`{param}` is empty"
        raise InvalidRequest(f"{what}. Choose among {', '.join(f'`{each}`' for each in EVENT_TYPES)}.", param=param)
    return tuple(type for type in EVENT_TYPES if type in wanted)
