import threading
import time

import pytest

from tuneloom.control.deployment import ControlLoop
from tuneloom.errors import TuneloomError


class Counter:
    def __init__(self) -> None:
        self.ticks = 0
        self.ticked = threading.Event()
        self.hold = threading.Event()
        self.hold.set()
        self.error: Exception | None = None

    def tick(self) -> None:
        self.ticks += 1
        self.ticked.set()
        self.hold.wait(20)
        if self.error:
            raise self.error


@pytest.fixture
def counter():
    return Counter()


def start(counter: Counter, **options: object) -> ControlLoop:
    options = {"tick_s": 60.0, "sweep": lambda: None, **options}
    loop = ControlLoop([counter], options.pop("sweep"), options.pop("tick_s"), **options)
    loop.start()
    return loop


def wait_for(condition, limit_s: float = 20.0) -> None:
    until = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


def test_a_poke_makes_it_tick_at_once(counter):
    loop = start(counter)
    wait_for(lambda: counter.ticks == 1)
    loop.poke()
    wait_for(lambda: counter.ticks == 2)
    loop.stop()


def test_a_poke_during_a_tick_is_not_lost(counter):
    counter.hold.clear()
    loop = start(counter)
    assert counter.ticked.wait(20)
    loop.poke()
    counter.hold.set()
    wait_for(lambda: counter.ticks == 2)
    loop.stop()


def test_it_sweeps_now_and_then(counter):
    swept = []
    loop = start(counter, tick_s=0.01, sweep=lambda: swept.append(1), sweep_interval_s=0.02)
    wait_for(lambda: len(swept) > 2)
    loop.stop()


def test_it_outlives_an_error_and_stays_healthy(counter, caplog):
    counter.error = ValueError("the store is away")
    loop = start(counter, tick_s=0.01)
    wait_for(lambda: counter.ticks > 2)
    loop.check_health()
    assert "the store is away" in caplog.text
    loop.stop()


def test_an_error_of_one_part_keeps_none_of_the_others_from_its_tick(counter):
    failing = Counter()
    failing.error = ValueError("its table is away")
    loop = ControlLoop([failing, counter], lambda: None, 60.0)
    loop.start()
    wait_for(lambda: counter.ticks == 1)
    assert failing.ticks == 1
    loop.stop()


def test_a_stuck_tick_and_an_ended_loop_are_unhealthy(counter):
    counter.hold.clear()
    loop = start(counter, stuck_after_s=0.05)
    assert counter.ticked.wait(20)
    time.sleep(0.1)
    with pytest.raises(TuneloomError, match="stuck"):
        loop.check_health()
    counter.hold.set()
    loop.stop()
    with pytest.raises(TuneloomError, match="ended"):
        loop.check_health()
