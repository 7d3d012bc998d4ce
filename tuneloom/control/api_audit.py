"""The audit log on the wire: OpenAI's for admins, and an owner's own. Nothing here changes or removes an entry."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tuneloom.control.context import ApiContext, caller, in_thread, query_int
from tuneloom.domain import AuditEntry
from tuneloom.errors import InvalidRequest, NotFound, UnsupportedParameter
from tuneloom.store.base import Range, Scalar
from tuneloom.store.records import Records

CHUNK = 500
# A filter that fits next to nothing must not read the log of years.
MAX_READ = 20_000
DEFAULT_LIMIT, MAX_LIMIT = 20, 100
_REFUSED = ("project_ids", "actor_emails", "tenant_only")


@dataclass(frozen=True)
class Filter:
    """What is wanted; empty sets want everything. Times are whole Unix seconds, `since` is in it and `until` is not."""

    owner: str | None = None
    types: frozenset[str] = frozenset()
    actors: frozenset[str] = frozenset()
    targets: frozenset[str] = frozenset()
    since: float | None = None
    until: float | None = None

    def wants(self, entry: AuditEntry) -> bool:
        return (
            (not self.types or entry.action in self.types)
            and (not self.actors or entry.actor.id in self.actors)
            and (not self.targets or entry.target.id in self.targets)
        )

    def where(self) -> dict[str, Scalar]:
        """The part that the store looks up by itself."""
        if self.owner is not None:
            return {"owner": self.owner}
        if len(self.types) == 1:
            return {"action": min(self.types)}
        return {}


def read_entries(
    records: Records,
    wanted: Filter,
    limit: int,
    *,
    after: AuditEntry | None = None,
    descending: bool = True,
) -> tuple[list[AuditEntry], bool]:
    """Up to `limit` entries in order of time after `after`, and whether there are more.

    Raises:
        InvalidRequest: too many had to be read to find them.
    """
    found: list[AuditEntry] = []
    for _ in range(MAX_READ // CHUNK):
        batch = records.audit_entries.query(
            wanted.where(),
            order_by="created_at",
            descending=descending,
            bounds=Range(at_least=wanted.since, below=wanted.until),
            limit=CHUNK,
            after=after,
        )
        found += [stored.value for stored in batch if wanted.wants(stored.value)]
        if len(found) > limit or len(batch) < CHUNK:
            return found[:limit], len(found) > limit
        after = batch[-1].value
    raise InvalidRequest(
        f"{MAX_READ:,} entries were read without finding {limit} that fit. Narrow `effective_at`.", param="effective_at"
    )


class AuditApi:
    """Each method is one endpoint."""

    def __init__(self, context: ApiContext) -> None:
        self._records = context.store.records

    def routes(self) -> list[Route]:
        return [
            Route("/v1/organization/audit_logs", self.list_all, methods=["GET"]),
            Route("/v1/tuneloom/audit", self.list_own, methods=["GET"]),
        ]

    async def list_all(self, request: Request) -> Response:
        caller(request, "admin")
        return JSONResponse(await in_thread(self._list, request, None, show_entry))

    async def list_own(self, request: Request) -> Response:
        return JSONResponse(await in_thread(self._list, request, caller(request, "account").owner, show_own))

    def _list(
        self, request: Request, owner: str | None, show: Callable[[AuditEntry], Mapping[str, Any]]
    ) -> dict[str, Any]:
        wanted = _read_filter(request, owner)
        limit = query_int(request, "limit", DEFAULT_LIMIT, 1, MAX_LIMIT)
        after, before = (request.query_params.get(name) for name in ("after", "before"))
        if after and before:
            raise InvalidRequest("Send `after` or `before`, not both.", param="before")
        if before:
            start = self._get(before, owner, "before")
            entries, has_more = read_entries(self._records, wanted, limit, after=start, descending=False)
            entries.reverse()
        else:
            cursor = self._get(after, owner, "after") if after else None
            entries, has_more = read_entries(self._records, wanted, limit, after=cursor)
        return {
            "object": "list",
            "data": [show(entry) for entry in entries],
            "first_id": entries[0].id if entries else None,
            "last_id": entries[-1].id if entries else None,
            "has_more": has_more,
        }

    def _get(self, id: str, owner: str | None, param: str) -> AuditEntry:
        stored = self._records.audit_entries.find(id)
        if stored is None or owner not in (None, stored.value.owner):
            raise NotFound(f"There is no audit entry `{id[:80]}` to go on from.", param=param)
        return stored.value


def show_entry(entry: AuditEntry) -> dict[str, Any]:
    """OpenAI's object, and in `tuneloom` what it has no place for."""
    return {
        "object": "organization.audit_log",
        "id": entry.id,
        "type": entry.action,
        "effective_at": int(entry.created_at),
        "actor": _show_actor(entry),
        entry.action: _show_details(entry),
        "tuneloom": {
            "actor": entry.actor.model_dump(),
            "target": entry.target.model_dump(),
            "data": entry.data,
        },
    }


def show_own(entry: AuditEntry) -> dict[str, Any]:
    """What an owner sees of what was done to their things. Who runs the installation is not told apart."""
    if entry.actor.owner == entry.owner:
        actor = entry.actor.model_dump(exclude={"owner"})
    else:
        actor = {"kind": "system" if entry.actor.kind == "system" else "operator"}
    return {
        "object": "tuneloom.audit_entry",
        "id": entry.id,
        "type": entry.action,
        "created_at": int(entry.created_at),
        "actor": actor,
        "target": entry.target.model_dump(exclude={"owner"}),
        "data": entry.data,
    }


def _show_actor(entry: AuditEntry) -> dict[str, Any]:
    actor, user = entry.actor, {"id": entry.actor.owner or entry.actor.id, "email": None}
    if actor.kind == "key":
        return {"type": "api_key", "api_key": {"id": actor.id, "type": "user", "user": user}}
    return {"type": "session", "session": {"user": user, "ip_address": actor.address}}


def _show_details(entry: AuditEntry) -> dict[str, Any]:
    if entry.action.endswith(".updated"):
        changed = {name: change["to"] for name, change in entry.data.items() if isinstance(change, dict)}
        return {"id": entry.target.id, "changes_requested": changed}
    return {"id": entry.target.id, "data": entry.data}


def _read_filter(request: Request, owner: str | None) -> Filter:
    query = request.query_params
    for name in _REFUSED:
        if name in query or f"{name}[]" in query:
            raise UnsupportedParameter(f"`{name}` is not supported: there are no such things here.", param=name)

    def many(name: str) -> frozenset[str]:
        return frozenset([*query.getlist(name), *query.getlist(f"{name}[]")])

    # Entries have parts of seconds, and are shown without: above 5 means from 6 on.
    since = _seconds(request, gte=0, gt=1)
    until = _seconds(request, lt=0, lte=1)
    return Filter(
        owner=owner,
        types=many("event_types"),
        actors=many("actor_ids"),
        targets=many("resource_ids"),
        since=max(since, default=None),
        until=min(until, default=None),
    )


def _seconds(request: Request, **steps: int) -> list[float]:
    """The bounds of `effective_at` that were sent, each moved by its step."""
    found = []
    for sign, step in steps.items():
        name = f"effective_at[{sign}]"
        text = request.query_params.get(name)
        if text is None:
            continue
        if not (text.isascii() and text.isdecimal() and len(text) <= 11):
            raise InvalidRequest(f"Invalid `{name}`: {text[:40]!r}. Use whole Unix seconds.", param=name)
        found.append(float(int(text) + step))
    return found
