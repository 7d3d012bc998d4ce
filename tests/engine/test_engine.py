import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tests.engine.conftest import GREEDY, fetch_local, ref_of, request
from tuneloom.engine.base import SequenceRequest
from tuneloom.engine.engine import LocalEngine
from tuneloom.engine.options import EngineConfig
from tuneloom.errors import AdapterRejected, ContextLengthExceeded, InvalidRequest, Overloaded, TuneloomError

pytestmark = pytest.mark.anyio

LONG = replace(GREEDY, max_tokens=400)


@asynccontextmanager
async def running(base: Path, fetch: Callable = fetch_local, **settings: object) -> AsyncIterator[LocalEngine]:
    config = EngineConfig(**{"dtype": "fp32", "threads": 1, "max_sequences": 4, **settings})
    engine = LocalEngine(base, config, fetch)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()


async def answer(engine: LocalEngine, asked: SequenceRequest) -> list[int]:
    return [token.token_id async for output in engine.generate(asked) for token in output.tokens]


async def until(is_true: Callable[[], bool], timeout_s: float = 10) -> None:
    async with asyncio.timeout(timeout_s):
        while not is_true():  # noqa: ASYNC110 - what the step thread does is no event of the loop
            await asyncio.sleep(0.005)


async def test_concurrent_answers_equal_generate(tiny_base, tiny_adapters, tiny_prompts, plain_generate):
    folders = [None, *tiny_adapters]
    async with running(tiny_base) as engine:
        asked = [
            request(f"r{i}", tiny_prompts[i], adapter=ref_of(folders[i % 5]) if folders[i % 5] else None)
            for i in range(10)
        ]
        answers = await asyncio.gather(*(answer(engine, each) for each in asked))
    for i, found in enumerate(answers):
        assert found == plain_generate(tiny_base, tiny_prompts[i], 8, folders[i % 5])


async def test_closing_a_generation_frees_its_place(tiny_base, tiny_prompts):
    async with running(tiny_base, max_sequences=1) as engine:
        async with aclosing(engine.generate(request("gone", tiny_prompts[1], params=LONG))) as outputs:
            async for _ in outputs:
                break
        assert len(await answer(engine, request("next", tiny_prompts[2]))) == 8
        await until(lambda: engine.stats().running == 0)
        assert engine.stats().tokens_generated < 400


async def test_cancelling_the_reader_frees_its_place(tiny_base, tiny_prompts):
    async with running(tiny_base, max_sequences=1) as engine:
        task = asyncio.create_task(answer(engine, request("gone", tiny_prompts[1], params=LONG)))
        await until(lambda: engine.stats().running == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: engine.stats().running == 0)


async def test_abort_ends_a_generation_with_an_error_and_unknown_ids_are_fine(tiny_base, tiny_prompts):
    async with running(tiny_base) as engine:
        task = asyncio.create_task(answer(engine, request("r", tiny_prompts[1], params=LONG)))
        await until(lambda: engine.stats().running == 1)
        await engine.abort("r")
        await engine.abort("unknown")
        with pytest.raises(TuneloomError, match="aborted"):
            await task


async def test_requests_beyond_the_queue_are_refused_at_once(tiny_base, tiny_prompts):
    async with running(tiny_base, max_sequences=1, max_waiting=1) as engine:
        tasks = [asyncio.create_task(answer(engine, request(f"r{i}", tiny_prompts[1], params=LONG))) for i in range(2)]
        await until(lambda: engine.stats().running == 1)
        with pytest.raises(Overloaded, match="wait already") as error:
            await answer(engine, request("late", tiny_prompts[1]))
        assert error.value.retry_after_s
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_an_owner_that_fills_the_queue_locks_nobody_out(tiny_base, tiny_prompts):
    def ask(id: str, owner: str) -> asyncio.Task:
        return asyncio.create_task(answer(engine, request(id, tiny_prompts[1], owner=owner)))

    async with running(tiny_base, max_sequences=1, max_waiting=3) as engine:
        flood = [ask(f"flood{i}", "flood") for i in range(4)]
        await until(lambda: len(engine._live) == 4)
        others = [ask(f"other{i}", "other") for i in range(2)]
        await until(lambda: len(engine._live) == 6)
        for owner in ("flood", "other"):
            with pytest.raises(Overloaded, match="wait already"):
                await ask("late", owner)
        assert [len(found) for found in await asyncio.gather(*flood, *others)] == [8] * 6
        assert not engine._num_by_owner


async def test_wrong_requests_are_refused_before_they_wait(tiny_base, tiny_prompts):
    async with running(tiny_base, max_length=64) as engine:
        assert engine.max_length == 64
        with pytest.raises(ContextLengthExceeded):
            await answer(engine, request("r", [5] * 64))
        assert await answer(engine, request("r", [5] * 63)) != []
        assert await answer(engine, request("none", [5], params=replace(GREEDY, max_tokens=0))) == []


async def test_an_id_can_run_once_at_a_time(tiny_base, tiny_prompts):
    async with running(tiny_base) as engine:
        async with aclosing(engine.generate(request("r", tiny_prompts[1], params=LONG))) as outputs:
            await anext(outputs)
            with pytest.raises(InvalidRequest, match="running"):
                await answer(engine, request("r", tiny_prompts[1]))
        assert await answer(engine, request("r", tiny_prompts[1]))


async def test_drain_lets_answers_end_and_takes_no_new_ones(tiny_base, tiny_prompts):
    async with running(tiny_base) as engine:
        task = asyncio.create_task(answer(engine, request("r", tiny_prompts[1])))
        await until(lambda: bool(engine._live))
        await engine.drain(30)
        assert len(await task) == 8
        with pytest.raises(Overloaded, match="shutting down"):
            await answer(engine, request("late", tiny_prompts[1]))


async def test_drain_and_close_end_what_takes_too_long(tiny_base, tiny_prompts):
    async with running(tiny_base, max_sequences=1) as engine:
        tasks = [asyncio.create_task(answer(engine, request(f"r{i}", tiny_prompts[1], params=LONG))) for i in range(3)]
        await until(lambda: engine.stats().running == 1)
        await engine.drain(0.01)
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(result, Overloaded)
    assert engine._thread is not None and not engine._thread.is_alive()


async def test_adapters_can_be_loaded_pinned_and_evicted(tiny_base, tiny_adapters, tiny_prompts):
    ref = ref_of(tiny_adapters[0], rank=4)
    async with running(tiny_base) as engine:
        await engine.load_adapter(ref)
        await engine.pin_adapter(ref, True)
        assert [(state.tier, state.is_pinned) for state in engine.adapters()] == [("host", True)]
        await answer(engine, request("r", tiny_prompts[1], adapter=ref))
        await until(lambda: engine.stats().running == 0)
        assert [(state.tier, state.in_use) for state in engine.adapters()] == [("slot", 0)]
        await engine.evict_adapter(ref.sha256)
        await engine.evict_adapter("unknown")
        assert engine.adapters() == []


async def test_loading_reports_a_bad_adapter_and_one_that_takes_too_long(tiny_base, tiny_adapters, tmp_path):
    gate = threading.Event()

    def fetch(ref):
        if ref.uri != str(tmp_path):
            gate.wait(10)
        return Path(ref.uri)

    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    async with running(tiny_base, fetch, adapter_timeout_s=0.1) as engine:
        with pytest.raises(AdapterRejected, match="adapter_config"):
            await engine.load_adapter(ref_of(tmp_path))
        with pytest.raises(Overloaded, match="still loading"):
            await engine.load_adapter(ref_of(tiny_adapters[0]))
        gate.set()
        await engine.load_adapter(ref_of(tiny_adapters[0]))


async def test_a_bug_outside_the_step_ends_what_runs_and_not_the_engine(tiny_base, tiny_prompts):
    async with running(tiny_base) as engine:
        task = asyncio.create_task(answer(engine, request("r", tiny_prompts[1], params=LONG)))
        await until(lambda: engine.stats().running == 1)
        engine._post(lambda core: 1 / 0)
        with pytest.raises(TuneloomError, match="engine failed"):
            await task
        assert len(await answer(engine, request("after", tiny_prompts[1]))) == 8


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_a_dead_step_thread_is_told_to_readers_and_to_the_health_check(tiny_base, tiny_prompts):
    def die(core):
        raise SystemExit

    async with running(tiny_base) as engine:
        task = asyncio.create_task(answer(engine, request("r", tiny_prompts[1], params=LONG)))
        await until(lambda: engine.stats().running == 1)
        engine._post(die)
        with pytest.raises(TuneloomError, match="stopped"):
            await task
        with pytest.raises(TuneloomError, match="Restart"):
            engine.stats()


async def test_a_base_that_cannot_be_loaded_fails_the_start(tmp_path: Path):
    engine = LocalEngine(tmp_path, EngineConfig(), fetch_local)
    with pytest.raises(InvalidRequest, match=r"config\.json"):
        await engine.start()
    with pytest.raises(Overloaded, match="starting"):
        engine.stats()
    await engine.close()
