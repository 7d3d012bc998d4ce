"""The gateway on Ray Serve: the deployment of the application, and how it wakes control. No routes."""

import logging
import os
import threading
from collections.abc import Callable, Mapping
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.util import metrics
from starlette.applications import Starlette

from tuneloom.config import Settings, check_production, read_pepper
from tuneloom.serve.app import CONTROL_APP
from tuneloom.serve.firebase import open_people
from tuneloom.serve.handles import serve_bases
from tuneloom.serve.ingress import Context, make_app
from tuneloom.serve.reads import StoreHealth
from tuneloom.store import open_store

logger = logging.getLogger(__name__)


class Gateway:
    """The Serve deployment of the application. Serve builds it in the replica; it is never pickled."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings = Settings.model_validate(settings)
        check_production(self._settings, os.environ)
        self._store = open_store(self._settings)
        find = self._store.records.keys.find
        self._health = StoreHealth(lambda: find("key_none"), self._settings.gateway.stale_s)
        self._pepper = read_pepper(self._settings)
        self._bases = serve_bases(self._settings)

    def __serve_build_asgi_app__(self) -> Starlette:
        people = open_people(self._settings, os.environ)
        watch = watch_limits(self._settings)
        return make_app(Context(self._settings, self._store, self._pepper, self._bases, Poke(), people, watch))

    async def check_health(self) -> None:
        """Raises once the store has been away for too long. See `StoreHealth`."""
        await self._health.check()


def watch_limits(settings: Settings) -> Callable[[bool], None]:
    """Shows operators whether limits are kept for all gateways together: 1, or 0 while Redis is away."""
    gauge = metrics.Gauge("tuneloom_limits_shared", "Whether this gateway counts limits together with all others.")
    gauge.set(float(settings.limits.redis_url is not None))
    return lambda is_shared: gauge.set(float(is_shared))


class Poke:
    """Wakes the control loop, so that it need not wait for its next tick. Callable from any thread; never fails."""

    def __init__(self) -> None:
        self._handle: Any = None

    def __call__(self) -> None:
        threading.Thread(target=self._send, name="poke", daemon=True).start()

    def _send(self) -> None:
        try:
            if self._handle is None:
                self._handle = serve.get_app_handle(CONTROL_APP)
            self._handle.poke.remote()
        except (RayServeException, RayError) as error:
            # The tick does the same, later.
            logger.info("control was not poked: %s", error)
