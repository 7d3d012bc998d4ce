"""Limits around every request, as ASGI: `WrongKeys` before authentication, `Limited` after it. No arithmetic."""

import hashlib
from collections import OrderedDict

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from tuneloom.domain import Principal
from tuneloom.errors import RateLimited, TuneloomError, Unauthenticated
from tuneloom.serve.limits import Limits
from tuneloom.serve.limits_answer import refusal
from tuneloom.serve.limits_routes import cost_of
from tuneloom.serve.limits_window import Charge

MAX_KNOWN = 4096


class Limited:
    """Lets a request through its `Gate`, which it finds in `request.state.gate`, and out of it however it ends."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self._app = app
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or "principal" not in scope.get("state", {}):
            await self._app(scope, receive, send)
            return
        principal: Principal = scope["state"]["principal"]
        address = self._limits.addresses.client(scope)
        # The audit log tells it.
        scope["state"]["address"] = None if address is None else str(address)
        cost = cost_of(scope["method"], scope["path"])
        gate = await self._limits.gate(principal, self._limits.addresses.of(scope), cost)
        scope["state"]["gate"] = gate
        await gate.enter()
        try:
            await self._app(scope, receive, send)
        except TuneloomError as error:
            # Refused by its gate, it was counted nowhere, as it should be.
            if not gate.is_passed and not isinstance(error, RateLimited):
                await gate.count_failure()
            raise
        finally:
            gate.leave()


class WrongKeys:
    """Counts wrong keys by address. Beyond the limit only those keys get on that were seen to be good before.

    Many people may share an address, and behind a proxy that is not trusted all do: who is known is not shut out.
    """

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self._app = app
        self._limits = limits
        self._known: OrderedDict[bytes, None] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        header = Headers(scope=scope).get("authorization") if scope["type"] == "http" else None
        if not header:
            await self._app(scope, receive, send)
            return
        proof = hashlib.sha256(header.encode("latin-1")).digest()
        if self._limits.has_refused and proof not in self._known:
            found = self._limits.find_refusal([self._charge(scope)])
            if found is not None:
                raise found[0]
        try:
            await self._app(scope, receive, send)
        except Unauthenticated:
            if "principal" in scope.get("state", {}):
                # It was a good key when the request came.
                raise
            charge = self._charge(scope)
            admission = await self._limits.take([charge], (), "light")
            if not admission.taken.is_admitted:
                error = refusal([charge], (), admission.taken)
                self._limits.remember(admission, error, {})
                raise error from None
            raise
        finally:
            if "principal" in scope.get("state", {}):
                self._remember(proof)

    def _charge(self, scope: Scope) -> Charge:
        return self._limits.policies.wrong_key_charge(self._limits.addresses.of(scope))

    def _remember(self, proof: bytes) -> None:
        self._known[proof] = None
        self._known.move_to_end(proof)
        while len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)
