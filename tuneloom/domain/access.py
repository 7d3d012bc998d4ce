"""Who may call what, and how often: callers, and the records of keys."""

from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from tuneloom.domain.record import Record
from tuneloom.domain.values import Scope
from tuneloom.errors import PermissionDenied


class Rates(BaseModel):
    """Limits of calls over time. None: no limit of this kind here; others may still hold."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    requests_per_minute: int | None = Field(None, ge=1)
    requests_per_day: int | None = Field(None, ge=1)
    tokens_per_minute: int | None = Field(None, ge=1)


_LACKING = {
    "key": "This key lacks the scope `{scope}`. Use a key that was created with it.",
    "person": "Your account lacks the scope `{scope}`. Ask the operator for it.",
    "anonymous": "Anonymous accounts lack the scope `{scope}`. Sign in with an account of yours; what you have stays.",
}


class Principal(BaseModel):
    """Who calls: the owner whose things they may touch, how that was proved, and what they may do.

    `kind`: an API key (`key_id` is its id), a person who signed in, or a person who did so anonymously (no key id).
    `models`: names of the only Models and bases that they may use; empty: all of the owner's. `rates`: the key's own.
    `email`: a person's, whether they have verified it or not. `expires_at`: the end of the key.
    """

    model_config = ConfigDict(frozen=True)
    owner: str
    key_id: str
    scopes: tuple[Scope, ...]
    kind: Literal["key", "person", "anonymous"] = "key"
    models: tuple[str, ...] = ()
    rates: Rates = Rates()
    email: str | None = None
    expires_at: float | None = None

    def require(self, scope: Scope) -> None:
        """Raise PermissionDenied unless the caller has the scope; `admin` holds every scope."""
        if scope not in self.scopes and "admin" not in self.scopes:
            raise PermissionDenied(_LACKING[self.kind].format(scope=scope))

    def may_use(self, model: str | None) -> bool:
        """Whether the key is for that Model (by its bare name) or base (by its id)."""
        return not self.models or model in self.models


class PreviousSecret(BaseModel):
    """The secret that a key had before it was rotated; it works until `ends_at`."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    hash: str
    pepper: str
    ends_at: float


class ApiKey(Record):
    """A key without its secret. `id` is public; `hash` is the keyed hash of the secret and is looked up by equality.

    `pepper` is the id of the pepper that `hash` was made with, empty if that was not noted. `models`: names of the only
    Models and bases that it may use; empty: all of its owner's. `last_used_at` is true to the minute.
    """

    collection: ClassVar[str] = "keys"
    name: str
    hash: str
    redacted: str
    scopes: tuple[Scope, ...]
    created_at: float
    pepper: str = ""
    previous: PreviousSecret | None = None
    models: tuple[str, ...] = ()
    rates: Rates = Rates()
    expires_at: float | None = None
    revoked_at: float | None = None
    last_used_at: float | None = None

    def is_live(self, at: float) -> bool:
        """Whether it works at that time."""
        return self.revoked_at is None and (self.expires_at is None or at < self.expires_at)
