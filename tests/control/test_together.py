"""Reads that are shared: fewer than are asked for, and none older than its question."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from tuneloom.control.together import Together

pytestmark = pytest.mark.anyio


class Store:
    """Says which of its reads it was, and what had been written when that began."""

    def __init__(self) -> None:
        self.written = 0
        self.reads = 0
        self.may_answer = asyncio.Event()

    async def read(self) -> int:
        self.reads += 1
        seen = self.written
        await self.may_answer.wait()
        return seen


async def ask(together: Together[int], read: Callable[[], Awaitable[int]], key: str = "ada") -> "asyncio.Task[int]":
    task = asyncio.create_task(together.get(key, read))
    for _ in range(3):
        await asyncio.sleep(0)
    return task


async def test_who_asks_during_a_read_hears_what_was_written_since_it_began() -> None:
    store, together = Store(), Together[int]()
    first = await ask(together, store.read)
    store.written = 1
    others = [await ask(together, store.read) for _ in range(20)]
    assert store.reads == 1

    store.may_answer.set()
    assert await first == 0
    assert await asyncio.gather(*others) == [1] * 20
    assert store.reads == 2
    assert not together._running and not together._next


async def test_reads_of_a_name_keep_apart_and_the_first_does_not_wait() -> None:
    store, together, clock = Store(), Together[int](apart_s=1.0), asyncio.get_running_loop().time
    store.may_answer.set()
    began = clock()
    await together.get("ada", store.read)
    await together.get("bob", store.read)
    assert clock() - began < 1
    store.written = 1
    answers = await asyncio.gather(*(together.get("ada", store.read) for _ in range(5)))
    assert clock() - began >= 0.99
    assert (answers, store.reads) == ([1] * 5, 3)


async def test_each_name_is_read_by_itself() -> None:
    store, together = Store(), Together[int]()
    await ask(together, store.read, "ada")
    await ask(together, store.read, "bob")
    assert store.reads == 2
    store.may_answer.set()


async def test_who_leaves_takes_nobody_along() -> None:
    store, together = Store(), Together[int]()
    leaver, stayer = await ask(together, store.read), await ask(together, store.read)
    leaver.cancel()
    await asyncio.wait([leaver])
    store.may_answer.set()
    assert await stayer == 0


async def test_a_failure_is_everybodys_and_the_next_read_is_a_new_one() -> None:
    together = Together[int]()

    async def fail() -> int:
        await asyncio.sleep(0)
        raise OSError("away")

    results = await asyncio.gather(*(together.get("ada", fail) for _ in range(3)), return_exceptions=True)
    assert [type(result) for result in results] == [OSError] * 3
    store = Store()
    store.may_answer.set()
    assert await together.get("ada", store.read) == 0
