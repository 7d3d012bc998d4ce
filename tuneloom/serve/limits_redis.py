"""Limits counted in Redis, for all gateways together: one script for all that a request takes, all or nothing.

The time is that of Redis, so that gateways need not agree on one. Every key has the same hash tag and an end.
"""

import asyncio
import functools
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tuneloom.serve.limits_link import Link
from tuneloom.serve.limits_window import Charge, Correction, Level, Place, Taken

PREFIX = "{tuneloom}:"
# A gateway that died leaves its places after so long; the others renew theirs before.
PLACE_LIFE_S = 30.0

# A subject, such as a key or an owner, has all its windows in one string of numbers: name, start, before, used and size
# of each. It lives as long as any of them counts; one that is over is left out with the next change of another. ARGV[1]
# holds all numbers, the first of which says how many of KEYS are subjects.
_HEAD = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local function unpacked(text)
    local list = {struct.unpack('<' .. string.rep('d', #text / 8), text)}
    list[#list] = nil
    return list
end
local function packed(list)
    return struct.pack('<' .. string.rep('d', #list), unpack(list))
end
local numbers = unpacked(ARGV[1])
local subjects, states, changed = numbers[1], {}, {}
for i = 1, subjects do
    local found = redis.call('GET', KEYS[i])
    states[i] = found and unpacked(found) or {}
end
local function find(subject, name)
    local state = states[subject]
    for at = 1, #state, 5 do
        if state[at] == name then
            return at, state[at + 1], state[at + 2], state[at + 3]
        end
    end
end
local function put(subject, at, name, start, before, used, size)
    local state = states[subject]
    at = at or #state + 1
    state[at], state[at + 1], state[at + 2], state[at + 3], state[at + 4] = name, start, before, used, size
    changed[subject] = true
end
local function save()
    for subject in pairs(changed) do
        local state, life = states[subject], 0
        for at = #state - 4, 1, -5 do
            local left = state[at + 1] + 2 * state[at + 4] - now
            life = math.max(life, left)
            if left <= 0 then
                for _ = 1, 5 do
                    table.remove(state, at)
                end
            end
        end
        redis.call('PSETEX', KEYS[subject], life, packed(state))
    end
end
"""

# KEYS: subjects, then places. Numbers: subjects, windows, life of a place; subject, name, size, limit and cost of each
# window; limit of each place. ARGV[2]: holder. Returns now, whether all was taken; start, before and used of each
# window; held of each place. The dead among the holders are only looked for when places are short.
_TAKE = (
    _HEAD
    + """
local windows, life, holder = numbers[2], numbers[3], ARGV[2]
local places, at = #KEYS - subjects, 4
local admitted, reply, spots = 1, {now, 1}, {}
for i = 1, windows do
    local size, limit, cost = numbers[at + 2], numbers[at + 3], numbers[at + 4]
    local spot, start, before, used = find(numbers[at], numbers[at + 1])
    local age = spot and now - start or 0
    if not spot or age >= 2 * size then
        start, before, used = now, 0, 0
    elseif age < 0 then
        start = now
    elseif age >= size then
        start, before, used = start + size, used, 0
    end
    if cost > 0 and used + math.floor(before * (size - (now - start)) / size) + cost > limit then
        admitted = 0
    end
    reply[3 * i], reply[3 * i + 1], reply[3 * i + 2], spots[i] = start, before, used, spot
    at = at + 5
end
local first, is_exact = 2 + 3 * windows, {}
for i = 1, places do
    local key, limit = KEYS[subjects + i], numbers[at + i - 1]
    local held = redis.call('ZCARD', key)
    if held + 1 >= limit then
        redis.call('ZREMRANGEBYSCORE', key, '-inf', now)
        held = redis.call('ZCARD', key) - (redis.call('ZSCORE', key, holder) and 1 or 0)
        is_exact[i] = true
    end
    if held >= limit then
        admitted = 0
    end
    reply[first + i] = held
end
if admitted == 1 then
    for i = 1, windows do
        local from = 5 * i - 1
        local cost, used = numbers[from + 4], reply[3 * i + 2] + numbers[from + 4]
        if cost > 0 then
            reply[3 * i + 2] = used
            put(numbers[from], spots[i], numbers[from + 1], reply[3 * i], reply[3 * i + 1], used, numbers[from + 2])
        end
    end
    save()
end
for i = 1, places do
    local key, was_there = KEYS[subjects + i], false
    if admitted == 1 then
        was_there = redis.call('ZADD', key, now + life, holder) == 0
        redis.call('PEXPIRE', key, life)
    elseif not is_exact[i] then
        was_there = redis.call('ZSCORE', key, holder)
    end
    if was_there and not is_exact[i] then
        reply[first + i] = reply[first + i] - 1
    end
end
reply[2] = admitted
return packed(reply)
"""
)

# KEYS: subjects, then places. Numbers: subjects, corrections; subject, name, size, start and correction of each.
# ARGV[2]: holder.
_SETTLE = (
    _HEAD
    + """
for i = 1, numbers[2] do
    local at = 5 * i - 2
    local subject, name, size, wanted, by = unpack(numbers, at, at + 4)
    local spot, start, before, used = find(subject, name)
    if not spot or now - start >= 2 * size then
        if by > 0 then
            put(subject, spot, name, now, 0, by, size)
        end
    elseif by > 0 or start == wanted then
        put(subject, spot, name, start, before, math.max(0, used + by), size)
    elseif start == wanted + size then
        put(subject, spot, name, start, math.max(0, before + by), used, size)
    end
end
save()
for i = subjects + 1, #KEYS do
    redis.call('ZREM', KEYS[i], ARGV[2])
end
return 1
"""
)

# KEYS: places. Numbers: no subjects, life of a place. ARGV[2]: holder.
_HOLD = (
    _HEAD
    + """
for i = 1, #KEYS do
    redis.call('ZREMRANGEBYSCORE', KEYS[i], '-inf', now)
    redis.call('ZADD', KEYS[i], now + numbers[2], ARGV[2])
    redis.call('PEXPIRE', KEYS[i], numbers[2])
end
return 1
"""
)

_SCRIPTS = {"take": _TAKE, "settle": _SETTLE, "hold": _HOLD}
# Redis may answer and yet take no writes: this one is refused then too.
_PROBE = ("take", 1, f"{PREFIX}probe", struct.pack("<8d", 1, 1, 0, 1, 0, 1000, 1_000_000, 1), "")


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
        subjects: dict[str, int] = {}
        numbers = [0, len(charges), int(PLACE_LIFE_S * 1000)]
        for charge in charges:
            numbers += (*_spot(charge.key, subjects), charge.size_ms, charge.limit, charge.cost)
        numbers += [place.limit for place in places]
        coming = self._send("take", subjects, places, numbers, holder)
        try:
            reply = await asyncio.shield(coming)
        except asyncio.CancelledError:
            coming.add_done_callback(lambda done: self._give_back(done, charges, places, holder))
            raise
        return _taken(reply, charges)

    async def settle(self, corrections: Sequence[Correction], left: Sequence[Place], holder: str) -> None:
        subjects: dict[str, int] = {}
        numbers = [0, len(corrections)]
        for correction in corrections:
            charge = correction.charge
            numbers += (*_spot(charge.key, subjects), charge.size_ms, correction.start_ms, correction.by)
        await self._send("settle", subjects, left, numbers, holder)

    async def hold(self, places: Sequence[Place], holder: str) -> None:
        await self._send("hold", {}, places, [0, int(PLACE_LIFE_S * 1000)], holder)

    def _send(
        self, script: str, subjects: Mapping[str, int], places: Sequence[Place], numbers: list[int], holder: str
    ) -> "asyncio.Future[bytes]":
        numbers[0] = len(subjects)
        keys = [PREFIX + subject for subject in subjects] + [PREFIX + place.key for place in places]
        return self._link.send(script, keys, (struct.pack(f"<{len(numbers)}d", *numbers), holder))

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
    now_ms, is_admitted, *rest = map(int, struct.unpack(f"<{len(reply) // 8}d", reply))
    num_levels = 3 * len(charges)
    levels = tuple(Level(rest[i], rest[i + 1], rest[i + 2], now_ms) for i in range(0, num_levels, 3))
    return Taken(bool(is_admitted), levels, tuple(rest[num_levels:]))


def _spot(key: str, subjects: dict[str, int]) -> tuple[int, int]:
    """Where a charge is counted: its subject's number, which is given to a new one, and its name as a number."""
    subject, name = _split(key)
    return subjects.setdefault(subject, len(subjects) + 1), name


@functools.lru_cache(maxsize=4096)
def _split(key: str) -> tuple[str, int]:
    """`tm:owner:ada` is `tm` of `owner:ada`; a key of another form is a subject by itself."""
    name, _, subject = key.partition(":")
    if len(name) != 2 or not subject:
        name, subject = "", key
    return subject, int.from_bytes(name.encode("latin-1"))
