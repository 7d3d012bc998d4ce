"""Both ways to count: one contract, and each against the other and against the library's own sliding window."""

import asyncio
import random
import time
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
from limits import RateLimitItem, RateLimitItemPerDay, RateLimitItemPerMinute, RateLimitItemPerSecond, aio
from limits.aio.storage import MemoryStorage

from tuneloom.serve.limits_answer import refusal
from tuneloom.serve.limits_memory import MemoryCounters
from tuneloom.serve.limits_redis import RedisCounters
from tuneloom.serve.limits_window import Charge, Correction, Counters, Level, Place, Taken

pytestmark = pytest.mark.anyio


def charge(key: str = "k", limit: int = 100, cost: int = 1, *, seconds: int = 60) -> Charge:
    return Charge(key, RateLimitItemPerSecond(limit, seconds), "requests", "owner `ada`", cost)


def place(key: str = "p", limit: int = 2) -> Place:
    return Place(key, limit, "owner `ada`", "under way")


def open_redis(url: str) -> RedisCounters:
    """Patient: the machine may be busy."""
    return RedisCounters(url, lambda is_up: None, timeout_s=10)


@pytest.fixture(params=["memory", "redis"])
async def counters(request: pytest.FixtureRequest) -> AsyncIterator[Counters]:
    if request.param == "memory":
        yield MemoryCounters()
        return
    counters = open_redis(request.getfixturevalue("redis_url"))
    yield counters
    await counters.close()


async def test_as_many_are_let_in_as_the_limit_says_however_many_come_at_once(counters: Counters) -> None:
    taken = await asyncio.gather(*(counters.take([charge(limit=100)], (), "") for _ in range(500)))
    assert sum(each.is_admitted for each in taken) == 100
    assert taken[-1].levels[0].remaining(charge(limit=100)) == 0


async def test_who_is_refused_by_one_limit_takes_nothing_of_the_others(counters: Counters) -> None:
    wide, narrow = charge("wide", 10), charge("narrow", 1)
    first = await counters.take([wide, narrow], [place()], "a")
    second = await counters.take([wide, narrow], [place()], "b")
    third = await counters.take([wide, narrow], [place()], "c")

    assert [first.is_admitted, second.is_admitted, third.is_admitted] == [True, False, False]
    assert [level.used for level in third.levels] == [1, 1]
    assert third.held == (1,)


async def test_a_cost_of_nothing_only_looks(counters: Counters) -> None:
    await counters.take([charge(cost=7)], (), "")
    full = await counters.take([charge(limit=7, cost=0)], (), "")
    assert full.is_admitted and full.levels[0].used == 7
    assert (await counters.take([charge("other", cost=0)], (), "")).levels[0].used == 0


async def test_room_comes_back_when_the_answer_said(counters: Counters) -> None:
    fast = charge(limit=4, seconds=2)
    for _ in range(4):
        assert (await counters.take([fast], (), "")).is_admitted
    refused = await counters.take([fast], (), "")
    wait_ms = refused.levels[0].wait_ms(fast)
    assert not refused.is_admitted and wait_ms and 1000 < wait_ms <= 2001

    await asyncio.sleep(wait_ms / 1000)
    assert (await counters.take([fast], (), "")).is_admitted


async def test_what_was_not_used_comes_back_and_what_was_more_is_added(counters: Counters) -> None:
    big = charge(cost=60)
    start_ms = (await counters.take([big], (), "")).levels[0].start_ms
    assert not (await counters.take([big], (), "")).is_admitted

    await counters.settle([Correction(big, start_ms, -50)], (), "")
    assert (await counters.take([charge(cost=0)], (), "")).levels[0].used == 10
    await counters.settle([Correction(big, start_ms, 95)], (), "")
    assert (await counters.take([charge(cost=0)], (), "")).levels[0].used == 105
    await counters.settle([Correction(big, start_ms, -1000)], (), "")
    assert (await counters.take([charge(cost=0)], (), "")).levels[0].used == 0


async def test_a_refund_goes_to_the_span_that_it_was_taken_from(counters: Counters) -> None:
    fast = charge(limit=10, cost=10, seconds=2)
    old = (await counters.take([fast], (), "")).levels[0].start_ms
    await asyncio.sleep(2.2)
    now = await counters.take([charge(limit=10, seconds=2, cost=1)], (), "")
    assert (now.levels[0].before, now.levels[0].used) == (10, 1)

    await counters.settle([Correction(fast, old, -8)], (), "")
    level = (await counters.take([charge(limit=10, seconds=2, cost=0)], (), "")).levels[0]
    assert (level.before, level.used) == (2, 1)
    # A span that is over by now gets nothing.
    await counters.settle([Correction(fast, old - 2000, -8)], (), "")
    assert (await counters.take([charge(limit=10, seconds=2, cost=0)], (), "")).levels[0].used == 1


async def test_a_correction_of_what_nobody_knows_counts_only_upwards(counters: Counters) -> None:
    await counters.settle([Correction(charge(), 1, -5)], (), "")
    assert (await counters.take([charge(cost=0)], (), "")).levels[0].used == 0
    await counters.settle([Correction(charge(), 1, 5)], (), "")
    assert (await counters.take([charge(cost=0)], (), "")).levels[0].used == 5


async def test_places_are_held_until_they_are_left(counters: Counters) -> None:
    assert (await counters.take((), [place()], "a")).is_admitted
    assert (await counters.take((), [place()], "b")).is_admitted
    refused = await counters.take((), [place()], "c")
    assert (refused.is_admitted, refused.held) == (False, (2,))
    assert (await counters.take((), [place()], "a")).is_admitted

    await counters.settle((), [place()], "a")
    assert (await counters.take((), [place()], "c")).is_admitted
    await counters.hold([place()], "d")
    assert (await counters.take((), [place(limit=9)], "e")).held == (3,)


async def test_a_dead_gateway_leaves_its_places(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tuneloom.serve.limits_redis.PLACE_LIFE_S", 1.5)
    dead, alive = (open_redis(redis_url) for _ in range(2))
    try:
        await dead.take((), [place(limit=1)], "dead")
        await dead.close()
        assert not (await alive.take((), [place(limit=1)], "a")).is_admitted
        await asyncio.sleep(1.6)
        assert (await alive.take((), [place(limit=1)], "a")).is_admitted
        # A holder that says so stays.
        for _ in range(3):
            await asyncio.sleep(0.6)
            await alive.hold([place(limit=1)], "a")
        assert not (await alive.take((), [place(limit=1)], "b")).is_admitted
    finally:
        await alive.close()


async def test_memory_counts_as_redis_does(redis_url: str) -> None:
    """The same random steps, at the times of Redis."""
    now_ms = 0
    memory, redis = MemoryCounters(lambda: now_ms), open_redis(redis_url)
    rng, seen = random.Random(7), [0, 0]
    starts: list[tuple[Charge, int]] = []
    try:
        for step in range(300):
            if step % 50 == 49:
                await asyncio.sleep(rng.choice([0.3, 1.1, 2.2]))
            charges = [
                charge(key, limit=20, cost=rng.randrange(6), seconds=seconds)
                for key, seconds in (("a", 1), ("b", 2))
                if rng.random() < 0.8
            ]
            places, holder = [place(limit=3)] if rng.random() < 0.5 else [], str(rng.randrange(5))
            theirs = await redis.take(charges, places, holder)
            now_ms = theirs.levels[0].now_ms if charges else now_ms
            ours = await memory.take(charges, places, holder)
            if charges:
                assert ours == theirs, step
                seen[ours.is_admitted] += 1
                starts += [(each, level.start_ms) for each, level in zip(charges, ours.levels, strict=True)]
            # What was taken just now exists for both; of what is older, each may have forgotten it a moment earlier.
            fresh = [(c, v.start_ms) for c, v in zip(charges, ours.levels, strict=True) if ours.is_admitted and c.cost]
            corrections = [Correction(*rng.choice(starts[-8:]), -rng.randrange(7))] if starts else []
            corrections = [Correction(*rng.choice(fresh), rng.randrange(4))] if fresh and step % 3 == 0 else corrections
            for counters in (redis, memory) if rng.random() < 0.5 else ():
                await counters.settle(corrections, places, holder)
    finally:
        await redis.close()
    assert min(seen) > 30


async def test_a_window_decides_as_the_librarys_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """`limits`' own sliding window counter is the plain way; ours only takes several limits in one step."""
    item = RateLimitItemPerSecond(10, 1)
    # Both begin within the same span: theirs start at whole seconds of the clock.
    began = time.time()
    clock, ahead_s = time.time, 1.001 - began % 1
    now = began + ahead_s
    monkeypatch.setattr(time, "time", lambda: now)
    theirs = aio.strategies.SlidingWindowCounterRateLimiter(MemoryStorage())
    ours = MemoryCounters(lambda: int(now * 1000))
    agreed = []
    for _ in range(35):
        now = clock() + ahead_s
        pair = (await theirs.hit(item, "k"), (await ours.take([charge(limit=10, seconds=1)], (), "")).is_admitted)
        agreed.append(pair[0] == pair[1])
        await asyncio.sleep(0.05)
    # Theirs takes the time twice.
    assert sum(agreed) >= 33, agreed


def test_the_arithmetic_of_a_window() -> None:
    def level(before: int, used: int, age_ms: int) -> Level:
        return Level(1_000_000, before, used, 1_000_000 + age_ms)

    minute = Charge("k", RateLimitItemPerMinute(10), "requests", "x")
    assert level(0, 0, 0).wait_ms(minute) == 0
    assert level(0, 10, 0).wait_ms(minute) == 60_001
    assert level(10, 5, 15_000).count(60_000) == 12
    assert level(10, 5, 15_000).wait_ms(minute) == 15_001
    assert level(0, 11, 30_000).remaining(minute) == 0
    assert level(0, 3, 10_000).reset_ms(60_000) == 90_001
    assert level(0, 1, 10_000).reset_ms(60_000) == 50_001
    assert level(3, 0, 10_000).reset_ms(60_000) == 30_001
    assert level(3, 0, 40_001).reset_ms(60_000) == 0
    assert level(0, 0, 10_000).reset_ms(60_000) == 0
    too_much = Charge("k", RateLimitItemPerMinute(10), "requests", "x", cost=11)
    assert level(0, 0, 0).wait_ms(too_much) is None
    assert level(5, 7, -10).rolled(60_000) == Level(999_990, 5, 7, 999_990)
    assert level(5, 7, 60_001).rolled(60_000) == Level(1_060_000, 7, 0, 1_060_001)
    assert level(5, 7, 120_000).rolled(60_000) == Level(1_120_000, 0, 0, 1_120_000)


@pytest.mark.parametrize(
    "per, before, used, told_s, said",
    [
        (RateLimitItemPerMinute, 0, 100, 60, "in 1m53.401s."),
        (RateLimitItemPerMinute, 90, 5, 56.001, "in 56.001s."),
        (RateLimitItemPerDay, 0, 100, 163_296.001, "in 45h21m36.001s."),
    ],
)
def test_a_client_is_told_of_a_wait_that_openais_takes_where_two_of_them_do(
    per: type[RateLimitItem], before: int, used: int, told_s: float, said: str
) -> None:
    tokens = Charge("k", per(100), "tokens", "x", cost=90)
    error = refusal([tokens], (), Taken(False, (Level(1_000_000, before, used, 1_000_000),), ()))
    assert error.retry_after_s == told_s and error.message.endswith(said)


@pytest.mark.parametrize(
    "before, used, age_ms", [(9, 3, 100), (10, 10, 59_999), (0, 10, 1), (10, 0, 0), (4, 9, 30_000)]
)
def test_after_the_wait_there_is_room_and_just_before_there_is_none(before: int, used: int, age_ms: int) -> None:
    minute = Charge("k", RateLimitItemPerMinute(10), "requests", "x", cost=4)
    start = 1_000_000
    wait_ms = Level(start, before, used, start + age_ms).wait_ms(minute)
    assert wait_ms

    def fits(after_ms: int) -> bool:
        level = Level(start, before, used, start + age_ms + after_ms).rolled(60_000)
        return level.count(60_000) + 4 <= 10

    assert fits(wait_ms) and not fits(wait_ms - 1)


async def test_windows_that_are_over_leave_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tuneloom.serve.limits_memory.SWEEP_EVERY", 10)
    now_ms = 0
    counters = MemoryCounters(lambda: now_ms)
    for i in range(50):
        now_ms = i * 1000
        await counters.take([charge(str(i), seconds=1)], (), "")
    assert len(counters._windows) < 15


async def test_scripts_that_somebody_flushed_are_loaded_again(redis_url: str) -> None:
    import redis

    counters = open_redis(redis_url)
    try:
        await counters.take([charge()], (), "")
        with redis.Redis.from_url(redis_url) as admin:
            admin.script_flush()
        taken: list[Taken] = await asyncio.gather(*(counters.take([charge()], (), "") for _ in range(5)))
        assert max(each.levels[0].used for each in taken) == 6
        assert counters.is_up
    finally:
        await counters.close()


async def test_windows_of_one_owner_share_a_key_that_lives_as_long_as_the_longest(redis_url: str) -> None:
    import redis

    day, second = charge("rd:owner:ada", seconds=86_400), charge("rm:owner:ada", seconds=3)
    counters = open_redis(redis_url)
    with redis.Redis.from_url(redis_url) as admin:
        try:
            start_ms = (await counters.take([day, second], (), "")).levels[1].start_ms
            await counters.take([second], (), "")
            await counters.settle([Correction(second, start_ms, 3)], (), "")
            (key,) = admin.scan_iter()
            assert admin.pttl(key) > 86_400_000
            both = admin.strlen(key)
            assert [level.used for level in (await counters.take([day, second], (), "")).levels] == [2, 6]

            # What is over leaves, and the rest is as it was.
            await asyncio.sleep(6.1)
            assert (await counters.take([day], (), "")).levels[0].used == 3
            assert admin.strlen(key) == both / 2
            assert (await counters.take([replace(second, cost=0)], (), "")).levels[0].used == 0
        finally:
            await counters.close()


async def test_the_dead_hold_no_place_that_is_short(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tuneloom.serve.limits_redis.PLACE_LIFE_S", 3.0)
    counters = open_redis(redis_url)
    try:
        for holder in "abc":
            assert (await counters.take((), [place(limit=4)], holder)).is_admitted
        await asyncio.sleep(1.8)
        await counters.hold([place(limit=4)], "c")
        await asyncio.sleep(1.8)
        taken = [await counters.take((), [place(limit=4)], holder) for holder in "defg"]
        assert [each.is_admitted for each in taken] == [True, True, True, False]
        assert taken[-1].held == (4,)
    finally:
        await counters.close()


async def test_all_keys_of_redis_end_by_themselves(redis_url: str) -> None:
    import redis

    counters = open_redis(redis_url)
    try:
        taken = await counters.take([charge()], [place()], "a")
        await counters.settle([Correction(charge("new"), taken.levels[0].start_ms, 5)], (), "")
    finally:
        await counters.close()
    with redis.Redis.from_url(redis_url) as admin:
        lives = {key: admin.pttl(key) for key in admin.scan_iter()}
    assert len(lives) == 3 and min(lives.values()) > 0
