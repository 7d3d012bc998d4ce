"""Who calls: the key or the ID token of a request becomes a Principal. No rights of routes, no models."""

import functools
from collections.abc import Mapping
from typing import Protocol

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from tuneloom.domain import Principal
from tuneloom.errors import InvalidRequest, Unauthenticated
from tuneloom.serve.keys import Keys
from tuneloom.serve.standing import Standing


class SignIn(Protocol):
    """Finds the person of an ID token."""

    async def authenticate(self, token: str, headers: Mapping[str, str]) -> Principal: ...

    def warning(self) -> str | None:
        """What is wrong and does not stop anybody yet."""
        ...


class Authentication:
    """ASGI: everything under `/v1/` needs a key, or the ID token of a person if people sign in.

    `request.state.principal` says whose it is. A request ends when its key does.
    """

    def __init__(self, app: ASGIApp, keys: Keys, people: SignIn | None = None) -> None:
        self._app = app
        self._keys = keys
        self._people = people
        self._standing = Standing()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self._app(scope, receive, send)
            return
        headers = HTTPConnection(scope).headers
        if len(set(headers.getlist("authorization"))) > 1:
            # Which of them a proxy before us has looked at, nobody knows.
            raise InvalidRequest("There are two headers `Authorization`. Send one.")
        token = read_bearer(headers.get("authorization"))
        scope.setdefault("state", {})["principal"] = await self._caller(token, headers)
        ask = functools.partial(self._caller, token, headers)
        await self._standing.run(self._app, scope, receive, send, token, ask)

    async def _caller(self, token: str, headers: Mapping[str, str]) -> Principal:
        if self._people is not None and looks_like_jwt(token):
            return await self._people.authenticate(token, headers)
        return await self._keys.authenticate(token)


def read_bearer(authorization: str | None) -> str:
    """The secret in an `Authorization` header; whatever stands behind the scheme, blanks around it removed.

    Raises:
        Unauthenticated: there is none.
    """
    scheme, _, secret = (authorization or "").strip().partition(" ")
    if scheme.lower() != "bearer" or not secret.strip():
        error = Unauthenticated(
            "You did not provide an API key. Send it in the header `Authorization: Bearer YOUR_KEY`."
        )
        error.code = None
        raise error
    return secret.strip()


def looks_like_jwt(token: str) -> bool:
    """Whether it is rather a JSON Web Token than an API key."""
    return token.startswith("eyJ") and token.count(".") == 2
