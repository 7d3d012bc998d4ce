"""The record of who did what to what. Written with the change itself, and never changed."""

from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from tuneloom.domain.record import Record


class Actor(BaseModel):
    """Who did it, and from where.

    `id`: of a key its id, of a person their owner id, of the command line the user of the machine. `owner` is whose key
    it was, empty for the command line. `address` and `request_id` are those of the request, if it was one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["key", "person", "anonymous", "cli", "system"]
    id: str
    owner: str = ""
    address: str | None = None
    request_id: str | None = None


class AuditTarget(BaseModel):
    """What it was done to: a thing of `owner`. `type` is such as `api_key`, `model.version`, `fine_tuning.job`."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    owner: str
    type: str
    id: str
    name: str = ""


class AuditEntry(Record):
    """One act. `owner` is whose thing was changed; `action` is such as `api_key.created`; `data` says what changed."""

    collection: ClassVar[str] = "audit_entries"
    created_at: float
    action: str
    actor: Actor
    target: AuditTarget
    data: dict[str, Any] = Field(default_factory=dict)
