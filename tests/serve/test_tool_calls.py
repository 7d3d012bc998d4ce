"""Tools and response formats by the real OpenAI client, over the application, a replica and the real engine.

The model is tiny and random: what it answers means nothing, but its form holds.
"""

import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
from openai import AsyncOpenAI
from pydantic import BaseModel, ConfigDict

from tests.serve.conftest import BASE, PEPPER, FakeBase, Service
from tests.serve.test_replica import unwritten
from tests.templates import FAMILIES, write_family
from tests.tiny import make_base
from tuneloom.config import EngineSettings, Settings
from tuneloom.engine.text import Codec
from tuneloom.generation import Frame, GenerationRequest
from tuneloom.serve.callers import Callers
from tuneloom.serve.ingress import Context, make_app
from tuneloom.serve.replica import Replica, engine_config
from tuneloom.store import Store

pytestmark = pytest.mark.anyio
HI: Any = [{"role": "user", "content": "hello"}]


class GetWeather(BaseModel):
    """Weather of a city."""

    model_config = ConfigDict(extra="forbid")
    city: Literal["Paris", "São Paulo"]
    days: Literal[1, 2, 3]
    is_metric: bool


class Verdict(BaseModel):
    model_config = ConfigDict(extra="forbid")
    label: Literal["serious", "sarcastic"]
    is_sure: bool


WEATHER: Any = openai.pydantic_function_tool(GetWeather)
NOW: Any = {"type": "function", "function": {"name": "now", "strict": True}}
NAMED: Any = {"type": "function", "function": {"name": "GetWeather"}}


@pytest.fixture(scope="module")
def long_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With room for tools, which its vocabulary spells out."""
    return make_base(tmp_path_factory.mktemp("base") / "long", max_length=2048)


@pytest.fixture(params=FAMILIES)
async def served(
    request: pytest.FixtureRequest, long_base: Path, tmp_path: Path, settings: Settings, store: Store
) -> AsyncIterator[AsyncOpenAI]:
    """A client of a service whose base is of one family."""
    async with serve(request.param, long_base, tmp_path, settings, store) as client:
        yield client


@pytest.fixture
async def plain(long_base: Path, tmp_path: Path, settings: Settings, store: Store) -> AsyncIterator[AsyncOpenAI]:
    async with serve("plain", long_base, tmp_path, settings, store) as client:
        yield client


class ServedBase(FakeBase):
    """A base whose answers are those of a replica."""

    replica: Replica

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Frame, None]:
        async with aclosing(self.replica.generate(request)) as frames:
            async for frame in frames:
                yield frame


class serve:
    """A client of a service on a real engine, as a context."""

    def __init__(self, family: str, long_base: Path, folder: Path, settings: Settings, store: Store) -> None:
        self._settings, self._store = settings, store
        self._base = write_family(folder / family, long_base, family)

    async def __aenter__(self) -> AsyncOpenAI:
        from tuneloom.engine.engine import LocalEngine

        options = EngineSettings(dtype="fp32", threads=1, max_sequences=4, adapter_slots=1)
        self._engine = LocalEngine(self._base, engine_config(options), _no_adapter)
        await self._engine.start()
        callers = Callers(lambda name: True, every_s=5)
        base = ServedBase()
        base.replica = Replica(
            self._engine,
            Codec.load(self._base),
            callers,
            unwritten(),
            context_length=self._engine.max_length,
            max_parallel=4,
        )
        app = make_app(Context(self._settings, self._store, PEPPER, lambda _: base, lambda: None))
        service = Service(self._settings, self._store, base, app, [])
        self._client = service.openai(service.key())
        return self._client

    async def __aexit__(self, *error: object) -> None:
        await self._client.close()
        await self._engine.close()


def _no_adapter(ref: Any) -> Path:
    raise AssertionError(ref)


def check(call: Any) -> None:
    assert call.id.startswith("call_") and call.type == "function"
    if call.function.name == "now":
        assert json.loads(call.function.arguments) == {}
    else:
        GetWeather.model_validate_json(call.function.arguments, strict=True)


async def test_every_family_calls_as_it_is_told_and_goes_on_with_the_results(served: AsyncOpenAI) -> None:
    await required_calls_fit_streamed_or_not(served)
    await a_named_call_stops_and_is_parsed_by_the_client(served)
    await a_conversation_goes_on_after_a_call(served)
    await an_answer_that_may_call_is_text_or_calls(served)


async def required_calls_fit_streamed_or_not(served: AsyncOpenAI) -> None:
    options: Any = {"model": BASE, "messages": HI, "tools": [WEATHER, NOW], "tool_choice": "required", "seed": 3}
    options |= {"parallel_tool_calls": False, "temperature": 1.5}
    answer = await served.chat.completions.create(**options)
    choice = answer.choices[0]
    assert (choice.message.content, choice.finish_reason) == (None, "tool_calls")
    assert choice.message.tool_calls and len(choice.message.tool_calls) == 1
    check(choice.message.tool_calls[0])
    assert answer.usage and answer.usage.completion_tokens > 2

    async with served.chat.completions.stream(**options) as stream:
        kinds = [event.type async for event in stream]
        streamed = (await stream.get_final_completion()).choices[0]
    assert "tool_calls.function.arguments.done" in kinds
    assert streamed.finish_reason == "tool_calls" and streamed.message.tool_calls
    assert _plain(streamed.message.tool_calls[0]) == _plain(choice.message.tool_calls[0])


async def a_named_call_stops_and_is_parsed_by_the_client(served: AsyncOpenAI) -> None:
    answer = await served.chat.completions.parse(
        model=BASE, messages=HI, tools=[WEATHER, NOW], tool_choice=NAMED, temperature=1
    )
    choice = answer.choices[0]
    assert choice.finish_reason == "stop" and choice.message.tool_calls
    (call,) = choice.message.tool_calls
    assert isinstance(call.function.parsed_arguments, GetWeather)


async def a_conversation_goes_on_after_a_call(served: AsyncOpenAI) -> None:
    options: Any = {"model": BASE, "tools": [WEATHER], "max_completion_tokens": 200}
    first = await served.chat.completions.create(messages=HI, tool_choice=NAMED, **options)
    called = first.choices[0].message
    assert called.tool_calls
    result = {"role": "tool", "tool_call_id": called.tool_calls[0].id, "content": "clear"}
    options["max_completion_tokens"] = 20

    second = await served.chat.completions.create(messages=[*HI, called, result], tool_choice="none", **options)
    assert second.choices[0].message.tool_calls is None
    assert isinstance(second.choices[0].message.content, str)
    assert first.usage and second.usage and second.usage.prompt_tokens > first.usage.prompt_tokens + 8


async def an_answer_that_may_call_is_text_or_calls(served: AsyncOpenAI) -> None:
    answer = await served.chat.completions.create(
        model=BASE,
        messages=HI,
        tools=[WEATHER, NOW],
        n=4,
        seed=2,
        temperature=2,
        max_completion_tokens=40,
        logprobs=True,
    )
    for choice in answer.choices:
        for call in choice.message.tool_calls or ():
            assert choice.finish_reason == "length" or check(call) is None
        assert choice.message.content is not None or choice.message.tool_calls


async def test_the_marks_of_a_call_bias_a_free_answer_into_one(
    long_base: Path, tmp_path: Path, settings: Settings, store: Store
) -> None:
    async with serve("qwen", long_base, tmp_path, settings, store) as client:
        mark = Codec.load(tmp_path / "qwen").marks.ids["<tool_call>"]
        options: Any = {"model": BASE, "messages": HI, "tools": [WEATHER], "logit_bias": {str(mark): 100}}
        options |= {"parallel_tool_calls": False, "logprobs": True, "stop": ["Paris", '"']}
        answer = await client.chat.completions.create(**options)
        assert answer.choices[0].finish_reason == "tool_calls"
        assert answer.choices[0].message.tool_calls and answer.choices[0].message.content is None
        assert answer.choices[0].logprobs and not answer.choices[0].logprobs.content

        chunks = [chunk async for chunk in await client.chat.completions.create(stream=True, **options)]
        deltas = [call for c in chunks for call in c.choices[0].delta.tool_calls or ()]
        assert deltas[0].id and deltas[0].function and deltas[0].type == "function"
        assert (deltas[0].function.name, deltas[0].function.arguments) == ("GetWeather", "")
        assert all(delta.id is None and delta.type is None for delta in deltas[1:])
        GetWeather.model_validate_json("".join(d.function.arguments or "" for d in deltas if d.function))
        assert [c.choices[0].delta.content for c in chunks if c.choices[0].delta.content] == []
        assert chunks[-1].choices[0].finish_reason == "tool_calls"


async def test_several_calls_in_one_answer_are_numbered(plain: AsyncOpenAI) -> None:
    answer = await plain.chat.completions.create(
        model=BASE, messages=HI, tools=[NOW], tool_choice="required", seed=1, max_completion_tokens=150, temperature=2
    )
    calls = answer.choices[0].message.tool_calls
    assert calls and len({call.id for call in calls}) == len(calls)
    async with plain.chat.completions.stream(
        model=BASE, messages=HI, tools=[NOW], tool_choice="required", seed=1, n=2, temperature=2
    ) as stream:
        async for _ in stream:
            pass
        streamed = stream.current_completion_snapshot
    for choice in streamed.choices:
        assert [call.function.name for call in choice.message.tool_calls or ()][:1] == ["now"]


async def test_a_response_format_is_parsed_by_the_client(plain: AsyncOpenAI) -> None:
    answer = await plain.chat.completions.parse(model=BASE, messages=HI, response_format=Verdict, temperature=2)
    assert isinstance(answer.choices[0].message.parsed, Verdict)
    async with plain.chat.completions.stream(model=BASE, messages=HI, response_format=Verdict) as stream:
        final = await stream.get_final_completion()
    assert isinstance(final.choices[0].message.parsed, Verdict)


async def test_tools_beside_a_response_format_give_either(plain: AsyncOpenAI) -> None:
    schema: Any = {"type": "json_schema", "json_schema": {"name": "v", "schema": Verdict.model_json_schema()}}
    options: Any = {"model": BASE, "messages": HI, "tools": [WEATHER], "response_format": schema}
    for seed in range(4):
        choice = (await plain.chat.completions.create(seed=seed, temperature=2, **options)).choices[0]
        if choice.message.tool_calls:
            check(choice.message.tool_calls[0])
        else:
            Verdict.model_validate_json(choice.message.content or "")
    none = await plain.chat.completions.create(tool_choice="none", **options)
    Verdict.model_validate_json(none.choices[0].message.content or "")


@pytest.mark.parametrize("value", [{"not": {"type": "string"}}, {"const": 2**53 + 1}])
async def test_a_strict_schema_that_cannot_be_enforced_is_a_400_and_a_loose_one_any_object(
    plain: AsyncOpenAI, value: Any
) -> None:
    odd: Any = {"type": "object", "properties": {"a": value}, "required": ["a"]}
    tool: Any = {"type": "function", "function": {"name": "f", "parameters": odd, "strict": True}}
    options: Any = {"model": BASE, "messages": HI, "tool_choice": "required", "max_completion_tokens": 100}
    with pytest.raises(openai.BadRequestError) as caught:
        await plain.chat.completions.create(tools=[NOW, tool], **options)
    assert caught.value.param == "tools[1].function.parameters"
    tool["function"]["strict"] = False
    answer = await plain.chat.completions.create(tools=[tool], **options)
    assert answer.choices[0].message.tool_calls
    assert answer.choices[0].message.tool_calls[0].function.arguments.startswith("{")

    form: Any = {"type": "json_schema", "json_schema": {"name": "n", "schema": odd}}
    with pytest.raises(openai.BadRequestError) as caught:
        await plain.chat.completions.create(model=BASE, messages=HI, response_format=form)
    assert caught.value.param == "response_format"


def _plain(call: Any) -> tuple[str, str]:
    return call.function.name, call.function.arguments
