"""Public keys of signers, from the URL that publishes them: cached, fetched by one at a time, missed for a while."""

import asyncio
import json
import logging
import re
import time
from collections.abc import Callable, Mapping

import httpx
import jwt
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.x509 import load_pem_x509_certificate

from tuneloom.errors import Overloaded
from tuneloom.serve.firebase_clock import GoogleClock

logger = logging.getLogger(__name__)

FETCH_TIMEOUT_S = 5.0
# The shortest time between two fetches, whatever tokens come.
RETRY_S = 5.0
# How long keys are used past their time while the URL does not answer.
MAX_OVERDUE_S = 6 * 3600.0
DEFAULT_AGE_S, MIN_AGE_S, MAX_AGE_S = 3600.0, 60.0, 86400.0
_MAX_AGE = re.compile(r"(?:^|[,\s])max-age\s*=\s*\"?(\d{1,9})", re.IGNORECASE)

Parse = Callable[[bytes], Mapping[str, RSAPublicKey]]


class KeySet:
    """The keys of one URL by id. `what` names them to people."""

    def __init__(
        self,
        http: httpx.AsyncClient,
        url: str,
        parse: Parse,
        clock: GoogleClock,
        *,
        what: str,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._http, self._url, self._parse, self._clock, self._what = http, url, parse, clock, what
        self._monotonic = monotonic
        self._keys: Mapping[str, RSAPublicKey] = {}
        self._fresh_until = self._usable_until = self._tried_at = float("-inf")
        self._has_failed = False
        self._fetching: asyncio.Task[None] | None = None

    async def find(self, id: str) -> RSAPublicKey | None:
        """The key, or None if there is none of that id now.

        Raises:
            Overloaded: that cannot be told, because the URL does not answer.
        """
        now = self._monotonic()
        if self._usable_until > now >= self._fresh_until:
            # What is known goes on; nobody waits for what is new.
            self._start()
        if self._usable_until <= now or id not in self._keys:
            await self.refresh()
        if self._usable_until > self._monotonic():
            key = self._keys.get(id)
            if key is not None or not self._has_failed:
                return key
        raise Overloaded(f"Sign-in cannot be checked now: {self._what} cannot be fetched.", retry_after_s=RETRY_S)

    async def refresh(self) -> bool:
        """Fetch, or wait for the fetch under way; False if one has just been made."""
        task = self._start()
        if task is None:
            return False
        await asyncio.shield(task)
        return True

    def _start(self) -> asyncio.Task[None] | None:
        if self._fetching is None or self._fetching.done():
            if self._monotonic() - self._tried_at < RETRY_S:
                return None
            self._tried_at = self._monotonic()
            self._fetching = asyncio.create_task(self._fetch())
        return self._fetching

    async def _fetch(self) -> None:
        try:
            async with asyncio.timeout(FETCH_TIMEOUT_S):
                sent_at = self._clock.now()
                answer = (await self._http.get(self._url)).raise_for_status()
            self._clock.learn(answer, sent_at)
            self._keys = self._parse(answer.content)
        except (httpx.HTTPError, TimeoutError, ValueError, TypeError, AttributeError) as error:
            self._has_failed = True
            logger.warning("%s cannot be fetched from %s: %r", self._what, self._url, error)
            return
        self._has_failed = False
        self._fresh_until = self._monotonic() + _lifetime_s(answer.headers)
        self._usable_until = self._fresh_until + MAX_OVERDUE_S


def parse_certificates(body: bytes) -> Mapping[str, RSAPublicKey]:
    """`{id: PEM of an X.509 certificate}`, as Google publishes the keys of ID tokens. Raises ValueError."""
    keys = {}
    for id, pem in json.loads(body).items():
        key = load_pem_x509_certificate(pem.encode()).public_key()
        if isinstance(key, RSAPublicKey):
            keys[id] = key
    return _checked(keys)


def parse_jwks(body: bytes) -> Mapping[str, RSAPublicKey]:
    """A JSON Web Key Set, as Google publishes the keys of App Check. Raises ValueError."""
    try:
        found = jwt.PyJWKSet.from_json(body.decode()).keys
    except jwt.PyJWTError as error:
        raise ValueError(str(error)) from error
    return _checked({key.key_id: key.key for key in found if key.key_id and isinstance(key.key, RSAPublicKey)})


def _checked(keys: Mapping[str, RSAPublicKey]) -> Mapping[str, RSAPublicKey]:
    if not keys:
        raise ValueError("there is no RSA key in it")
    return keys


def _lifetime_s(headers: httpx.Headers) -> float:
    found = _MAX_AGE.search(headers.get("cache-control", ""))
    age = headers.get("age", "0")
    passed_s = float(age) if age.isascii() and age.isdecimal() and len(age) < 8 else 0.0
    return min(max(float(found[1]) - passed_s if found else DEFAULT_AGE_S, MIN_AGE_S), MAX_AGE_S)
