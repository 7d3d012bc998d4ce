"""Prompts in, frames out, around a scripted engine and the real codec of a tiny base."""

import asyncio
import functools
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from tests.serve.conftest import eventually
from tuneloom.config import EngineSettings, UsageSettings
from tuneloom.domain import AdapterRef
from tuneloom.engine.base import EngineStats, SequenceOutput, SequenceRequest, TokenOutput
from tuneloom.engine.text import Codec
from tuneloom.errors import ContextLengthExceeded, InvalidRequest, Overloaded, TuneloomError
from tuneloom.generation import (
    ChatPrompt,
    Delta,
    Finished,
    Frame,
    GenerationRequest,
    Prompt,
    ResponseFormat,
    SamplingParams,
    Started,
    TextPrompt,
    TokenPrompt,
)
from tuneloom.serve.callers import Callers
from tuneloom.serve.replica import Replica, engine_config
from tuneloom.serve.usage import Recorder
from tuneloom.store.base import BlobNotFound
from tuneloom.store.records import Records
from tuneloom.store.usage_writer import UsageWriter

pytestmark = pytest.mark.anyio
ALIVE = {"gateway-1"}
HI = ChatPrompt(({"role": "user", "content": "hello"},))


class ScriptedEngine:
    """Says `text` to everybody, token by token; `pause_s` before each; ends by a stop id unless the tokens run out."""

    def __init__(self, codec: Codec, text: str = "", *, pause_s: float = 0.0, error: Exception | None = None) -> None:
        self._ids = codec.encode_text(text)
        self._stop_id = min(codec.stop_ids)
        self._pause_s = pause_s
        self._error = error
        self.requests: list[SequenceRequest] = []
        self.running = 0
        self.most_running = 0
        self.steps = 0

    async def generate(self, request: SequenceRequest) -> AsyncIterator[SequenceOutput]:
        self.requests.append(request)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            ids = [*self._ids, self._stop_id][: request.params.max_tokens]
            for index, id in enumerate(ids):
                await asyncio.sleep(self._pause_s)
                if self._error and index:
                    raise self._error
                is_last = index == len(ids) - 1
                reason = None if not is_last else "stop" if id == self._stop_id else "length"
                logprob = None if request.params.logprobs is None else -float(index)
                yield SequenceOutput((TokenOutput(id, logprob),), reason, cached_tokens=2)
        finally:
            self.running -= 1

    def stats(self) -> EngineStats:
        return EngineStats(self.running, 0, 0, 0, self.steps, 0.0, 0, 0, 0)


@pytest.fixture(scope="session")
def codec(tiny_base: Path) -> Codec:
    return Codec.load(tiny_base)


def make_replica(
    engine: Any, codec: Codec, *, context_length: int = 64, max_parallel: int = 8, recorder: Recorder | None = None
) -> Replica:
    callers = Callers(lambda name: name in ALIVE, every_s=0.05)
    return Replica(
        engine,
        codec,
        callers,
        recorder or unwritten(),
        context_length=context_length,
        max_parallel=max_parallel,
    )


def unwritten() -> Recorder:
    """Counts and never writes it out."""
    return Recorder(UsageWriter(cast(Records, None)), "tiny/llama", UsageSettings())


def make_request(*prompts: Prompt, echo: bool = False, **params: Any) -> GenerationRequest:
    return GenerationRequest(
        "req", prompts or (HI,), SamplingParams(**{"max_tokens": 32, **params}), owner="ada", echo=echo
    )


async def run(replica: Replica, request: GenerationRequest) -> list[Frame]:
    return await collect(replica.generate(request))


async def collect(frames: AsyncGenerator[Frame, None]) -> list[Frame]:
    async with aclosing(frames) as stream:
        return [frame async for frame in stream]


def deltas(frames: list[Frame], index: int = 0) -> list[Delta]:
    return [delta for frame in frames if isinstance(frame, list) for delta in frame if delta.index == index]


def text(frames: list[Frame], index: int = 0) -> str:
    return "".join(delta.text for delta in deltas(frames, index))


async def test_frames_are_started_then_text_then_usage(codec: Codec) -> None:
    engine = ScriptedEngine(codec, "hello café 🙂")
    frames = await run(make_replica(engine, codec), make_request())

    prompt_tokens = len(codec.encode_chat(HI.messages))
    assert frames[0] == Started(prompt_tokens)
    assert (text(frames), deltas(frames)[-1].finish_reason) == ("hello café 🙂", "stop")
    last = frames[-1]
    assert isinstance(last, Finished)
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (
        prompt_tokens,
        len(codec.encode_text("hello café 🙂")) + 1,
    )
    assert last.usage.cached_tokens == 2
    assert engine.requests[0].prompt_ids == tuple(codec.encode_chat(HI.messages))


async def test_the_first_text_goes_at_once_and_the_rest_in_few_frames(codec: Codec) -> None:
    engine = ScriptedEngine(codec, "the quick brown fox jumps over the lazy dog", pause_s=0.004)
    frames = await run(make_replica(engine, codec), make_request())
    pieces = [delta.text for delta in deltas(frames)]
    assert pieces[0] == codec.decode(codec.encode_text("the quick brown fox jumps over the lazy dog")[:1])
    assert len(pieces) < len(engine._ids)


async def test_an_answer_that_is_not_streamed_comes_in_one_frame(codec: Codec) -> None:
    engine = ScriptedEngine(codec, "left right up down", pause_s=0.002)
    frames = await run(make_replica(engine, codec), replace(make_request(n=2), is_streamed=False))
    assert [type(frame) for frame in frames] == [Started, list, Finished]
    assert (text(frames, 0), text(frames, 1)) == ("left right up down", "left right up down")


async def test_an_answer_that_is_not_streamed_fails_as_soon_as_one_choice_does(codec: Codec) -> None:
    engine = ScriptedEngine(codec, "left right", error=Overloaded("The step failed."))
    with pytest.raises(Overloaded, match="step failed"):
        await run(make_replica(engine, codec), replace(make_request(n=2), is_streamed=False))
    assert engine.running == 0


async def test_the_more_streams_there_are_the_fewer_frames_each_needs(codec: Codec) -> None:
    engine = ScriptedEngine(codec, "the quick brown fox jumps over the lazy dog", pause_s=0.01)
    alone = await run(make_replica(engine, codec), make_request())
    replica = make_replica(engine, codec)
    together = await asyncio.gather(*(run(replica, make_request()) for _ in range(24)))
    assert text(together[0]) == text(alone)
    assert len(deltas(together[0])) < len(deltas(alone))


async def test_a_stop_string_ends_the_text_and_the_sequence(codec: Codec) -> None:
    engine = ScriptedEngine(codec, "one two three " * 20)
    frames = await run(make_replica(engine, codec, context_length=512), make_request(stop=("three",), max_tokens=400))
    assert (text(frames), deltas(frames)[-1].finish_reason) == ("one two ", "stop")
    assert engine.running == 0


async def test_tokens_behind_a_stop_string_count_nowhere(codec: Codec) -> None:
    class Ahead(ScriptedEngine):
        """Hands over all that it has at once."""

        async def generate(self, request: SequenceRequest) -> AsyncIterator[SequenceOutput]:
            tokens = [token async for output in super().generate(request) for token in output.tokens]
            yield SequenceOutput(tuple(tokens), "length")

    words = "one two three four five"
    frames = await run(make_replica(Ahead(codec, words), codec), make_request(stop=("two",), n=2, logprobs=0))
    needed = next(count for count in range(1, 32) if "two" in codec.decode(codec.encode_text(words)[:count]))
    last = frames[-1]
    assert isinstance(last, Finished) and last.usage.completion_tokens == 2 * needed
    for index in (0, 1):
        assert (text(frames, index), deltas(frames, index)[-1].finish_reason) == ("one ", "stop")
        entries = [entry.token for delta in deltas(frames, index) for entry in delta.logprobs]
        assert "".join(entries).startswith("one") and "four" not in "".join(entries)


async def test_a_character_of_many_tokens_comes_whole(codec: Codec) -> None:
    said = "naïve 𝔘𝔫𝔦 👩‍👩‍👧 한국어"
    assert len(codec.encode_text(said)) > len(said)
    frames = await run(
        make_replica(ScriptedEngine(codec, said, pause_s=0.03), codec, context_length=512), make_request(max_tokens=400)
    )
    pieces = [delta.text for delta in deltas(frames)]
    assert "".join(pieces) == said and len(pieces) > 5 and not any("\ufffd" in piece for piece in pieces)


async def test_logprobs_stop_where_the_text_stops(codec: Codec) -> None:
    frames = await run(make_replica(ScriptedEngine(codec, "yes no maybe"), codec), make_request(logprobs=0))
    assert "".join(entry.token for delta in deltas(frames) for entry in delta.logprobs) == "yes no maybe"

    stopped = make_request(logprobs=0, stop=(" maybe",))
    frames = await run(make_replica(ScriptedEngine(codec, "yes no maybe"), codec), stopped)
    assert "".join(entry.token for delta in deltas(frames) for entry in delta.logprobs) == "yes no"


async def test_choices_are_numbered_by_prompt_then_sample_and_seeded_apart(codec: Codec) -> None:
    engine = ScriptedEngine(codec, "yes")
    request = make_request(TextPrompt("a"), TextPrompt("b"), n=2, seed=7)
    frames = await run(make_replica(engine, codec, max_parallel=3), request)

    assert {delta.index for frame in frames if isinstance(frame, list) for delta in frame} == {0, 1, 2, 3}
    prompts = [tuple(codec.encode_text(prompt)) for prompt in "ab"]
    assert {(r.id, r.prompt_ids, r.params.seed) for r in engine.requests} == {
        ("0-req-0", prompts[0], 7),
        ("0-req-1", prompts[0], 8),
        ("0-req-2", prompts[1], 7),
        ("0-req-3", prompts[1], 8),
    }
    assert engine.most_running == 3
    finished = frames[-1]
    assert isinstance(finished, Finished)
    assert finished.usage.prompt_tokens == sum(map(len, prompts))


async def test_echo_repeats_the_prompt_before_the_answer(codec: Codec) -> None:
    ids = tuple(codec.encode_text("left right"))
    request = make_request(TextPrompt("no "), TokenPrompt(ids), echo=True)
    frames = await run(make_replica(ScriptedEngine(codec, "yes"), codec), request)
    assert (text(frames, 0), text(frames, 1)) == ("no yes", "left rightyes")


async def test_without_max_tokens_an_answer_may_fill_the_context(codec: Codec) -> None:
    engine = ScriptedEngine(codec, "word " * 100)
    frames = await run(make_replica(engine, codec), make_request(TokenPrompt((5, 6, 7, 8)), max_tokens=None))
    assert engine.requests[0].params.max_tokens == 60
    assert deltas(frames)[-1].finish_reason == "length"


@pytest.mark.parametrize(
    ("max_tokens", "says"),
    [
        (20, "you requested 70 tokens (50 in the prompt, 20 in the completion)"),
        (None, "maximum context length is 50 tokens. However, your prompt resulted in 50"),
    ],
)
async def test_over_the_context_the_message_tells_the_sum(codec: Codec, max_tokens: int | None, says: str) -> None:
    engine = ScriptedEngine(codec, "yes")
    replica = make_replica(engine, codec, context_length=64 if max_tokens else 50)
    with pytest.raises(ContextLengthExceeded) as caught:
        await run(replica, make_request(TokenPrompt((5,) * 50), max_tokens=max_tokens))
    assert says in caught.value.message and caught.value.param == "prompt"
    assert engine.requests == []


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        (make_request(TokenPrompt((5, 512))), "prompt"),
        (make_request(logit_bias={512: 1.0}), "logit_bias"),
        (make_request(TextPrompt("")), "prompt"),
    ],
)
async def test_what_this_vocabulary_does_not_have_is_refused(
    codec: Codec, request_: GenerationRequest, param: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await run(make_replica(ScriptedEngine(codec, "yes"), codec), request_)
    assert caught.value.param == param


async def test_a_refusal_of_the_engine_comes_before_started(codec: Codec) -> None:
    class Full(ScriptedEngine):
        async def generate(self, request: SequenceRequest) -> AsyncIterator[SequenceOutput]:
            raise Overloaded("Too many requests wait.")
            yield

    with pytest.raises(Overloaded):
        await run(make_replica(Full(codec), codec), make_request(n=4))


async def test_a_request_with_text_waits_for_room_and_is_not_refused(codec: Codec) -> None:
    class Small(ScriptedEngine):
        async def generate(self, request: SequenceRequest) -> AsyncIterator[SequenceOutput]:
            if self.requests and self.running < 2 and self.most_running == 2:
                self.most_running = 0
                raise Overloaded("Too many requests wait.")
            async with aclosing(super().generate(request)) as outputs:
                async for output in outputs:
                    yield output

    frames = await run(make_replica(Small(codec, "yes"), codec, max_parallel=2), make_request(n=5))
    assert [text(frames, index) for index in range(5)] == ["yes"] * 5


async def test_a_failing_step_ends_the_stream_after_the_text_so_far(codec: Codec) -> None:
    engine = ScriptedEngine(codec, "left right", pause_s=0.05, error=Overloaded("The step failed."))
    seen = []
    with pytest.raises(Overloaded, match="step failed"):
        async for frame in make_replica(engine, codec).generate(make_request(n=2)):
            seen.append(frame)
    assert text(seen)
    assert engine.running == 0


async def test_closing_the_stream_aborts_every_sequence_of_it(codec: Codec) -> None:
    engine = ScriptedEngine(codec, "word " * 100, pause_s=0.01)
    stream = make_replica(engine, codec).generate(make_request(n=3))
    await anext(stream)
    await anext(stream)
    assert engine.running == 3
    await stream.aclose()
    assert engine.running == 0


async def test_a_cancelled_request_aborts_while_it_waits_for_its_first_token(codec: Codec) -> None:
    engine = ScriptedEngine(codec, "word", pause_s=60)
    task = asyncio.create_task(run(make_replica(engine, codec), make_request()))
    await eventually(lambda: engine.running == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert engine.running == 0


async def test_an_engine_that_has_work_and_does_not_step_is_unhealthy(
    codec: Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuneloom.serve.replica.STUCK_S", 0.05)
    engine = ScriptedEngine(codec, "word " * 100, pause_s=0.01)
    replica = make_replica(engine, codec)
    async with aclosing(replica.generate(make_request())) as stream:
        await anext(stream)
        for engine.steps in (1, 2):
            await replica.check_health()
            await asyncio.sleep(0.1)
        with pytest.raises(RuntimeError, match="no step"):
            await replica.check_health()
    await replica.check_health()


async def test_the_work_of_a_caller_that_died_is_abandoned_and_no_other(codec: Codec) -> None:
    engine = ScriptedEngine(codec, "word " * 100, pause_s=0.01)
    replica = make_replica(engine, codec)
    of_living = asyncio.create_task(collect(replica.generate(make_request(), "gateway-1")))
    with pytest.raises(TuneloomError, match="caller of this request is gone"):
        await collect(replica.generate(make_request(), "gateway-2"))
    assert engine.running == 1
    assert text(await of_living)


async def test_requests_of_one_id_do_not_meet(codec: Codec) -> None:
    engine = ScriptedEngine(codec, "yes", pause_s=0.01)
    replica = make_replica(engine, codec)
    await asyncio.gather(run(replica, make_request()), run(replica, make_request()))
    assert len({request.id for request in engine.requests}) == 2


async def test_a_replica_knows_which_adapters_it_worked_with(codec: Codec) -> None:
    replica = make_replica(ScriptedEngine(codec, "yes"), codec)
    often, once = (AdapterRef(sha256=name * 64, uri=name, rank=4, size_bytes=1) for name in "ab")
    for adapter in (once, often, None, often):
        await run(replica, replace(make_request(), adapter=adapter))
    assert [use.adapter for use in await replica.uses()] == [often, once]


def test_replicas_of_one_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tuneloom.serve.replica.num_cores", lambda: 9)
    threads = [engine_config(EngineSettings(), replicas_here=number).threads for number in (1, 2, 3, 20)]
    assert threads == [0, 4, 2, 1]
    assert engine_config(EngineSettings(threads=5), replicas_here=4).threads == 5


def test_a_request_survives_the_way_to_another_process() -> None:
    import pickle

    request = replace(make_request(stop=("x",), logit_bias={1: 2.0}), deadline_s=3.0)
    assert pickle.loads(pickle.dumps(request)) == request


@pytest.fixture
async def real(tiny_base: Path, tiny_adapters: list[Path], tmp_path: Path, codec: Codec) -> AsyncIterator[Any]:
    """A replica on the real engine, and the refs of four adapters in a real store."""
    from tuneloom.engine.engine import LocalEngine
    from tuneloom.store import open_blobs
    from tuneloom.store.artifacts import fetch_adapter, put_adapter

    blobs = open_blobs(f"file:{tmp_path / 'blobs'}")
    refs = [put_adapter(blobs, f"imports/a{i}", folder) for i, folder in enumerate(tiny_adapters)]
    settings = EngineSettings(dtype="fp32", threads=1, max_sequences=8, adapter_slots=2)
    fetch = functools.partial(fetch_adapter, blobs, cache=tmp_path / "cache")
    engine = LocalEngine(tiny_base, engine_config(settings), fetch)
    await engine.start()
    yield make_replica(engine, codec, context_length=engine.max_length), refs
    await engine.close()


async def test_a_stop_string_ends_the_real_sequence_at_once(real: Any) -> None:
    replica, _ = real
    request = replace(make_request(max_tokens=300, temperature=1.5, seed=3, n=3), id="whole")
    whole = await run(replica, request)
    stop = text(whole, 0)[20:22]
    frames = await run(replica, replace(request, id="cut", params=replace(request.params, stop=(stop,))))
    for index in range(3):
        before, found, _ = text(whole, index).partition(stop)
        assert text(frames, index) == before
        assert deltas(frames, index)[-1].finish_reason == ("stop" if found else deltas(whole, index)[-1].finish_reason)
    used = [frames[-1].usage.completion_tokens for frames in (frames, whole) if isinstance(frames[-1], Finished)]
    assert used[0] < used[1]
    await eventually(lambda: replica._engine.stats().running == 0)


async def test_an_answer_with_a_schema_parses_and_ends(real: Any) -> None:
    replica, _ = real
    schema = """{"type": "object", "properties": {"a": {"enum": [1, 22]}, "b": {"type": "boolean"}},
                 "required": ["a", "b"], "additionalProperties": false}"""
    form = ResponseFormat(schema)
    request = replace(make_request(max_tokens=60, temperature=1.0, seed=1, n=4, logprobs=1), response_format=form)
    frames = await run(replica, request)
    for index in range(4):
        answer = json.loads(text(frames, index))
        assert answer.keys() == {"a", "b"} and deltas(frames, index)[-1].finish_reason == "stop"
        entries = [entry.token for delta in deltas(frames, index) for entry in delta.logprobs]
        assert "".join(entries) == text(frames, index)
    with pytest.raises(InvalidRequest, match="`not`"):
        await run(replica, replace(request, response_format=ResponseFormat('{"not": {}}')))


async def test_mixed_adapters_answer_as_each_does_alone(real: Any) -> None:
    replica, refs = real
    requests = [
        replace(make_request(TextPrompt(prompt), temperature=0.0, max_tokens=12), adapter=adapter)
        for adapter in (None, *refs)
        for prompt in ("hello", "the quick brown")
    ]
    alone = [text(await run(replica, request)) for request in requests]
    mixed = await asyncio.gather(*(run(replica, request) for request in requests for _ in range(2)))
    assert [text(frames) for frames in mixed[::2]] == [text(frames) for frames in mixed[1::2]] == alone
    assert len(set(alone)) == len(alone)


async def test_leaving_a_real_generation_frees_its_slot(real: Any) -> None:
    replica, refs = real
    request = replace(make_request(max_tokens=400, n=4, logit_bias={2: -100.0}), adapter=refs[0])
    async with aclosing(replica.generate(request)) as stream:
        await anext(stream)
        await anext(stream)
        assert (await replica.stats()).running == 4
    await eventually(lambda: not replica._engine.stats().running)


async def test_an_adapter_whose_files_are_gone_is_refused_before_started(real: Any) -> None:
    replica, refs = real
    gone = refs[0].model_copy(update={"sha256": "0" * 64, "uri": "imports/none"})
    with pytest.raises(BlobNotFound):
        await run(replica, replace(make_request(), adapter=gone))
