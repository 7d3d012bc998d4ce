"""Who calls: a bearer key becomes a Principal, by its keyed hash. No rights of routes, no models."""

import re
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import anyio.to_thread
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from tuneloom.domain import ApiKey, Principal, hash_secret
from tuneloom.errors import Unauthenticated
from tuneloom.store.records import Records

MAX_CACHED = 4096
_SECRET = re.compile(r"[\x21-\x7e]{1,256}")


@dataclass(frozen=True)
class _Cached:
    key: ApiKey
    read_at: float


class Keys:
    """Finds the caller of a key. A found key is remembered for `cache_s`, so a revoked one works at most that long.

    Unknown keys are not remembered: they would push out the known ones.
    """

    def __init__(
        self,
        records: Records,
        pepper: bytes,
        *,
        cache_s: float,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._records = records
        self._pepper = pepper
        self._cache_s = cache_s
        self._clock = clock
        self._now = now
        self._cache: OrderedDict[str, _Cached] = OrderedDict()

    async def authenticate(self, secret: str) -> Principal:
        """Whose key it is.

        Raises:
            Unauthenticated: it is unknown, malformed, expired or revoked; the message masks it.
        """
        if not _SECRET.fullmatch(secret):
            raise _incorrect(secret)
        key = await self._find(hash_secret(self._pepper, secret))
        if key is None or key.revoked_at is not None:
            raise _incorrect(secret)
        if key.expires_at is not None and key.expires_at <= self._now():
            raise Unauthenticated(f"The API key {mask(secret)} has expired. Create a new one.")
        return Principal(owner=key.owner, key_id=key.id, scopes=key.scopes, models=key.models, rates=key.rates)

    async def _find(self, hash: str) -> ApiKey | None:
        cached = self._cache.get(hash)
        if cached and self._clock() - cached.read_at < self._cache_s:
            return cached.key
        # Before the read: what is written meanwhile must not count as seen.
        read_at = self._clock()
        found = await anyio.to_thread.run_sync(lambda: self._records.keys.query({"hash": hash}, limit=1))
        if not found:
            self._cache.pop(hash, None)
            return None
        self._cache[hash] = _Cached(found[0].value, read_at)
        self._cache.move_to_end(hash)
        while len(self._cache) > MAX_CACHED:
            self._cache.popitem(last=False)
        return found[0].value


class SignIn(Protocol):
    """Finds the person of an ID token."""

    async def authenticate(self, token: str, headers: Mapping[str, str]) -> Principal: ...


class Authentication:
    """ASGI: everything under `/v1/` needs a key, or the ID token of a person if people sign in.

    `request.state.principal` says whose it is.
    """

    def __init__(self, app: ASGIApp, keys: Keys, people: SignIn | None = None) -> None:
        self._app = app
        self._keys = keys
        self._people = people

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith("/v1/"):
            headers = HTTPConnection(scope).headers
            token = read_bearer(headers.get("authorization"))
            scope.setdefault("state", {})["principal"] = await self._caller(token, headers)
        await self._app(scope, receive, send)

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


def mask(secret: str) -> str:
    """A key as it may be shown: its ends, if it is long enough to have a middle, and only characters that print."""
    shown = f"{secret[:6]}...{secret[-4:]}" if len(secret) >= 20 else "***"
    return "".join(char if char.isascii() and char.isprintable() else "?" for char in shown)


def _incorrect(secret: str) -> Unauthenticated:
    return Unauthenticated(f"Incorrect API key provided: {mask(secret)}. Check the key, or create a new one.")
