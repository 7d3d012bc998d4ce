"""The HTTP API of control: files, uploads, fine-tuning, models, keys, webhooks.

It runs in the ingress process, over the store alone: what it writes are intents, and control's reconcile, which may
be down, carries them out. Every endpoint finds `request.state.principal` and raises `TuneloomError`s.
"""

import time
from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tuneloom.control import audit
from tuneloom.control.api_adapters import AdaptersApi
from tuneloom.control.api_admin_keys import AdminKeysApi
from tuneloom.control.api_audit import AuditApi
from tuneloom.control.api_checks import ChecksApi
from tuneloom.control.api_drafts import DraftsApi
from tuneloom.control.api_estimate import EstimateApi
from tuneloom.control.api_files import FilesApi
from tuneloom.control.api_jobs import JobsApi
from tuneloom.control.api_keys import KeysApi
from tuneloom.control.api_limits import LimitsApi
from tuneloom.control.api_me import MeApi
from tuneloom.control.api_models import ModelsApi
from tuneloom.control.api_rows import RowsApi
from tuneloom.control.api_uploads import UploadsApi
from tuneloom.control.api_usage import UsageApi
from tuneloom.control.api_webhooks import WebhooksApi
from tuneloom.control.context import ApiContext

__all__ = ["ApiContext", "audit", "routes"]

Endpoint = Callable[[Request], Awaitable[Response]]


def routes(context: ApiContext) -> list[Route]:
    checks = ChecksApi(context)
    # A router tries them one after another, so what is asked most comes first.
    apis = (
        ModelsApi(context),
        AdaptersApi(context),
        JobsApi(context),
        FilesApi(context),
        RowsApi(context),
        DraftsApi(context),
        UploadsApi(context),
        checks,
        EstimateApi(context, checks),
        KeysApi(context),
        AdminKeysApi(context),
        AuditApi(context),
        WebhooksApi(context),
        MeApi(context),
        UsageApi(context),
        LimitsApi(context),
    )
    return [
        Route(route.path, _stamped(route.endpoint), methods=sorted(route.methods or ()))
        for api in apis
        for route in api.routes()
    ]


def _stamped(endpoint: Endpoint) -> Endpoint:
    """Note when a request came, before its body is read: what was created since may be its own retry's work."""

    async def handle(request: Request) -> Response:
        request.state.arrived_at = time.time()
        return await endpoint(request)

    return handle
