import asyncio
import threading
import time
from collections.abc import Callable

import pytest

from tests.serve.outages import Clock
from tuneloom.errors import ModelNotFound, Overloaded, TuneloomError
from tuneloom.serve import reads as module
from tuneloom.serve.reads import Reads, StoreHealth

pytestmark = pytest.mark.anyio
HANG_S = 20.0


def failing(error: Exception) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


async def test_a_read_answers_and_is_noted() -> None:
    reads = Reads(1.0)
    assert reads.silent_s == float("inf")
    assert await reads.read(lambda: 7, has_older=False) == 7
    assert reads.silent_s < 60


@pytest.mark.parametrize("error", [ConnectionRefusedError(111, "refused"), TimeoutError("late"), OSError("io")])
async def test_a_failing_connection_is_told_as_overloaded(error: OSError) -> None:
    reads = Reads(1.0)
    with pytest.raises(Overloaded) as caught:
        await reads.read(failing(error), has_older=True)
    assert caught.value.retry_after_s == 1.0
    assert reads.silent_s == float("inf")


async def test_what_the_store_says_is_raised_as_it_is_and_counts_as_an_answer() -> None:
    reads = Reads(1.0)
    with pytest.raises(TuneloomError, match="failed"):
        await reads.read(failing(TuneloomError("It failed.")), has_older=True)
    assert reads.silent_s == float("inf")
    with pytest.raises(ModelNotFound):
        await reads.read(failing(ModelNotFound("No.")), has_older=True)
    assert reads.silent_s < 60


async def test_only_the_first_request_waits_for_a_slow_store_until_it_answers_in_time_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "SLOW_WAIT_S", 0.0)
    hold, reads = threading.Event(), Reads(0.5)
    for _ in range(3):
        with pytest.raises(Overloaded, match="in time"):
            await reads.read(lambda: hold.wait(HANG_S), has_older=True)
    assert reads._is_slow
    hold.set()
    assert await reads.read(lambda: 7, has_older=False) == 7
    assert not reads._is_slow


async def test_a_request_with_nothing_older_waits_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = Reads(0.01)
    assert await reads.read(lambda: time.sleep(0.1) or 7, has_older=False) == 7
    monkeypatch.setattr(module, "MAX_WAIT_S", 0.01)
    with pytest.raises(Overloaded):
        await reads.read(lambda: time.sleep(0.2), has_older=False)


async def test_reads_that_hang_take_a_bounded_number_of_threads_and_those_that_waited_do_not_start() -> None:
    hold, reads, begun = threading.Event(), Reads(0.05), []

    def hang() -> None:
        begun.append(threading.get_ident())
        hold.wait(HANG_S)

    answers = await asyncio.gather(
        *(reads.read(hang, has_older=True) for _ in range(5 * module.THREADS)), return_exceptions=True
    )
    hold.set()
    assert all(isinstance(answer, Overloaded) for answer in answers)
    assert len(begun) <= module.THREADS
    assert await reads.read(lambda: 7, has_older=False) == 7
    assert len(begun) <= module.THREADS


async def test_a_process_is_of_use_for_a_while_after_the_stores_last_answer() -> None:
    clock, errors = Clock(), []

    def probe() -> None:
        if errors:
            raise errors[0]

    health = StoreHealth(probe, 300.0, clock)
    await health.check()
    errors.append(ConnectionRefusedError(111, "refused"))
    clock.now += 300
    await health.check()
    clock.now += 1
    with pytest.raises(Overloaded, match="301 s"):
        await health.check()
    errors.clear()
    await health.check()
    errors.append(Overloaded("It is away."))
    await health.check()


async def test_a_probe_that_hangs_is_given_up() -> None:
    clock, hold = Clock(), threading.Event()
    health = StoreHealth(lambda: hold.wait(HANG_S), 0.0, clock)
    clock.now += 1
    async with asyncio.timeout(10):
        with pytest.raises(Overloaded):
            await health.check(timeout_s=0.05)
    hold.set()
