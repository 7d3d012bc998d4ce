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


class Principal(BaseModel):
    """Who calls: the owner whose things they may touch, how that was proved, and what they may do.

    `kind`: an API key (`key_id` is its id), a person who signed in, or a person who did so anonymously (no key id).
    `models`: names of the only Models and bases that they may use; empty: all of the owner's. `rates`: the key's own.
    """

    model_config = ConfigDict(frozen=True)
    owner: str
    key_id: str
    scopes: tuple[Scope, ...]
    kind: Literal["key", "person", "anonymous"] = "key"
    models: tuple[str, ...] = ()
    rates: Rates = Rates()

    def require(self, scope: Scope) -> None:
        """Raise PermissionDenied unless the key has the scope; `admin` holds every scope."""
        if scope not in self.scopes and "admin" not in self.scopes:
            raise PermissionDenied(f"This key lacks the scope `{scope}`. Use a key that was created with it.")

    def may_use(self, model: str | None) -> bool:
        """Whether the key is for that Model (by its bare name) or base (by its id)."""
        return not self.models or model in self.models


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
