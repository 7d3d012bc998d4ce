"""What requests take is counted whatever ends them, with a scripted engine and with a real one."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.serve.conftest import BASE, PEPPER, FakeBase, Service, eventually
from tests.serve.test_replica import HI, ScriptedEngine, make_replica, make_request
from tuneloom.config import EngineSettings, Settings, UsageSettings
from tuneloom.domain import AdapterRef, Amounts, Target, Used, version_id
from tuneloom.engine.base import SequenceOutput, SequenceRequest
from tuneloom.engine.text import Codec
from tuneloom.errors import Overloaded, TuneloomError
from tuneloom.generation import ChatPrompt, Finished, Frame, GenerationRequest, TextPrompt
from tuneloom.serve.callers import Callers
from tuneloom.serve.ingress import Context, make_app
from tuneloom.serve.replica import Replica, engine_config
from tuneloom.serve.usage import Recorder
from tuneloom.store import Store, usage
from tuneloom.store.usage_writer import UsageWriter

pytestmark = pytest.mark.anyio
PRICED = UsageSettings.model_validate({"prices": {BASE: {"input": 2.0, "cached": 1.0, "output": 10.0}}})
YEARS = ("2000-01-01T00", "2100-01-01T00")


class Timed(ScriptedEngine):
    """Takes a second of the device for a prompt and one for each token."""

    async def generate(self, request: SequenceRequest) -> AsyncIterator[SequenceOutput]:
        request.meter.device_s += 1.0
        async with aclosing(super().generate(request)) as outputs:
            async for output in outputs:
                request.meter.device_s += len(output.tokens)
                yield output


@pytest.fixture(scope="session")
def codec(tiny_base: Path) -> Codec:
    return Codec.load(tiny_base)


@pytest.fixture
def recorder(store: Store) -> Recorder:
    return Recorder(UsageWriter(store.records), BASE, PRICED, flush_s=0.1)


def counted(store: Store) -> dict[Used, Amounts]:
    return {one.used: one.amounts for one in usage.read(store.records, *YEARS)}


async def only(store: Store, recorder: Recorder) -> Amounts:
    await recorder.stop()
    (amounts,) = counted(store).values()
    return amounts


async def read_all(frames: AsyncGenerator[Frame, None]) -> list[Frame]:
    async with aclosing(frames) as stream:
        return [frame async for frame in stream]


async def test_a_whole_answer_is_counted_as_its_usage_says(codec: Codec, store: Store, recorder: Recorder):
    replica = make_replica(Timed(codec, "left right"), codec, recorder=recorder)
    request = replace(make_request(), key_id="key_1", model="bot@v3")
    last = (await read_all(replica.generate(request)))[-1]
    assert isinstance(last, Finished)
    said = last.usage
    assert said.device_s == 1 + said.completion_tokens
    await recorder.stop()
    prompt, cached, answer = said.prompt_tokens, said.cached_tokens, said.completion_tokens
    assert counted(store) == {
        Used(kind="inference", base=BASE, model="bot@v3", key_id="key_1"): Amounts(
            requests=1,
            input_tokens=prompt,
            cached_tokens=cached,
            output_tokens=answer,
            device_us=round(said.device_s * 1e6),
            cost_nano=1000 * (2 * (prompt - cached) + cached + 10 * answer),
        )
    }


async def test_several_prompts_and_choices_count_each_prompt_once(codec: Codec, store: Store, recorder: Recorder):
    replica = make_replica(Timed(codec, "left right"), codec, recorder=recorder)
    request = make_request(TextPrompt("one two"), TextPrompt("three"), n=3)
    await read_all(replica.generate(request))
    amounts = await only(store, recorder)
    prompts = sum(len(codec.encode_text(text)) for text in ("one two", "three"))
    answers = 6 * (len(codec.encode_text("left right")) + 1)
    assert (amounts.requests, amounts.input_tokens, amounts.output_tokens) == (1, prompts, answers)
    assert (amounts.device_s, amounts.cached_tokens) == (6 + answers, 4)


async def test_tools_are_part_of_the_prompt(codec: Codec, store: Store, recorder: Recorder):
    tool = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
    prompt = ChatPrompt(HI.messages, (tool,))
    replica = make_replica(Timed(codec, "left"), codec, context_length=4096, recorder=recorder)
    await read_all(replica.generate(make_request(prompt)))
    assert (await only(store, recorder)).input_tokens == len(codec.encode_chat(prompt.messages, prompt.tools))


@pytest.mark.parametrize("end", ["closed", "cancelled", "caller died"])
async def test_an_answer_that_nobody_waits_for_is_counted_as_far_as_it_came(
    codec: Codec, store: Store, recorder: Recorder, end: str
):
    replica = make_replica(Timed(codec, "left right up down", pause_s=0.02), codec, recorder=recorder)
    stream = replica.generate(make_request(), "gateway-2" if end == "caller died" else "")

    async def read() -> None:
        with contextlib.suppress(TuneloomError):
            await read_all(stream)

    if end == "closed":
        await anext(stream)
        await anext(stream)
        await stream.aclose()
    else:
        task = asyncio.create_task(read())
        if end == "cancelled":
            await asyncio.sleep(0.1)
            task.cancel()
        await asyncio.wait([task])
    amounts = await only(store, recorder)
    assert amounts.requests == 1 and amounts.input_tokens == len(codec.encode_chat(HI.messages))
    assert 1 <= amounts.output_tokens < len(codec.encode_text("left right up down")) + 1
    assert amounts.device_s == amounts.output_tokens + 1


async def test_an_error_in_the_middle_does_not_make_it_free(codec: Codec, store: Store, recorder: Recorder):
    replica = make_replica(Timed(codec, "left right", error=Overloaded("Too late.")), codec, recorder=recorder)
    with pytest.raises(Overloaded):
        await read_all(replica.generate(make_request()))
    amounts = await only(store, recorder)
    assert (amounts.requests, amounts.output_tokens) == (1, 1)


async def test_what_is_refused_is_not_counted(codec: Codec, store: Store, recorder: Recorder):
    class Full(ScriptedEngine):
        async def generate(self, request: SequenceRequest) -> AsyncIterator[SequenceOutput]:
            raise Overloaded("Full.")
            yield

    with pytest.raises(Overloaded):
        await read_all(make_replica(Full(codec), codec, recorder=recorder).generate(make_request()))
    await recorder.stop()
    assert counted(store) == {}


async def test_a_long_answer_is_written_out_while_it_runs(codec: Codec, store: Store, recorder: Recorder):
    """Who dies now loses the last moments only."""
    replica = make_replica(Timed(codec, "left right " * 50, pause_s=0.01), codec, context_length=512, recorder=recorder)
    recorder.start()
    task = asyncio.create_task(read_all(replica.generate(make_request(max_tokens=400))))
    await eventually(lambda: any(amounts.output_tokens > 3 for amounts in counted(store).values()))
    assert not task.done()
    task.cancel()
    await asyncio.wait([task])
    assert (await only(store, recorder)).requests == 1


async def test_the_time_of_a_step_that_ends_after_its_reader_is_counted(codec: Codec, store: Store, recorder: Recorder):
    engine = Timed(codec, "left right up down", pause_s=0.02)
    stream = make_replica(engine, codec, recorder=recorder).generate(make_request())
    await anext(stream)
    await stream.aclose()
    engine.requests[0].meter.device_s += 50.0
    assert (await only(store, recorder)).device_s > 50


async def test_a_store_that_is_away_ends_no_request_and_loses_nothing(
    codec: Codec, store: Store, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
):
    def fail(*writes: object) -> None:
        raise Overloaded("The store is away.")

    replica = make_replica(Timed(codec, "left right"), codec, recorder=recorder)
    recorder.start()
    with monkeypatch.context() as patch:
        patch.setattr(store.records.documents, "commit", fail)
        for _ in range(3):
            await read_all(replica.generate(make_request()))
            await asyncio.sleep(0.15)
        assert counted(store) == {}
    await eventually(lambda: bool(counted(store)))
    assert (await only(store, recorder)).requests == 3


@pytest.mark.parametrize(
    ("version", "name"),
    [
        (None, "tiny/llama"),
        (version_id("ada", "v1", 12), "v1@v12"),
        ("ft:tiny/llama:ada:bot:abc12345:ckpt-step-40", "ft:tiny/llama:ada:bot:abc12345:ckpt-step-40"),
    ],
)
def test_use_is_counted_under_a_name_that_stays(version: str | None, name: str):
    assert Target(name="alias", base="tiny/llama", version=version).stable_name == name


class RealBase(FakeBase):
    replica: Any = None

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Frame, None]:
        async with aclosing(self.replica.generate(request)) as frames:
            async for frame in frames:
                yield frame


async def test_calls_by_the_client_are_counted_with_their_key_and_version(
    settings: Settings, store: Store, tiny_base: Path, tiny_adapters: list[Path]
):
    """From the key in the header to the row in the store, on a real engine: whole, streamed, and given up."""
    from tuneloom.engine.engine import LocalEngine

    def fetch(ref: AdapterRef) -> Path:
        return tiny_adapters[0]

    options = EngineSettings(dtype="fp32", threads=1, max_sequences=4, adapter_slots=1)
    engine = LocalEngine(tiny_base, engine_config(options), fetch)
    await engine.start()
    recorder = Recorder(UsageWriter(store.records), BASE, UsageSettings(price_per_hour=3600))
    base, callers = RealBase(), Callers(lambda name: True)
    codec = Codec.load(tiny_base)
    base.replica = Replica(engine, codec, callers, recorder, context_length=engine.max_length, max_parallel=4)
    service = Service(
        settings, store, base, make_app(Context(settings, store, PEPPER, lambda _: base, lambda: None)), []
    )
    service.add_version("ada", "bot", 2)
    key = service.key()
    messages: Any = [{"role": "user", "content": "hello"}]
    options_of = {"max_tokens": 6, "temperature": 0}
    async with service.openai(key) as client:
        whole = await client.chat.completions.create(model=BASE, messages=messages, **options_of)
        stream = await client.chat.completions.create(
            model="bot", messages=messages, stream=True, stream_options={"include_usage": True}, **options_of
        )
        streamed = [chunk async for chunk in stream][-1].usage
    given_up = replace(make_request(TextPrompt("one two three"), max_tokens=30, temperature=0), model=BASE)
    frames = base.replica.generate(given_up)
    await anext(frames)
    await frames.aclose()
    await engine.close()
    await recorder.stop()

    found = counted(store)
    (id,) = [stored.value.id for stored in store.records.keys.query()]
    by_key = {(used.model, used.key_id): amounts for used, amounts in found.items()}
    assert by_key.keys() == {(BASE, id), ("bot@v2", id), (BASE, "")}
    assert whole.usage and streamed
    for said, amounts in ((whole.usage, by_key[BASE, id]), (streamed, by_key["bot@v2", id])):
        assert (amounts.requests, amounts.input_tokens) == (1, said.prompt_tokens)
        assert amounts.output_tokens == said.completion_tokens
        assert amounts.cost == pytest.approx(amounts.device_s, abs=1e-6) and amounts.device_s > 0
    assert by_key[BASE, ""].input_tokens == len(codec.encode_text("one two three"))
    assert sum(a.device_s for a in found.values()) == pytest.approx(engine.stats().busy_s, abs=1e-5)
