"""The records of who may call what, how often, and of what they did."""

from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field

from tuneloom.domain.record import Record
from tuneloom.domain.values import Scope


class Rates(BaseModel):
    """Limits of calls over time. None: no limit of this kind here; others may still hold."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    requests_per_minute: int | None = Field(None, ge=1)
    requests_per_day: int | None = Field(None, ge=1)
    tokens_per_minute: int | None = Field(None, ge=1)


class ApiKey(Record):
    """A key without its secret. `id` is public; `hash` is the keyed hash of the secret and is looked up by equality.

    `models`: names of the only Models and bases that it may call; empty: all of its owner's.
    """

    collection: ClassVar[str] = "keys"
    name: str
    hash: str
    redacted: str
    scopes: tuple[Scope, ...]
    created_at: float
    models: tuple[str, ...] = ()
    rates: Rates = Rates()
    expires_at: float | None = None
    revoked_at: float | None = None
