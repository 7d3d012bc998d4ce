"""Limits counted in Redis, for all gateways together: one script for all that a request takes, all or nothing.

The time is that of Redis, so that gateways need not agree on one. Every key has the same hash tag and an end.
"""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

from tuneloom.serve.limits_link import Link
from tuneloom.serve.limits_window import Charge, Correction, Level, Place, Taken

PREFIX = "{tuneloom}:"
# A gateway that died leaves its places after so long; the others renew theirs before.
PLACE_LIFE_S = 30.0

# A window is `start before used` in one string. `numbers` are all numbers of ARGV[1], each with its place.
_HEAD = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local numbers = {}
for word in string.gmatch(ARGV[1], '%S+') do
    numbers[#numbers + 1] = tonumber(word)
end
local function read(key)
    local found = redis.call('GET', key)
    if not found then
        return nil
    end
    local start, before, used = string.match(found, '(%S+) (%S+) (%S+)')
    return tonumber(start), tonumber(before), tonumber(used)
end
local function write(key, start, before, used, life)
    redis.call('SET', key, string.format('%.0f %.0f %.0f', start, before, used), unpack(life))
end
"""

# KEYS: windows, then places. Numbers: number of windows, life of a place; size, limit and cost of each window; limit of
# each place. ARGV[2]: holder. Returns now, whether all was taken; start, before and used of each window; held of each
# place.
_TAKE = (
    _HEAD
    + """
local windows, life, holder = numbers[1], numbers[2], ARGV[2]
local places = #KEYS - windows
local admitted, at = 1, 3
local reply = {now, 1}
for i = 1, windows do
    local size, limit, cost = numbers[at], numbers[at + 1], numbers[at + 2]
    at = at + 3
    local start, before, used = read(KEYS[i])
    if not start then
        start, before, used = now, 0, 0
    end
    local age = now - start
    if age < 0 then
        start = now
    elseif age >= 2 * size then
        start, before, used = now, 0, 0
    elseif age >= size then
        start, before, used = start + size, used, 0
    end
    if cost > 0 and used + before * (size - (now - start)) / size + cost > limit then
        admitted = 0
    end
    reply[3 * i], reply[3 * i + 1], reply[3 * i + 2] = start, before, used
end
for i = 1, places do
    local key = KEYS[windows + i]
    redis.call('ZREMRANGEBYSCORE', key, '-inf', now)
    local held = redis.call('ZCARD', key)
    if redis.call('ZSCORE', key, holder) then
        held = held - 1
    end
    if held >= numbers[at + i - 1] then
        admitted = 0
    end
    reply[2 + 3 * windows + i] = held
end
if admitted == 1 then
    for i = 1, windows do
        local size, cost = numbers[3 * i], numbers[3 * i + 2]
        if cost > 0 then
            reply[3 * i + 2] = reply[3 * i + 2] + cost
            write(KEYS[i], reply[3 * i], reply[3 * i + 1], reply[3 * i + 2], {'PX', 2 * size})
        end
    end
    for i = 1, places do
        redis.call('ZADD', KEYS[windows + i], now + life, holder)
        redis.call('PEXPIRE', KEYS[windows + i], life)
    end
end
reply[2] = admitted
return table.concat(reply, ' ')
"""
)

# KEYS: windows, then places. Numbers: number of windows; size, start and correction of each. ARGV[2]: holder.
_SETTLE = (
    _HEAD
    + """
local windows, at = numbers[1], 2
for i = 1, windows do
    local size, wanted, by = numbers[at], numbers[at + 1], numbers[at + 2]
    at = at + 3
    local start, before, used = read(KEYS[i])
    if not start or now - start >= 2 * size then
        if by > 0 then
            write(KEYS[i], now, 0, by, {'PX', 2 * size})
        end
    elseif by > 0 or start == wanted then
        write(KEYS[i], start, before, math.max(0, used + by), {'KEEPTTL'})
    elseif start == wanted + size then
        write(KEYS[i], start, math.max(0, before + by), used, {'KEEPTTL'})
    end
end
for i = windows + 1, #KEYS do
    redis.call('ZREM', KEYS[i], ARGV[2])
end
return 1
"""
)

# KEYS: places. Numbers: life of a place. ARGV[2]: holder.
_HOLD = (
    _HEAD
    + """
for i = 1, #KEYS do
    redis.call('ZADD', KEYS[i], now + numbers[1], ARGV[2])
    redis.call('PEXPIRE', KEYS[i], numbers[1])
end
return 1
"""
)

_SCRIPTS = {"take": _TAKE, "settle": _SETTLE, "hold": _HOLD}
# Redis may answer and yet take no writes: this one is refused then too.
_PROBE = ("take", 1, f"{PREFIX}probe", "1 0 1000 1000000 1", "")


class RedisCounters:
    """All requests of a process use one of these, on one event loop. `on_change` hears when Redis goes and comes."""

    def __init__(
        self,
        url: str,
        on_change: Callable[[bool], None],
        *,
        password_file: Path | None = None,
        timeout_s: float = 0.1,
    ) -> None:
        self._link = Link(url, password_file, timeout_s, _SCRIPTS, _PROBE, on_change)
        self._work: set[asyncio.Future[None]] = set()

    @property
    def is_up(self) -> bool:
        return self._link.is_up

    async def take(self, charges: Sequence[Charge], places: Sequence[Place], holder: str) -> Taken:
        numbers = [len(charges), int(PLACE_LIFE_S * 1000)]
        for charge in charges:
            numbers += (charge.size_ms, charge.limit, charge.cost)
        numbers += [place.limit for place in places]
        coming = self._link.send("take", _keys(charges, places), (_words(numbers), holder))
        try:
            reply = await asyncio.shield(coming)
        except asyncio.CancelledError:
            coming.add_done_callback(lambda done: self._give_back(done, charges, places, holder))
            raise
        return _taken(reply, charges)

    async def settle(self, corrections: Sequence[Correction], left: Sequence[Place], holder: str) -> None:
        numbers = [len(corrections)]
        for correction in corrections:
            numbers += (correction.charge.size_ms, correction.start_ms, correction.by)
        await self._link.send("settle", _keys([c.charge for c in corrections], left), (_words(numbers), holder))

    async def hold(self, places: Sequence[Place], holder: str) -> None:
        await self._link.send("hold", _keys((), places), (int(PLACE_LIFE_S * 1000), holder))

    async def close(self) -> None:
        await self._link.close()

    def _give_back(
        self, done: "asyncio.Future[bytes]", charges: Sequence[Charge], places: Sequence[Place], holder: str
    ) -> None:
        """What was taken for somebody who has left before the answer."""
        if done.cancelled() or done.exception() is not None:
            return
        taken = _taken(done.result(), charges)
        if taken.is_admitted:
            back = [
                Correction(charge, level.start_ms, -charge.cost)
                for charge, level in zip(charges, taken.levels, strict=True)
            ]
            work = asyncio.ensure_future(self.settle(back, places, holder))
            self._work.add(work)
            work.add_done_callback(self._end)

    def _end(self, work: "asyncio.Future[None]") -> None:
        self._work.discard(work)
        if not work.cancelled():
            # Redis is away: it goes by itself.
            work.exception()


def _taken(reply: bytes, charges: Sequence[Charge]) -> Taken:
    now_ms, is_admitted, *rest = map(int, reply.split())
    num_levels = 3 * len(charges)
    levels = tuple(Level(rest[i], rest[i + 1], rest[i + 2], now_ms) for i in range(0, num_levels, 3))
    return Taken(bool(is_admitted), levels, tuple(rest[num_levels:]))


def _words(numbers: Sequence[int]) -> str:
    return " ".join(map(str, numbers))


def _keys(charges: Sequence[Charge], places: Sequence[Place]) -> list[str]:
    return [PREFIX + thing.key for thing in (*charges, *places)]
