"""Webhooks on the wire: OpenAI's `/v1/webhook_endpoints`, and `/v1/tuneloom/webhooks` with the log of deliveries.

Both paths have the same endpoints. A signing secret is in the answers to creation and rotation and nowhere else.
"""

import time
from typing import Any

import anyio
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tuneloom.control import audit, repeat, webhooks
from tuneloom.control.body import Body, digest, identify, parse, read_json
from tuneloom.control.context import ApiContext, caller, in_thread, query_choice, query_int
from tuneloom.control.key_fields import parse_duration
from tuneloom.control.pages import read_page
from tuneloom.control.webhook_secrets import Vault, open_vault
from tuneloom.control.webhook_view import show_delivery, show_endpoint
from tuneloom.control.webhooks import Changes
from tuneloom.domain import EVENT_TYPES, TEST_EVENT, Actor, WebhookDelivery, WebhookEndpoint, WebhookTry
from tuneloom.errors import InvalidRequest, Overloaded
from tuneloom.store.base import Write

OURS = "/v1/tuneloom/webhooks"
THEIRS = "/v1/webhook_endpoints"
STATES = ("all", "pending", "delivered", "dead")
# Beyond the time of a try itself: until control looks, and the resolver.
TEST_SLACK_S = 10.0
TEST_POLL_S = 0.25


class CreateEndpoint(Body):
    url: str
    event_types: list[str]
    name: str = ""


class UpdateEndpoint(Body):
    """What is not named stays."""

    url: str | None = None
    event_types: list[str] | None = None
    name: str | None = None
    enabled: bool | None = None


class Rotate(Body):
    overlap: str | int | None = None


class RotateSecret(Body):
    """OpenAI's."""

    keep_old_secret_active_for_24_hours: bool = False


class Test(Body):
    event_type: str = TEST_EVENT


class WebhooksApi:
    """Each method is one endpoint."""

    def __init__(self, context: ApiContext) -> None:
        self._context = context
        self._records = context.store.records
        self._settings = context.settings.webhooks

    def routes(self) -> list[Route]:
        both = [route for path in (OURS, THEIRS) for route in self._routes(path)]
        deliveries = OURS + "/{id}/deliveries"
        return [
            *both,
            Route("/v1/webhook_event_types", self.event_types, methods=["GET"]),
            Route(OURS + "/{id}/rotate", self.rotate, methods=["POST"]),
            Route(THEIRS + "/{id}/rotate_secret", self.rotate_secret, methods=["POST"]),
            Route(deliveries, self.deliveries, methods=["GET"]),
            Route(deliveries + "/{delivery}", self.delivery, methods=["GET"]),
            Route(deliveries + "/{delivery}/replay", self.replay, methods=["POST"]),
        ]

    def _routes(self, path: str) -> list[Route]:
        return [
            Route(path, self.create, methods=["POST"]),
            Route(path, self.list_endpoints, methods=["GET"]),
            Route(path + "/{id}", self.retrieve, methods=["GET"]),
            Route(path + "/{id}", self.update, methods=["POST"]),
            Route(path + "/{id}", self.delete, methods=["DELETE"]),
            Route(path + "/{id}/test", self.test, methods=["POST"]),
        ]

    async def event_types(self, request: Request) -> Response:
        caller(request, "account")
        return JSONResponse({"object": "list", "data": list(EVENT_TYPES)})

    async def create(self, request: Request) -> Response:
        owner, raw = await self._read(request)
        endpoint = await in_thread(self._create, request, owner, raw)
        return JSONResponse(await in_thread(self._show_with_secret, endpoint))

    def _create(self, request: Request, owner: str, raw: bytes) -> WebhookEndpoint:
        body, actor = parse(CreateEndpoint, raw), audit.actor_of(request)

        def make() -> tuple[str, WebhookEndpoint, list[Write]]:
            endpoint, writes = webhooks.create(
                self._records,
                self._settings,
                self._vault(),
                actor,
                owner=owner,
                url=body.url,
                event_types=body.event_types,
                name=body.name,
            )
            return endpoint.id, endpoint, writes

        asked = identify(request, owner, digest(raw))
        return repeat.create_once(self._records, asked, make, lambda id: webhooks.get(self._records, owner, id).value)

    async def list_endpoints(self, request: Request) -> Response:
        return JSONResponse(await in_thread(self._list, request, caller(request, "account").owner))

    def _list(self, request: Request, owner: str) -> dict[str, Any]:
        after = request.query_params.get("after")
        page = read_page(
            self._records.webhook_endpoints,
            {"owner": owner},
            order_by="created_at",
            limit=query_int(request, "limit", 20, 1, 100),
            after=webhooks.get(self._records, owner, after).value if after else None,
        )
        return page.body(show_endpoint)

    async def retrieve(self, request: Request) -> Response:
        owner, id = caller(request, "account").owner, request.path_params["id"]
        return JSONResponse(show_endpoint((await in_thread(webhooks.get, self._records, owner, id)).value))

    async def update(self, request: Request) -> Response:
        owner, raw = await self._read(request)
        return JSONResponse(show_endpoint(await in_thread(self._update, request, owner, raw)))

    def _update(self, request: Request, owner: str, raw: bytes) -> WebhookEndpoint:
        id = request.path_params["id"]
        webhooks.get(self._records, owner, id)
        body = parse(UpdateEndpoint, raw)
        changes = Changes(body.url, body.name, body.event_types, body.enabled)
        return webhooks.update(self._records, self._settings, audit.actor_of(request), owner, id, changes)

    async def delete(self, request: Request) -> Response:
        owner, id = caller(request, "account").owner, request.path_params["id"]
        await in_thread(webhooks.delete, self._records, audit.actor_of(request), owner, id)
        return JSONResponse({"id": id, "object": "webhook_endpoint.deleted", "deleted": True})

    async def rotate(self, request: Request) -> Response:
        owner, raw = await self._read(request)
        return JSONResponse(await in_thread(self._rotate, request, owner, raw))

    def _rotate(self, request: Request, owner: str, raw: bytes) -> dict[str, Any]:
        webhooks.get(self._records, owner, request.path_params["id"])
        asked = parse(Rotate, raw).overlap
        overlap_s = webhooks.DEFAULT_OVERLAP_S if asked is None else 0.0
        if asked not in (None, 0, "0"):
            overlap_s = parse_duration(asked, param="overlap") or 0.0
        if overlap_s > webhooks.MAX_OVERLAP_S:
            raise InvalidRequest("Invalid `overlap`: use at most 7 days, `7d`.", param="overlap")
        return self._with_new_secret(request, owner, overlap_s)

    async def rotate_secret(self, request: Request) -> Response:
        owner, raw = await self._read(request)
        return JSONResponse(await in_thread(self._rotate_secret, request, owner, raw))

    def _rotate_secret(self, request: Request, owner: str, raw: bytes) -> dict[str, Any]:
        webhooks.get(self._records, owner, request.path_params["id"])
        keeps = parse(RotateSecret, raw).keep_old_secret_active_for_24_hours
        return self._with_new_secret(request, owner, 24 * 3600.0 if keeps else 0.0)

    def _with_new_secret(self, request: Request, owner: str, overlap_s: float) -> dict[str, Any]:
        """A retry gets the secret of the rotation that it repeats: with another, the one in use would be two back."""
        id, actor, vault = request.path_params["id"], audit.actor_of(request), self._vault()

        def make() -> tuple[str, WebhookEndpoint, list[Write]]:
            endpoint, writes = webhooks.draft_rotation(self._records, vault, actor, owner, id, overlap_s)
            return id, endpoint, writes

        asked = identify(request, owner, digest(id, str(overlap_s)))
        found = repeat.create_once(self._records, asked, make, lambda _: webhooks.get(self._records, owner, id).value)
        return self._show_with_secret(found)

    async def test(self, request: Request) -> Response:
        """Send a sample, and answer with what the receiver said."""
        owner, raw = await self._read(request)
        row = await in_thread(self._test, audit.actor_of(request), owner, request.path_params["id"], raw)
        self._context.poke()
        tried = await self._await_try(row)
        if tried.status is None:
            raise InvalidRequest(f"The test got no answer: {tried.error}", code="webhook_unreachable")
        return JSONResponse(
            {
                "object": "webhook_endpoint.test",
                "webhook_endpoint_id": row.endpoint_id,
                "event_type": row.type,
                "status_code": tried.status,
                "success": True,
                "tuneloom": {"delivery_id": row.id, "delivered": tried.error is None, "error": tried.error},
            }
        )

    def _test(self, actor: Actor, owner: str, id: str, raw: bytes) -> WebhookDelivery:
        webhooks.get(self._records, owner, id)
        return webhooks.send_test(self._records, actor, owner, id, parse(Test, raw).event_type)

    async def _await_try(self, row: WebhookDelivery) -> WebhookTry:
        """What came of a test's only try, which control makes."""
        until = time.monotonic() + self._settings.timeout_s + TEST_SLACK_S
        while time.monotonic() < until:
            stored = await in_thread(self._records.webhook_deliveries.find, row.id)
            if stored is not None and stored.value.tries:
                return stored.value.tries[-1]
            await anyio.sleep(TEST_POLL_S)
        error = Overloaded(f"The test was not sent in time. What comes of it is in the log, as `{row.id}`.")
        error.should_retry = False
        raise error

    async def deliveries(self, request: Request) -> Response:
        return JSONResponse(await in_thread(self._deliveries, request, caller(request, "account").owner))

    def _deliveries(self, request: Request, owner: str) -> dict[str, Any]:
        id = request.path_params["id"]
        webhooks.get(self._records, owner, id)
        state, after = query_choice(request, "state", "all", STATES), request.query_params.get("after")
        page = read_page(
            self._records.webhook_deliveries,
            {"endpoint_id": id} if state == "all" else {"endpoint_id": id, "state": state},
            order_by="created_at",
            limit=query_int(request, "limit", 20, 1, 100),
            after=webhooks.get_delivery(self._records, owner, id, after).value if after else None,
        )
        return page.body(show_delivery)

    async def delivery(self, request: Request) -> Response:
        owner, path = caller(request, "account").owner, request.path_params
        stored = await in_thread(webhooks.get_delivery, self._records, owner, path["id"], path["delivery"])
        return JSONResponse(show_delivery(stored.value))

    async def replay(self, request: Request) -> Response:
        owner, path, actor = caller(request, "account").owner, request.path_params, audit.actor_of(request)
        row = await in_thread(webhooks.replay, self._records, actor, owner, path["id"], path["delivery"])
        self._context.poke()
        return JSONResponse(show_delivery(row))

    async def _read(self, request: Request) -> tuple[str, bytes]:
        """The owner, then the body: who may not do it is told so whatever the body is."""
        owner = caller(request, "account").owner
        return owner, await read_json(request, self._context.settings.gateway.max_body_bytes)

    def _vault(self) -> Vault:
        return open_vault(self._context.settings)

    def _show_with_secret(self, endpoint: WebhookEndpoint) -> dict[str, Any]:
        return {**show_endpoint(endpoint), "signing_secret": self._vault().open(endpoint.secret)}
