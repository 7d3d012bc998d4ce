"""A short soak: `bench.soak` is the long one."""

import pytest

from bench.soak import Traffic, leftovers, rss_mb
from tests.engine.conftest import fetch_local, ref_of
from tuneloom.engine.engine import LocalEngine
from tuneloom.engine.options import EngineConfig

pytestmark = pytest.mark.anyio

LARGEST_GROWTH_MB = 64


async def test_requests_that_end_in_every_way_leave_nothing_behind(tiny_base, tiny_adapters):
    config = EngineConfig(
        dtype="fp32",
        threads=1,
        max_sequences=8,
        max_step_tokens=64,
        adapter_slots=2,
        host_cache_bytes=1 << 20,
        prefix_cache_bytes=4 << 20,
    )
    engine = LocalEngine(tiny_base, config, fetch_local)
    await engine.start()
    try:
        traffic = Traffic(engine, [ref_of(folder) for folder in tiny_adapters], at_once=24)
        await traffic.send(300)
        warm_mb = rss_mb()
        await traffic.send(700)
        assert rss_mb() - warm_mb < LARGEST_GROWTH_MB
        assert not any((await leftovers(engine)).values())
        assert {"stop", "length", "closed", "aborted", "cancelled", "deadline_exceeded"} <= traffic.outcomes.keys()
        assert traffic.outcomes.total() == 1000
    finally:
        await engine.close()
