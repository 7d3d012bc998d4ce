"""What owners are told, written in the same commit as the change that it tells.

Bodies are thin and in OpenAI's form; `data` names the thing that changed, who wants more asks the API for it.
"""

import json
import secrets
from collections.abc import Mapping
from typing import Any

from tuneloom.domain import TERMINAL, EventType, Job, JobError, Version, WebhookDelivery, WebhookEndpoint, new_id
from tuneloom.store.base import Write
from tuneloom.store.records import Records

MAX_BODY_BYTES = 20_000
MAX_MESSAGE = 1000


def writes(records: Records, owner: str, type: EventType, data: Mapping[str, Any], at: float) -> list[Write]:
    """The outbox rows of one event, for each endpoint of `owner` that wants it; commit them with the change.

    `data` holds the `id` of what changed and few facts; of one that is too large only the id is sent. Of two events of
    one commit, the later one needs a later `at` (Unix seconds) to be told apart.
    """
    wanted = [
        stored.value
        for stored in records.webhook_endpoints.query({"owner": owner})
        if type in stored.value.event_types and stored.value.disabled_at is None
    ]
    if not wanted:
        return []
    first = delivery(wanted[0], type, data, at)
    rows = [first, *(_copy(first, endpoint) for endpoint in wanted[1:])]
    return [records.webhook_deliveries.create(row) for row in rows]


def delivery(endpoint: WebhookEndpoint, type: str, data: Mapping[str, Any], at: float) -> WebhookDelivery:
    """One event for one endpoint, due at once."""
    sequence = round(at * 1_000_000)
    event = f"evt_{sequence:016x}{secrets.token_hex(4)}"
    body = _body(event, type, at, {**data, "sequence": sequence})
    if len(body.encode()) > MAX_BODY_BYTES:
        body = _body(event, type, at, {"id": data["id"], "sequence": sequence})
    return WebhookDelivery(
        id=new_id("wh_"),
        owner=endpoint.owner,
        endpoint_id=endpoint.id,
        event_id=event,
        type=type,
        sequence=sequence,
        body=body,
        created_at=at,
        next_at=at,
    )


def job_ended(records: Records, before: Job, after: Job, at: float) -> list[Write]:
    """The rows that a job's end is told by; none if this change does not end it."""
    if before.is_terminal or after.state not in TERMINAL:
        return []
    facts = {
        "model": after.spec.base,
        "fine_tuned_model": after.fine_tuned_model,
        "version": _version_name(after.version_id),
        "trained_tokens": after.trained_tokens,
        "error": _error(after.error),
    }
    data = {"id": after.id, "tuneloom": {key: value for key, value in facts.items() if value is not None}}
    return writes(records, after.owner, _JOB_EVENTS[after.state], data, at)


def version_created(records: Records, version: Version, at: float) -> list[Write]:
    data = {
        "id": version.pinned_name,
        "model": version.model,
        "version": version.number,
        "fine_tuned_model": version.ft_name,
        "job_id": version.job_id,
    }
    return writes(records, version.owner, "tuneloom.version.created", data, at)


def version_activated(
    records: Records, owner: str, model: str, number: int, before: int | None, at: float
) -> list[Write]:
    """The rows that tell that another Version answers a Model's bare name; none if it is the one before."""
    if number == before:
        return []
    data = {"id": f"{model}@v{number}", "model": model, "version": number, "previous_version": before}
    return writes(records, owner, "tuneloom.version.activated", data, at)


_JOB_EVENTS: Mapping[str, EventType] = {
    "succeeded": "fine_tuning.job.succeeded",
    "failed": "fine_tuning.job.failed",
    "cancelled": "fine_tuning.job.cancelled",
}


def _copy(row: WebhookDelivery, endpoint: WebhookEndpoint) -> WebhookDelivery:
    """The same event for another endpoint."""
    return row.model_copy(update={"id": new_id("wh_"), "endpoint_id": endpoint.id})


def _body(event: str, type: str, at: float, data: Mapping[str, Any]) -> str:
    whole = {"object": "event", "id": event, "type": type, "created_at": int(at), "data": data}
    return json.dumps(whole, ensure_ascii=False, separators=(",", ":"))


def _error(error: JobError | None) -> dict[str, Any] | None:
    if error is None:
        return None
    return {"code": error.code, "message": error.message[:MAX_MESSAGE], "param": error.param}


def _version_name(version_id: str | None) -> str | None:
    """`bot@v2` of the id `ada:bot:v2`."""
    if version_id is None:
        return None
    _, model, number = version_id.rsplit(":", 2)
    return f"{model}@{number}"
