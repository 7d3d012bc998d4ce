"""How endpoints of webhooks and their deliveries look on the wire."""

import json
from typing import Any

from tuneloom.domain import WebhookDelivery, WebhookEndpoint


def show_endpoint(endpoint: WebhookEndpoint) -> dict[str, Any]:
    """OpenAI's object, with what it does not say under `tuneloom`."""
    return {
        "object": "webhook_endpoint",
        "id": endpoint.id,
        "url": endpoint.url,
        "name": endpoint.name,
        "event_types": list(endpoint.event_types),
        "signing_secret_hint": endpoint.secret_hint,
        "created_at": int(endpoint.created_at),
        "updated_at": int(endpoint.updated_at),
        "tuneloom": {
            "enabled": endpoint.disabled_at is None,
            "disabled_at": _second(endpoint.disabled_at),
            "disabled_reason": endpoint.disabled_reason,
            "failing_since": _second(endpoint.failing_since),
            "old_secret_until": _second(max((old.until for old in endpoint.old_secrets), default=None)),
        },
    }


def show_delivery(row: WebhookDelivery) -> dict[str, Any]:
    return {
        "object": "tuneloom.webhook_delivery",
        "id": row.id,
        "webhook_endpoint_id": row.endpoint_id,
        "event_id": row.event_id,
        "type": row.type,
        "sequence": row.sequence,
        "state": row.state,
        "attempts": row.attempts,
        "created_at": int(row.created_at),
        "next_attempt_at": int(row.next_at) if row.state == "pending" else None,
        "done_at": _second(row.done_at),
        "tries": [{**tried.model_dump(), "at": int(tried.at)} for tried in row.tries],
        "payload": json.loads(row.body),
    }


def _second(at: float | None) -> int | None:
    return None if at is None else int(at)
