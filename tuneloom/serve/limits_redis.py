"""Limits counted in Redis, for all gateways together: one script for all that a request takes, all or nothing.

The time is that of Redis, so that gateways need not agree on one. Every key has the same hash tag and an end.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from tuneloom.serve.limits_link import Link
from tuneloom.serve.limits_window import Charge, Correction, Level, Place, Taken

PREFIX = "{tuneloom}:"
# A gateway that died leaves its places after so long; the others renew theirs before.
PLACE_LIFE_S = 30.0

_NOW = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
"""

# KEYS: windows, then places. ARGV: number of windows, life of a place, holder; size, limit and cost of each window;
# limit of each place. Returns now, whether all was taken; start, before and used of each window; held of each place.
_TAKE = (
    _NOW
    + """
local windows, life, holder = tonumber(ARGV[1]), tonumber(ARGV[2]), ARGV[3]
local places = #KEYS - windows
local admitted, at = 1, 4
local starts, befores, useds, costs, sizes, held = {}, {}, {}, {}, {}, {}
for i = 1, windows do
    local size, limit, cost = tonumber(ARGV[at]), tonumber(ARGV[at + 1]), tonumber(ARGV[at + 2])
    at = at + 3
    local found = redis.call('HMGET', KEYS[i], 's', 'b', 'u')
    local start = tonumber(found[1] or now)
    local before, used = tonumber(found[2] or 0), tonumber(found[3] or 0)
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
    starts[i], befores[i], useds[i], costs[i], sizes[i] = start, before, used, cost, size
end
for i = 1, places do
    local key = KEYS[windows + i]
    redis.call('ZREMRANGEBYSCORE', key, '-inf', now)
    held[i] = redis.call('ZCARD', key)
    if redis.call('ZSCORE', key, holder) then
        held[i] = held[i] - 1
    end
    if held[i] >= tonumber(ARGV[at + i - 1]) then
        admitted = 0
    end
end
if admitted == 1 then
    for i = 1, windows do
        if costs[i] > 0 then
            useds[i] = useds[i] + costs[i]
            redis.call('HSET', KEYS[i], 's', starts[i], 'b', befores[i], 'u', useds[i])
            redis.call('PEXPIRE', KEYS[i], 2 * sizes[i])
        end
    end
    for i = 1, places do
        redis.call('ZADD', KEYS[windows + i], now + life, holder)
        redis.call('PEXPIRE', KEYS[windows + i], life)
    end
end
local reply = {now, admitted}
for i = 1, windows do
    reply[#reply + 1] = starts[i]
    reply[#reply + 1] = befores[i]
    reply[#reply + 1] = useds[i]
end
for i = 1, places do
    reply[#reply + 1] = held[i]
end
return reply
"""
)

# KEYS: windows, then places. ARGV: number of windows, holder; size, start and correction of each window.
_SETTLE = (
    _NOW
    + """
local windows, holder, at = tonumber(ARGV[1]), ARGV[2], 3
for i = 1, windows do
    local size, start, by = tonumber(ARGV[at]), tonumber(ARGV[at + 1]), tonumber(ARGV[at + 2])
    at = at + 3
    local found = redis.call('HMGET', KEYS[i], 's', 'b', 'u')
    local begun = tonumber(found[1] or '')
    if not begun then
        if by > 0 then
            redis.call('HSET', KEYS[i], 's', now, 'b', 0, 'u', by)
            redis.call('PEXPIRE', KEYS[i], 2 * size)
        end
    elseif by > 0 or begun == start then
        redis.call('HSET', KEYS[i], 'u', math.max(0, tonumber(found[3]) + by))
    elseif begun == start + size then
        redis.call('HSET', KEYS[i], 'b', math.max(0, tonumber(found[2]) + by))
    end
end
for i = windows + 1, #KEYS do
    redis.call('ZREM', KEYS[i], holder)
end
return 1
"""
)

# KEYS: places. ARGV: life of a place, holder.
_HOLD = (
    _NOW
    + """
for i = 1, #KEYS do
    redis.call('ZADD', KEYS[i], now + ARGV[1], ARGV[2])
    redis.call('PEXPIRE', KEYS[i], ARGV[1])
end
return 1
"""
)

_SCRIPTS = {"take": _TAKE, "settle": _SETTLE, "hold": _HOLD}
# Redis may answer and yet take no writes: this one is refused then too.
_PROBE = ("take", 1, f"{PREFIX}probe", 1, 0, "", 1000, 1_000_000, 1)


class RedisCounters:
    """All requests of a process use one of these, on one event loop. `on_change` hears when Redis goes and comes."""

    def __init__(self, url: str, password_file: Path | None, on_change: Callable[[bool], None]) -> None:
        self._link = Link(url, password_file, _SCRIPTS, _PROBE, on_change)

    @property
    def is_up(self) -> bool:
        return self._link.is_up

    async def take(self, charges: Sequence[Charge], places: Sequence[Place], holder: str) -> Taken:
        arguments: list[object] = [len(charges), int(PLACE_LIFE_S * 1000), holder]
        for charge in charges:
            arguments += (charge.size_ms, charge.limit, charge.cost)
        arguments += [place.limit for place in places]
        now_ms, is_admitted, *rest = await self._link.run("take", _keys(charges, places), arguments)
        num_levels = 3 * len(charges)
        levels = [Level(*rest[i : i + 3], now_ms) for i in range(0, num_levels, 3)]
        return Taken(bool(is_admitted), tuple(levels), tuple(rest[num_levels:]))

    async def settle(self, corrections: Sequence[Correction], left: Sequence[Place], holder: str) -> None:
        arguments: list[object] = [len(corrections), holder]
        for correction in corrections:
            arguments += (correction.charge.size_ms, correction.start_ms, correction.by)
        await self._link.run("settle", _keys([c.charge for c in corrections], left), arguments)

    async def hold(self, places: Sequence[Place], holder: str) -> None:
        await self._link.run("hold", _keys((), places), [int(PLACE_LIFE_S * 1000), holder])

    async def close(self) -> None:
        await self._link.close()


def _keys(charges: Sequence[Charge], places: Sequence[Place]) -> list[str]:
    return [PREFIX + thing.key for thing in (*charges, *places)]
