"""Which key a secret is of: looked up by its keyed hash, remembered for seconds, and longer while the store is away.

A key that is found is fresh for `cache_s`, so that a revoked one works at most that long. While the store does not
answer, a key that this process has seen within `stale_s` still counts, unless it was seen revoked or is expired.
"""

import asyncio
import re
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from tuneloom.config import HashedSecret, Pepper
from tuneloom.domain import Principal, hash_secret
from tuneloom.errors import Overloaded, TuneloomError, Unauthenticated
from tuneloom.serve.key_uses import KeyUses
from tuneloom.serve.reads import Reads
from tuneloom.store.keys import Found, find_secret
from tuneloom.store.records import Records

MAX_CACHED = 8192
# A secret that no key has is not looked for again so soon; a key that is made just now works after this.
UNKNOWN_S = 1.0
MAX_UNKNOWN = 1024
# How often unknown secrets may be looked for in the store, all callers of the process together.
UNKNOWN_PER_S, UNKNOWN_BURST = 50.0, 200.0
_SECRET = re.compile(r"[\x21-\x7e]{1,256}")


@dataclass(frozen=True)
class _Known:
    """A key as it was read. `fresh` is the hash of its secret under the current pepper, if it is stored otherwise."""

    found: Found
    principal: Principal
    read_at: float
    fresh: HashedSecret | None


class Keys:
    """Finds the caller of a secret."""

    def __init__(
        self,
        records: Records,
        pepper: Pepper,
        reads: Reads,
        *,
        cache_s: float,
        stale_s: float,
        uses: KeyUses | None = None,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._records = records
        self._pepper = pepper
        self._reads = reads
        self._cache_s = cache_s
        self._stale_s = stale_s
        self._uses = uses or KeyUses(records)
        self._clock = clock
        self._now = now
        # Secrets are remembered under a key of this process, which outlives changes of the pepper.
        self._own_key = secrets.token_bytes(32)
        self._lock = threading.Lock()
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self._unknown: OrderedDict[str, float] = OrderedDict()
        self._budget = _Budget(UNKNOWN_PER_S, UNKNOWN_BURST, clock)
        self._lookups: dict[str, asyncio.Task[_Known | None]] = {}

    async def authenticate(self, secret: str) -> Principal:
        """Whose key it is.

        Raises:
            Unauthenticated: it is unknown, malformed, expired or revoked; the message masks it.
            Overloaded: this process has not seen it lately and the store does not answer, or too many unknown ones
                were sent.
        """
        if not _SECRET.fullmatch(secret):
            raise _incorrect(secret)
        known = await self._find(secret)
        if known is None or known.found.key.revoked_at is not None:
            raise _incorrect(secret)
        ends_at, now = known.found.ends_at, self._now()
        if ends_at is not None and ends_at <= now:
            raise Unauthenticated(f"The API key {mask(secret)} has expired. Create a new one.")
        self._uses.note(known.found, now, known.fresh)
        return known.principal

    def forget(self, key_id: str) -> None:
        """A key was changed by this process: look it up again, and do without it if the store is away."""
        with self._lock:
            for digest in [digest for digest, known in self._known.items() if known.found.key.id == key_id]:
                del self._known[digest]

    async def _find(self, secret: str) -> _Known | None:
        digest = hash_secret(self._own_key, secret)
        known, now = self._known.get(digest), self._clock()
        if known is not None and now - known.read_at < self._cache_s:
            return known
        if known is None:
            if now - self._unknown.get(digest, float("-inf")) < UNKNOWN_S:
                return None
            if not self._budget.has_room():
                raise Overloaded("Too many unknown API keys were sent. Try again.", retry_after_s=1.0)
        try:
            return await self._look_up(digest, secret, has_older=known is not None)
        except TuneloomError as error:
            # Read again: a lookup that was given up may have ended meanwhile, or the key was changed here.
            known = self._known.get(digest)
            if error.status < 500 or known is None or self._clock() - known.read_at > self._stale_s:
                raise
            return known

    async def _look_up(self, digest: str, secret: str, *, has_older: bool) -> _Known | None:
        """Requests that come while a secret is looked up share that lookup."""
        task = self._lookups.get(digest)
        if task is None or task.done():
            work = self._reads.read(lambda: self._read(digest, secret), has_older=has_older)
            task = self._lookups[digest] = asyncio.create_task(work)
            task.add_done_callback(lambda done: self._end(digest, done))
        return await asyncio.shield(task)

    def _end(self, digest: str, task: "asyncio.Task[_Known | None]") -> None:
        if self._lookups.get(digest) is task:
            del self._lookups[digest]
        if not task.cancelled():
            # Nobody may be left to ask for it.
            task.exception()

    def _read(self, digest: str, secret: str) -> _Known | None:
        """Runs in a thread, and keeps what it finds: its request may have stopped waiting."""
        # Before the read: what is written meanwhile must not count as seen.
        read_at = self._clock()
        hashes = self._pepper.hashes(secret)
        found = find_secret(self._records, hashes)
        known = None if found is None else _known(found, read_at, hashes[0])
        with self._lock:
            if known is None:
                self._known.pop(digest, None)
                self._unknown[digest] = read_at
                self._budget.spend()
            else:
                self._known[digest] = known
                self._known.move_to_end(digest)
            _trim(self._known, MAX_CACHED)
            _trim(self._unknown, MAX_UNKNOWN)
        return known


class _Budget:
    """`per_s` on average, up to `burst` at once."""

    def __init__(self, per_s: float, burst: float, clock: Callable[[], float]) -> None:
        self._per_s = per_s
        self._burst = burst
        self._clock = clock
        self._left = burst
        self._at = clock()

    def has_room(self) -> bool:
        now = self._clock()
        self._left = min(self._left + (now - self._at) * self._per_s, self._burst)
        self._at = now
        return self._left >= 1

    def spend(self) -> None:
        self._left -= 1


def mask(secret: str) -> str:
    """A key as it may be shown: its ends, if it is long enough to have a middle, and only characters that print."""
    shown = f"{secret[:6]}...{secret[-4:]}" if len(secret) >= 20 else "***"
    return "".join(char if char.isascii() and char.isprintable() else "?" for char in shown)


def _known(found: Found, read_at: float, current: HashedSecret) -> _Known:
    key = found.key
    principal = Principal(
        owner=key.owner,
        key_id=key.id,
        scopes=key.scopes,
        models=key.models,
        rates=key.rates,
        expires_at=key.expires_at,
    )
    is_current = found.is_previous or (key.hash, key.pepper) == (current.hash, current.pepper)
    return _Known(found, principal, read_at, None if is_current else current)


def _trim(entries: OrderedDict[str, _Known] | OrderedDict[str, float], most: int) -> None:
    while len(entries) > most:
        entries.popitem(last=False)


def _incorrect(secret: str) -> Unauthenticated:
    return Unauthenticated(f"Incorrect API key provided: {mask(secret)}. Check the key, or create a new one.")
