"""`/v1/tuneloom/drafts` on the wire."""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any, Literal

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tuneloom.control import audit, drafts, files, repeat
from tuneloom.control.body import Body, digest, identify, parse, read_json
from tuneloom.control.context import ApiContext, caller, in_thread, query_choice, query_int
from tuneloom.control.draft_events import HEADERS, Streams, progress
from tuneloom.control.draft_view import show_draft
from tuneloom.control.drafting.duplicates import MIN_SIMILARITY
from tuneloom.control.pages import read_page
from tuneloom.domain import Draft, DraftFormat, DraftRole, DraftSpec, Principal, RowLength, new_id
from tuneloom.errors import InvalidRequest, RateLimited
from tuneloom.store.base import BlobNotFound, Write

MAX_PAGE = 1000
MIN_ROWS, MIN_TOKENS, MIN_TIME_S = 10, 1000, 10.0

Bound = Annotated[int | None, Field(ge=1, le=100_000)]


class Length(Body):
    min_chars: Bound = None
    max_chars: Bound = None
    min_words: Bound = None
    max_words: Bound = None


class CreateDraft(Body):
    """`roles` are dealt to the drafters in turn. Seed rows are `seed_rows` or those of `seed_file`."""

    description: str = Field(min_length=1, max_length=8000)
    format: DraftFormat
    rows: int = Field(ge=MIN_ROWS)
    drafters: int | None = Field(None, ge=1)
    roles: list[DraftRole] | None = Field(None, min_length=1)
    topics: list[Annotated[str, Field(min_length=1, max_length=200)]] = Field([], max_length=50)
    seed_rows: list[dict[str, Any]] | None = Field(None, min_length=1, max_length=50)
    seed_file: str | None = None
    language: str | None = None
    length: Length = Length()
    similarity: float | None = Field(0.8, ge=MIN_SIMILARITY, le=1)
    provider: str | None = None
    model: str | None = None
    max_tokens: int | None = Field(None, ge=MIN_TOKENS)
    max_cost: float | None = Field(None, gt=0)
    time_limit_s: float | None = Field(None, ge=MIN_TIME_S)
    seed: int | None = Field(None, ge=0, le=2**31 - 1)


class DraftsApi:
    def __init__(self, context: ApiContext) -> None:
        self._context = context
        self._store = context.store
        self._records = context.store.records
        self._settings = context.settings.drafting
        self._streams = Streams()

    def routes(self) -> list[Route]:
        return [
            Route("/v1/tuneloom/drafts", self.create, methods=["POST"]),
            Route("/v1/tuneloom/drafts", self.list_drafts, methods=["GET"]),
            Route("/v1/tuneloom/drafts/{id}", self.retrieve, methods=["GET"]),
            Route("/v1/tuneloom/drafts/{id}/cancel", self.cancel, methods=["POST"]),
            Route("/v1/tuneloom/drafts/{id}/rows", self.rows, methods=["GET"]),
            Route("/v1/tuneloom/drafts/{id}/events", self.events, methods=["GET"]),
        ]

    async def create(self, request: Request) -> Response:
        principal = caller(request, "training")
        raw = await read_json(request, self._context.settings.gateway.max_body_bytes)
        draft = await in_thread(self._create, request, principal, raw)
        self._context.poke()
        return JSONResponse(await in_thread(self._show, draft))

    def _create(self, request: Request, principal: Principal, raw: bytes) -> Draft:
        body = parse(CreateDraft, raw)
        owner, id = principal.owner, new_id("draft_")
        seeds, count = self._seeds(owner, body)
        blob = f"drafts/{id}/seeds" if seeds else None
        spec = self._spec(body, blob, count)
        draft = drafts.new_draft(owner, id, spec, new_id("file-"), principal.key_id)
        data = {"rows": spec.rows, "drafters": len(spec.roles), "provider": spec.provider, "model": spec.model}
        entry = audit.entry(audit.actor_of(request), "draft.created", drafts.target_of(draft), data)

        def make() -> tuple[str, Draft, list[Write]]:
            turn = drafts.take_room(self._records, owner, self._settings)
            return id, draft, [self._records.drafts.create(draft), turn, entry]

        if blob is not None:
            self._store.blobs.write(blob, seeds)
        try:
            with files.dropped_if_refused(self._store, f"drafts/{id}/seeds"):
                kept = repeat.create_once(
                    self._records,
                    identify(request, owner, digest(raw)),
                    make,
                    lambda found: drafts.get_draft(self._records, owner, found).value,
                )
        except RateLimited:
            self._store.blobs.delete(f"drafts/{id}/seeds")
            raise
        if kept.id != id and blob is not None:
            self._store.blobs.delete(blob)
        return kept

    def _seeds(self, owner: str, body: CreateDraft) -> tuple[bytes, int]:
        if body.seed_rows is not None and body.seed_file is not None:
            raise InvalidRequest("Give `seed_rows` or `seed_file`, not both.", param="seed_file")
        if body.seed_file is not None:
            rows = drafts.read_seed_file(self._store, owner, body.seed_file)
            return drafts.check_seeds(rows, body.format, "seed_file"), len(rows)
        return drafts.check_seeds(body.seed_rows or (), body.format, "seed_rows"), len(body.seed_rows or ())

    def _spec(self, body: CreateDraft, seeds: str | None, seed_rows: int) -> DraftSpec:
        settings, max_time_s = self._settings, self._settings.max_time_s
        provider, model = drafts.choose_provider(settings, body.provider, body.model)
        _check_said("description", body.description)
        for index, topic in enumerate(body.topics):
            _check_said(f"topics.{index}", topic)
        roles = drafts.deal(body.roles, body.drafters)
        _at_most("rows", body.rows, settings.max_rows, "drafting.max_rows")
        _at_most("drafters", len(roles), settings.max_drafters, "drafting.max_drafters")
        _at_most("time_limit_s", body.time_limit_s or 0, max_time_s, "drafting.max_time_s")
        if body.roles is not None and len(body.roles) > len(roles):
            raise InvalidRequest(f"Invalid `roles`: {len(body.roles)} for {len(roles)} drafters.", param="roles")
        drafts.check_language(body.language)
        _check_length(body.length)
        price = drafts.price_of(settings, provider, self._context.settings.train.currency)
        if body.max_cost is not None and price is None:
            raise InvalidRequest(
                f"`max_cost` needs prices, and `drafting.providers.{provider}` has no `input_price` and "
                "`output_price`. Use `max_tokens`.",
                param="max_cost",
            )
        return DraftSpec(
            description=body.description,
            format=body.format,
            rows=body.rows,
            roles=roles,
            provider=provider,
            model=model,
            max_output_tokens=settings.providers[provider].max_output_tokens,
            seed=drafts.new_seed() if body.seed is None else body.seed,
            topics=tuple(body.topics),
            seed_file=body.seed_file,
            seed_rows=seed_rows,
            seeds=seeds,
            language=body.language,
            length=RowLength(**body.length.model_dump()),
            similarity=body.similarity,
            max_tokens=body.max_tokens,
            max_cost=body.max_cost,
            time_limit_s=min(body.time_limit_s or max_time_s, max_time_s),
            price=price,
        )

    async def list_drafts(self, request: Request) -> Response:
        return JSONResponse(await in_thread(self._list, request, caller(request, "training").owner))

    def _list(self, request: Request, owner: str) -> dict[str, Any]:
        limit = query_int(request, "limit", 20, 1, 100)
        order = query_choice(request, "order", "desc", ("asc", "desc"))
        after = request.query_params.get("after")
        page = read_page(
            self._records.drafts,
            {"owner": owner},
            order_by="created_at",
            descending=order == "desc",
            limit=limit,
            after=drafts.get_draft(self._records, owner, after).value if after else None,
        )
        return page.body(self._show)

    async def retrieve(self, request: Request) -> Response:
        owner, id = caller(request, "training").owner, request.path_params["id"]
        draft = (await in_thread(drafts.get_draft, self._records, owner, id)).value
        return JSONResponse(await in_thread(self._show, draft))

    async def cancel(self, request: Request) -> Response:
        owner, id = caller(request, "training").owner, request.path_params["id"]
        draft = await in_thread(drafts.cancel, self._records, owner, id, audit.actor_of(request))
        self._context.poke()
        return JSONResponse(await in_thread(self._show, draft))

    async def events(self, request: Request) -> Response:
        """Ends when the draft has ended, or after a while; who is still curious connects again."""
        owner, id = caller(request, "training").owner, request.path_params["id"]
        longest_s = max(1, int(self._context.settings.gateway.request_timeout_s))
        timeout_s = query_int(request, "timeout_s", longest_s, 1, longest_s)

        def look() -> dict[str, Any]:
            return self._show(drafts.get_draft(self._records, owner, id).value)

        first, until = await in_thread(look), time.monotonic() + timeout_s
        self._streams.check(owner)

        async def events() -> AsyncGenerator[bytes, None]:
            with self._streams.one(owner):
                async with aclosing(progress(first, lambda: in_thread(look), until=until)) as stream:
                    async for event in stream:
                        yield event

        return StreamingResponse(events(), media_type="text/event-stream", headers=HEADERS)

    async def rows(self, request: Request) -> Response:
        return JSONResponse(await in_thread(self._rows, request, caller(request, "training").owner))

    def _rows(self, request: Request, owner: str) -> dict[str, Any]:
        id = request.path_params["id"]
        after = query_int(request, "after", 0, 0, 999_999_999)
        limit = query_int(request, "limit", 100, 1, MAX_PAGE)
        draft = drafts.get_draft(self._records, owner, id).value
        try:
            data, has_more = drafts.read_rows_of(self._store, draft, after=after, limit=limit)
        except BlobNotFound:
            # It has ended meanwhile, and its rows are in its File.
            draft = drafts.get_draft(self._records, owner, id).value
            data, has_more = drafts.read_rows_of(self._store, draft, after=after, limit=limit)
        return {
            "object": "list",
            "data": data,
            "last_row": data[-1]["row"] if data else None,
            "has_more": has_more,
            "is_final": draft.file_id is not None,
        }

    def _show(self, draft: Draft) -> dict[str, Any]:
        return show_draft(draft, drafts.drafters_of(self._records, draft))


def _check_said(param: str, text: str) -> None:
    if not text.strip():
        raise InvalidRequest(f"Invalid `{param}`: it is blank.", param=param)


def _at_most(param: str, value: float, limit: float, setting: str) -> None:
    if value > limit:
        raise InvalidRequest(f"Invalid `{param}`: {value:g} is above `{setting}`, {limit:g}.", param=param)


def _check_length(length: Length) -> None:
    kind: Literal["chars", "words"]
    for kind in ("chars", "words"):
        low, high = getattr(length, f"min_{kind}"), getattr(length, f"max_{kind}")
        if low is not None and high is not None and low > high:
            raise InvalidRequest(
                f"Invalid `length`: `min_{kind}` {low} is above `max_{kind}` {high}.", param=f"length.min_{kind}"
            )
    words, chars = length.min_words, length.max_chars
    if words is not None and chars is not None and 2 * words - 1 > chars:
        raise InvalidRequest(
            f"Invalid `length`: `min_words` {words} do not fit into `max_chars` {chars}.", param="length.min_words"
        )
