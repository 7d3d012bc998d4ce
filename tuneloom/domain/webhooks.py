"""Who is told what happens to their things, and what is still to be told: endpoints and the outbox."""

from typing import ClassVar, Literal, get_args

from pydantic import BaseModel, ConfigDict

from tuneloom.domain.record import Record

# OpenAI's types of events, then ours. An endpoint names those that it wants.
EventType = Literal[
    "fine_tuning.job.succeeded",
    "fine_tuning.job.failed",
    "fine_tuning.job.cancelled",
    "tuneloom.version.created",
    "tuneloom.version.activated",
    "tuneloom.draft.completed",
    "tuneloom.draft.failed",
    "tuneloom.draft.cancelled",
]
EVENT_TYPES: tuple[EventType, ...] = get_args(EventType)
# Sent to an endpoint when its owner asks for it, whatever else it wants.
TEST_EVENT = "tuneloom.webhook.test"

DeliveryState = Literal["pending", "delivered", "dead"]


class OldSecret(BaseModel):
    """A secret of before a rotation, encrypted. It signs too until `until`."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    secret: str
    until: float


class WebhookEndpoint(Record):
    """A URL that an owner wants to be told at. `secret` signs what is sent; it is kept encrypted.

    `old_secrets` are the newest first. `failing_since` is the first failure after the last success. A disabled endpoint
    is sent nothing.
    """

    collection: ClassVar[str] = "webhook_endpoints"
    url: str
    name: str
    event_types: tuple[EventType, ...]
    secret: str
    secret_hint: str
    created_at: float
    updated_at: float
    old_secrets: tuple[OldSecret, ...] = ()
    failing_since: float | None = None
    disabled_at: float | None = None
    disabled_reason: str | None = None


class WebhookTry(BaseModel):
    """One attempt at a delivery. `status` is the receiver's, None if none came; `error` says what was wrong."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    at: float
    seconds: float
    status: int | None = None
    error: str | None = None
    response: str = ""


class WebhookDelivery(Record):
    """A row of the outbox: one event for one endpoint, written with the change that it tells. Its id is `webhook-id`.

    `body` is what is signed and sent, the same bytes at each try. `sequence` orders an owner's events: microseconds.
    `next_at` is when it is due; while `lease` is set, when the sender that took it counts as dead. `attempts` are the
    tries begun since it was written or replayed, `tries` what came of the last ones. `done_at` is its end.
    A test is tried once.
    """

    collection: ClassVar[str] = "webhook_deliveries"
    endpoint_id: str
    event_id: str
    type: str
    sequence: int
    body: str
    is_test: bool = False
    created_at: float
    next_at: float
    state: DeliveryState = "pending"
    attempts: int = 0
    lease: str | None = None
    tries: tuple[WebhookTry, ...] = ()
    done_at: float | None = None
