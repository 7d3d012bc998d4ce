"""Whether the user of a sound ID token is still welcome: asked of Identity Toolkit, remembered for seconds.

A token holds for an hour, whatever happens to its user meanwhile. `accounts:lookup`:
https://cloud.google.com/identity-platform/docs/reference/rest/v1/projects.accounts/lookup
"""

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import anyio.to_thread
import httpx

from tuneloom.errors import Overloaded, Unauthenticated
from tuneloom.serve.firebase_clock import GoogleClock

logger = logging.getLogger(__name__)

SCOPE = "https://www.googleapis.com/auth/identitytoolkit"
LOOKUP_TIMEOUT_S = 5.0
# After a failure nobody is looked up for so long.
RETRY_S = 5.0
# How old an answer may be that is used while there is no newer one to be had: who is revoked is out within a minute,
# whatever Identity Toolkit does.
KEEP_S = 60.0
MAX_CACHED = 10_000

Headers = Callable[[], Awaitable[Mapping[str, str]]]


@dataclass(frozen=True)
class Account:
    """What is known of a user. Tokens issued before `valid_since` were revoked."""

    exists: bool
    is_disabled: bool = False
    valid_since: int = 0


@dataclass(frozen=True)
class _Seen:
    account: Account
    read_at: float


class Users:
    """Users of one project by uid; one lookup of each at a time, at most every `check_s`."""

    def __init__(
        self,
        http: httpx.AsyncClient,
        url: str,
        headers: Headers,
        clock: GoogleClock,
        *,
        check_s: float,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._http, self._url, self._headers, self._clock = http, url, headers, clock
        self._check_s, self._monotonic = check_s, monotonic
        self._seen: OrderedDict[str, _Seen] = OrderedDict()
        self._lookups: dict[str, asyncio.Task[Account | None]] = {}
        self._down_until = float("-inf")

    async def check(self, uid: str, issued_at: int) -> None:
        """Refuse a token of a user that was issued at `issued_at` and means nothing any more.

        Raises:
            Unauthenticated: the user was deleted or disabled, or the token revoked.
            Overloaded: that cannot be told.
        """
        account = await self._read(uid)
        if not account.exists:
            raise Unauthenticated("Your account does not exist any more. Sign up again.", code="user_not_found")
        if account.is_disabled:
            raise Unauthenticated("Your account is disabled. Ask the operator.", code="user_disabled")
        # The same as in Google's libraries. `auth_time` would not do: it stays that of the first sign-in when an
        # anonymous user gets a password, which revokes the tokens before.
        if issued_at < account.valid_since:
            raise Unauthenticated("Your sign-in was revoked. Sign in again.", code="revoked_id_token")

    async def _read(self, uid: str) -> Account:
        seen, now = self._seen.get(uid), self._monotonic()
        if seen and now - seen.read_at < self._check_s:
            return seen.account
        if now >= self._down_until or uid in self._lookups:
            if uid not in self._lookups:
                task = self._lookups[uid] = asyncio.create_task(self._look_up(uid))
                task.add_done_callback(lambda _: self._lookups.pop(uid, None))
            account = await asyncio.shield(self._lookups[uid])
            if account is not None:
                return account
        if seen and self._monotonic() - seen.read_at < KEEP_S:
            return seen.account
        raise Overloaded("Sign-in cannot be checked now: the users cannot be asked for.", retry_after_s=RETRY_S)

    async def _look_up(self, uid: str) -> Account | None:
        # Before the answer: what happens to the user meanwhile must not count as seen.
        read_at = self._monotonic()
        try:
            async with asyncio.timeout(LOOKUP_TIMEOUT_S):
                headers = await self._headers()
                sent_at = self._clock.now()
                answer = await self._http.post(self._url, json={"localId": [uid]}, headers=headers)
                answer.raise_for_status()
            self._clock.learn(answer, sent_at)
            account = _parse(answer.json(), uid)
        except Exception as error:
            # Whatever it is, nobody else is asked about more users until it may have passed.
            self._down_until = self._monotonic() + RETRY_S
            logger.warning(
                "Firebase Auth does not tell about users (%s). Without its answers nobody stays signed in for more "
                "than %.0f s. It needs Application Default Credentials of an account with the role "
                "`roles/firebaseauth.viewer`, or `identity.revocation_check_s: null`.",
                _describe(error),
                KEEP_S,
            )
            return None
        self._seen[uid] = _Seen(account, read_at)
        self._seen.move_to_end(uid)
        while len(self._seen) > MAX_CACHED:
            self._seen.popitem(last=False)
        return account


class GoogleCredentials:
    """The headers that prove to Google who asks, by Application Default Credentials; renewed before they are over."""

    def __init__(self) -> None:
        self._credentials: Any = None
        self._lock = asyncio.Lock()

    async def __call__(self) -> Mapping[str, str]:
        async with self._lock:
            if self._credentials is None or not self._credentials.valid:
                self._credentials = await anyio.to_thread.run_sync(self._renewed, abandon_on_cancel=True)
        headers: dict[str, str] = {}
        self._credentials.apply(headers)
        return headers

    def _renewed(self) -> Any:
        import google.auth
        from google.auth.transport.requests import Request

        credentials = self._credentials
        if credentials is None:
            credentials, _ = google.auth.default(scopes=[SCOPE])
        credentials.refresh(Request())
        return credentials


async def emulator_headers() -> Mapping[str, str]:
    """The emulator takes this for an administrator."""
    return {"authorization": "Bearer owner"}


def _parse(answer: Any, uid: str) -> Account:
    users = [user for user in answer.get("users", ()) if user["localId"] == uid]
    if not users:
        return Account(exists=False)
    return Account(True, bool(users[0].get("disabled", False)), int(users[0].get("validSince", 0)))


def _describe(error: Exception) -> str:
    if isinstance(error, httpx.HTTPStatusError):
        return f"HTTP {error.response.status_code}: {error.response.text[:300]}"
    return repr(error)[:300]
