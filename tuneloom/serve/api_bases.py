"""`/v1/tuneloom/bases` on the wire, for operators: what each replica of a base does and holds, and changes to that.

An action goes to all replicas; what each answers is told of each. Pins are kept in the store, for replicas that start
later; the rest happens once.
"""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import anyio.to_thread
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tuneloom.config import BaseSettings
from tuneloom.control.api import ApiContext, audit
from tuneloom.domain import Actor, AdapterPin, AdapterRef, AuditTarget, Principal
from tuneloom.errors import (
    Conflict,
    InvalidRequest,
    InvalidType,
    MissingParameter,
    ModelNotFound,
    NotFound,
    TuneloomError,
    UnknownParameter,
)
from tuneloom.serve.bases_view import show_adapter, show_outcome, show_stats
from tuneloom.serve.body import parse_object
from tuneloom.serve.pins import read_pins
from tuneloom.serve.upstream import Bases
from tuneloom.store.base import Delete, StoreConflict, Write, field_path
from tuneloom.store.names import find_named

LOOK_TIMEOUT_S = 10.0
ACT_TIMEOUT_S = 60.0
DEFAULT_LIMIT, MAX_LIMIT = 100, 1000
_FIELDS = ("model", "owner", "sha256")

Answers = Mapping[str, Any]


@dataclass(frozen=True)
class _Subject:
    """The adapter that an action is about; `ref` is None if only its hash was given and nothing else is known."""

    name: str
    owner: str
    sha256: str
    ref: AdapterRef | None


class BasesApi:
    """Each method is one endpoint."""

    def __init__(self, context: ApiContext, bases: Bases) -> None:
        self._context = context
        self._records = context.store.records
        self._bases = bases

    def routes(self) -> list[Route]:
        path = "/v1/tuneloom/bases"
        one = path + "/{base:path}"
        return [
            Route(path, self.list_bases, methods=["GET"]),
            Route(one + "/adapters", self.list_adapters, methods=["GET"]),
            Route(one + "/prewarm", self.prewarm, methods=["POST"]),
            Route(one + "/pin", self.pin, methods=["POST"]),
            Route(one + "/unpin", self.unpin, methods=["POST"]),
            Route(one + "/unload", self.unload, methods=["POST"]),
            Route(one, self.retrieve, methods=["GET"]),
        ]

    async def list_bases(self, request: Request) -> Response:
        _admin(request)
        # At once: a replica that hangs is waited for, and would be for each base in turn.
        shown = await asyncio.gather(*(self._show(base) for base in self._context.settings.bases))
        return JSONResponse({"object": "list", "data": shown})

    async def retrieve(self, request: Request) -> Response:
        _admin(request)
        return JSONResponse(await self._show(self._base(request)))

    async def list_adapters(self, request: Request) -> Response:
        """The adapters that the replicas know, the last used first."""
        _admin(request)
        base, limit = self._base(request), _limit(request)
        answers = await self._bases(base.id).on_each_replica("adapters", timeout_s=LOOK_TIMEOUT_S)
        found = [
            (replica, state)
            for replica, states in answers.items()
            if not isinstance(states, TuneloomError)
            for state in states
        ]
        found.sort(key=lambda each: -each[1].last_used_at)
        shown = found[:limit]
        names = await anyio.to_thread.run_sync(self._names, {state.sha256 for _, state in shown})
        return JSONResponse(
            {
                "object": "list",
                "data": [show_adapter(replica, state, names.get(state.sha256, [])) for replica, state in shown],
                "has_more": len(found) > limit,
                "errors": [
                    show_outcome(id, answer) for id, answer in answers.items() if isinstance(answer, TuneloomError)
                ],
            }
        )

    async def prewarm(self, request: Request) -> Response:
        base, subject = await self._subject(request)
        await self._note(request, base, subject, "prewarmed")
        return await self._act(base, "prewarm", subject, subject.ref)

    async def pin(self, request: Request) -> Response:
        base, subject = await self._subject(request)
        await anyio.to_thread.run_sync(self._keep_pin, base, subject, audit.actor_of(request))
        return await self._act(base, "pin", subject, subject.ref, True)

    async def unpin(self, request: Request) -> Response:
        base, subject = await self._subject(request, may_be_gone=True)
        pin = await anyio.to_thread.run_sync(self._drop_pin, base, subject, audit.actor_of(request))
        return await self._act(base, "unpin", subject, pin.adapter, False, method="pin")

    async def unload(self, request: Request) -> Response:
        base, subject = await self._subject(request, may_be_gone=True)
        pins = await anyio.to_thread.run_sync(read_pins, self._records, base.id)
        if subject.sha256 in pins:
            raise Conflict(f"`{pins[subject.sha256].name}` is pinned. Unpin it first.")
        await self._note(request, base, subject, "unloaded")
        return await self._act(base, "unload", subject, subject.sha256)

    async def _note(self, request: Request, base: BaseSettings, subject: _Subject, participle: str) -> None:
        """What changes nothing in the store is written down before it is done."""
        entry = _entry(audit.actor_of(request), base, subject, participle)
        await anyio.to_thread.run_sync(self._records.commit, entry)

    async def _act(
        self, base: BaseSettings, action: str, subject: _Subject, *arguments: object, method: str | None = None
    ) -> Response:
        answers = await self._bases(base.id).on_each_replica(method or action, *arguments, timeout_s=ACT_TIMEOUT_S)
        outcomes = [show_outcome(id, answer) for id, answer in answers.items()]
        return JSONResponse(
            {
                "object": "tuneloom.base.action",
                "action": action,
                "base": base.id,
                "model": subject.name,
                "sha256": subject.sha256,
                "replicas": outcomes,
                "failed": sum(outcome["status"] != "ok" for outcome in outcomes),
            }
        )

    async def _show(self, base: BaseSettings) -> dict[str, Any]:
        try:
            answers: Answers = await self._bases(base.id).on_each_replica("stats", timeout_s=LOOK_TIMEOUT_S)
            problem = None
        except TuneloomError as error:
            answers, problem = {}, error.message
        if not answers and problem is None and base.fewest_replicas:
            problem = "no replica takes requests at the moment: one is starting, or fails to"
        pins = await anyio.to_thread.run_sync(read_pins, self._records, base.id)
        return {
            "object": "tuneloom.base",
            "id": base.id,
            "problem": problem,
            "replicas": [
                {**show_outcome(id, answer), **({} if isinstance(answer, TuneloomError) else show_stats(answer))}
                for id, answer in answers.items()
            ],
            "pins": [
                {"model": pin.name, "owner": pin.owner, "sha256": pin.id, "created_at": int(pin.created_at)}
                for pin in pins.values()
            ],
        }

    def _base(self, request: Request) -> BaseSettings:
        return self._context.get_base(request.path_params["base"], param="base")

    async def _subject(self, request: Request, *, may_be_gone: bool = False) -> tuple[BaseSettings, _Subject]:
        principal = _admin(request)
        base = self._base(request)
        fields = _fields(await request.body())
        if "sha256" in fields:
            if not may_be_gone:
                raise InvalidRequest(
                    "Name the model; only what is kept already can be told by its hash.", param="sha256"
                )
            if "model" in fields:
                raise InvalidRequest("Send `model` or `sha256`, not both.", param="sha256")
            return base, _by_hash(fields["sha256"], fields.get("owner", principal.owner))
        if "model" not in fields:
            raise MissingParameter("Missing required parameter: `model`.", param="model")
        owner = fields.get("owner", principal.owner)
        return base, await anyio.to_thread.run_sync(self._by_name, base, owner, fields["model"])

    def _by_name(self, base: BaseSettings, owner: str, name: str) -> _Subject:
        named = find_named(self._records, owner, name)
        holder = named and (named.checkpoint or named.version)
        if holder is None:
            raise ModelNotFound.named(name[:200])
        if holder.value.base != base.id:
            raise InvalidRequest(f"`{name}` is a model of the base `{holder.value.base}`.", param="model")
        return _Subject(name, owner, holder.value.adapter.sha256, holder.value.adapter)

    def _keep_pin(self, base: BaseSettings, subject: _Subject, actor: Actor) -> None:
        assert subject.ref is not None
        pins = read_pins(self._records, base.id)
        if subject.sha256 in pins:
            return
        if len(pins) >= base.engine.adapter_slots - 1:
            raise Conflict(
                f"{len(pins)} models of this base are pinned, and one of its {base.engine.adapter_slots} slots stays "
                "free for the rest. Unpin another, or raise `adapter_slots`."
            )
        pin = AdapterPin(
            id=subject.sha256,
            owner=subject.owner,
            base=base.id,
            name=subject.name,
            adapter=subject.ref,
            created_at=time.time(),
        )
        try:
            entry = _entry(actor, base, subject, "pinned")
            self._records.commit(self._records.adapter_pins.create(pin), entry)
        except StoreConflict:
            # Another operator was at the same.
            return

    def _drop_pin(self, base: BaseSettings, subject: _Subject, actor: Actor) -> AdapterPin:
        pin = read_pins(self._records, base.id).get(subject.sha256)
        if pin is None:
            raise NotFound(f"`{subject.name}` is not pinned.", param="model")
        try:
            entry = _entry(actor, base, subject, "unpinned")
            self._records.commit(Delete(AdapterPin.collection, pin.id), entry)
        except StoreConflict:
            # Another operator was at the same.
            return pin
        return pin

    def _names(self, hashes: set[str]) -> dict[str, list[dict[str, str]]]:
        """What the adapters are called."""
        field = field_path("adapter", "sha256")
        return {
            sha256: [
                {"name": stored.value.pinned_name, "owner": stored.value.owner}
                for stored in self._records.versions.query({field: sha256}, limit=10)
            ]
            for sha256 in hashes
        }


def _entry(actor: Actor, base: BaseSettings, subject: _Subject, participle: str) -> Write:
    target = AuditTarget(owner=subject.owner, type="base.adapter", id=subject.sha256, name=subject.name)
    return audit.entry(actor, f"base.adapter.{participle}", target, {"base": base.id})


def _admin(request: Request) -> Principal:
    principal: Principal = request.state.principal
    principal.require("admin")
    return principal


def _fields(raw: bytes) -> dict[str, str]:
    body = parse_object(raw)
    for name, value in body.items():
        if name not in _FIELDS:
            raise UnknownParameter(f"Unknown parameter: `{name[:100]}`.", param=name[:100])
        if not isinstance(value, str) or not value:
            raise InvalidType(f"Invalid `{name}`: send a text that is not empty.", param=name)
    return body


def _by_hash(sha256: str, owner: str) -> _Subject:
    if len(sha256) != 64 or set(sha256) - set("0123456789abcdef"):
        raise InvalidRequest("Invalid `sha256`: send 64 hexadecimal digits.", param="sha256")
    return _Subject(sha256[:12], owner, sha256, None)


def _limit(request: Request) -> int:
    text = request.query_params.get("limit", str(DEFAULT_LIMIT))
    if not (text.isascii() and text.isdecimal() and 1 <= int(text[:9]) <= MAX_LIMIT):
        raise InvalidRequest(f"Invalid `limit`. Use a whole number from 1 to {MAX_LIMIT}.", param="limit")
    return int(text)
