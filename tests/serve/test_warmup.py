"""What a new replica loads before it takes requests."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from tuneloom.domain import AdapterRef
from tuneloom.errors import Overloaded
from tuneloom.serve.placement import rendezvous
from tuneloom.serve.warmup import Usage, Use, load_all, share

pytestmark = pytest.mark.anyio


def make_ref(number: int, size_bytes: int = 10) -> AdapterRef:
    return AdapterRef(sha256=f"{number:064x}", uri=f"jobs/{number}", rank=4, size_bytes=size_bytes)


REFS = [make_ref(number) for number in range(60)]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_what_is_used_more_and_later_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tuneloom.serve.warmup.MAX_USES", 3)
    clock = Clock()
    usage = Usage(clock)
    for number in (0, 0, 0, 1, 1, 2):
        usage.add(REFS[number])
    assert [use.adapter for use in usage.uses()] == REFS[:3]
    clock.now = 3600.0
    usage.add(REFS[1])
    usage.add(REFS[3])
    assert [use.adapter for use in usage.uses()][:2] == [REFS[1], REFS[3]] and len(usage.uses()) == 3


def test_a_newcomer_takes_the_adapters_that_will_come_to_it_most_used_first() -> None:
    used = {"old-1": [Use(ref, float(i)) for i, ref in enumerate(REFS)], "old-2": [Use(REFS[7], 1000.0)]}
    mine = share(used, "new", count=100, size_bytes=10**9)
    assert set(mine) == {ref for ref in REFS if rendezvous(ref.sha256, ["old-1", "old-2", "new"])[0] == "new"}
    rates = {ref.sha256: i + (1000.0 if i == 7 else 0.0) for i, ref in enumerate(REFS)}
    assert mine == sorted(mine, key=lambda ref: -rates[ref.sha256])
    assert share(used, "new", count=3, size_bytes=10**9) == mine[:3]
    assert share(used, "new", count=100, size_bytes=25) == mine[:2]
    assert share({}, "new", count=100, size_bytes=10**9) == []


def test_one_that_does_not_fit_leaves_room_for_smaller_ones() -> None:
    refs = [make_ref(number, 100 if number % 2 else 10) for number in range(60)]
    used = {"old": [Use(ref, 1.0) for ref in refs]}
    assert {ref.size_bytes for ref in share(used, "new", count=3, size_bytes=50)} == {10}


async def test_an_adapter_that_cannot_be_loaded_does_not_keep_others_from_it() -> None:
    loaded: list[AdapterRef] = []

    def load(broken: AdapterRef) -> Callable[[AdapterRef], Awaitable[None]]:
        async def one(ref: AdapterRef) -> None:
            await asyncio.sleep(0)
            if ref == broken:
                raise Overloaded("The store does not answer.")
            loaded.append(ref)

        return one

    await load_all(REFS[:6], load(REFS[2]))
    assert loaded == [*REFS[:2], *REFS[3:6]]
