"""Calls of `chat.completions` on a base."""

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import quote

from openai.types import CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from tests.conformance.session import QUESTION, Session, holds, is_a, same, user

ABORTED_TOKENS = 300
TOGETHER = 8


def chat_create(session: Session) -> None:
    answer = session.ask()
    is_a(answer, ChatCompletion)
    holds("id", answer.id.startswith("chatcmpl-"), answer.id)
    same("object and model", (answer.object, answer.model), ("chat.completion", session.base))
    holds("created in seconds", isinstance(answer.created, int) and answer.created > 1_700_000_000, answer.created)
    holds("system_fingerprint", (answer.system_fingerprint or "").startswith("fp_"), answer.system_fingerprint)
    same("choices", [choice.index for choice in answer.choices], [0])
    choice = answer.choices[0]
    same("message", (choice.message.role, choice.message.refusal, choice.message.tool_calls), ("assistant", None, None))
    holds("content", isinstance(choice.message.content, str), choice.message.content)
    holds("finish_reason", choice.finish_reason in ("stop", "length"), choice.finish_reason)
    same("logprobs", choice.logprobs, None)
    usage = answer.usage
    is_a(usage, CompletionUsage)
    holds("token counts", usage.prompt_tokens > 0 and 0 < usage.completion_tokens <= 8, usage)
    same("total_tokens", usage.total_tokens, usage.prompt_tokens + usage.completion_tokens)
    holds("cached_tokens", usage.prompt_tokens_details.cached_tokens >= 0, usage)


def chat_stream(session: Session) -> None:
    chunks = list(session.ask(stream=True))
    is_a(chunks[0], ChatCompletionChunk)
    same("id, created and model on every chunk", len({(c.id, c.created, c.model, c.object) for c in chunks}), 1)
    same("object", chunks[0].object, "chat.completion.chunk")
    first, last = chunks[0].choices[0], chunks[-1].choices[0]
    same("the first delta", (first.delta.role, first.delta.content), ("assistant", ""))
    same("the last delta", (last.delta.content, last.delta.role), (None, None))
    holds("the last finish_reason", last.finish_reason in ("stop", "length"), last.finish_reason)
    same("other finish reasons", {chunk.choices[0].finish_reason for chunk in chunks[:-1]}, {None})
    same("usage where none was asked for", {chunk.usage for chunk in chunks}, {None})
    same("text", _text(chunks), _answer(session.ask()))


def chat_stream_usage(session: Session) -> None:
    *chunks, last = session.ask(stream=True, stream_options={"include_usage": True})
    holds("usage is null on each chunk", all("usage" in c.model_fields_set and c.usage is None for c in chunks))
    same("choices of the last chunk", last.choices, [])
    is_a(last.usage, CompletionUsage)
    whole = session.ask().usage
    counts = (last.usage.prompt_tokens, last.usage.completion_tokens, last.usage.total_tokens)
    same("usage", counts, (whole.prompt_tokens, whole.completion_tokens, whole.total_tokens))


def chat_stream_n(session: Session) -> None:
    options: Any = {"n": 3, "temperature": 1, "seed": 5}
    chunks = list(session.ask(stream=True, **options))
    texts, reasons = ["", "", ""], ["", "", ""]
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] += choice.finish_reason or ""
    whole = session.ask(**options)
    same("texts", texts, [choice.message.content for choice in whole.choices])
    same("finish reasons", reasons, [choice.finish_reason for choice in whole.choices])


def chat_stream_helper(session: Session) -> None:
    # The client's helper takes an answer that ends by its length for an error, so this one is made to end by a stop.
    options: Any = {"logit_bias": session.either, "frequency_penalty": 2, "max_completion_tokens": 40}
    text = _answer(session.ask(**options))
    stop = session.other if text[0] == session.token else session.token
    options |= {"model": session.base, "messages": user(QUESTION), "temperature": 0, "stop": stop}
    with session.client.chat.completions.stream(**options) as stream:
        kinds = {event.type for event in stream}
        answer = stream.get_final_completion()
    holds("events", {"chunk", "content.done"} <= kinds, kinds)
    same("finish_reason", answer.choices[0].finish_reason, "stop")
    same("text", _answer(answer), text.partition(stop)[0])


def chat_n(session: Session) -> None:
    answer = session.ask(n=4, temperature=1.5, seed=1, max_completion_tokens=16)
    same("indices", [choice.index for choice in answer.choices], [0, 1, 2, 3])
    texts = {choice.message.content for choice in answer.choices}
    holds("they are not all alike", len(texts) > 1, texts)
    holds("completion_tokens count all of them", answer.usage.completion_tokens > 16, answer.usage)


def chat_stop(session: Session) -> None:
    options: Any = {"logit_bias": session.always, "max_completion_tokens": 12}
    twice = session.token * 2
    for stop in (twice, ["never said", twice]):
        choice = session.ask(stop=stop, **options).choices[0]
        same(f"answer with stop {stop!r}", (choice.message.content, choice.finish_reason), ("", "stop"))
    choice = session.ask(stop=["never said"], **options).choices[0]
    same("answer with a stop that never comes", choice.finish_reason, "length")
    streamed = list(session.ask(stop=twice, stream=True, **options))
    same("streamed", (_text(streamed), streamed[-1].choices[0].finish_reason), ("", "stop"))


def chat_seed(session: Session) -> None:
    def sample(seed: int) -> str:
        return _answer(session.ask(seed=seed, temperature=1.2, max_completion_tokens=16))

    same("two answers of one seed", sample(42), sample(42))
    texts = {sample(seed) for seed in range(4)}
    holds("answers of four seeds differ", len(texts) > 1, texts)


def chat_temperature_zero(session: Session) -> None:
    texts = {_answer(session.ask(temperature=0, seed=seed)) for seed in range(3)}
    same("different answers", len(texts), 1)


def chat_max_completion_tokens(session: Session) -> None:
    create = session.client.chat.completions.create
    for name in ("max_completion_tokens", "max_tokens"):
        limit: Any = {name: 7}
        answer = create(model=session.base, messages=user(QUESTION), temperature=0, logit_bias=session.always, **limit)
        same(f"text with `{name}`", answer.choices[0].message.content, session.token * 7)
        same("finish_reason", answer.choices[0].finish_reason, "length")
        assert answer.usage is not None
        same("completion_tokens", answer.usage.completion_tokens, 7)


def chat_logprobs(session: Session) -> None:
    answer = session.ask(logprobs=True, top_logprobs=3, logit_bias=session.always, max_completion_tokens=4)
    _check_logprobs(session, answer.choices[0].logprobs.content)
    bare = session.ask(logprobs=True, logit_bias=session.always, max_completion_tokens=4).choices[0].logprobs.content
    same("alternatives without `top_logprobs`", [entry.top_logprobs for entry in bare], [[]] * 4)


def chat_stream_logprobs(session: Session) -> None:
    options: Any = {"logprobs": True, "top_logprobs": 3, "logit_bias": session.always, "max_completion_tokens": 4}
    entries = []
    for chunk in session.ask(stream=True, **options):
        if chunk.choices[0].logprobs:
            entries += chunk.choices[0].logprobs.content
    _check_logprobs(session, entries)


def _check_logprobs(session: Session, entries: list[Any]) -> None:
    same("tokens", [entry.token for entry in entries], [session.token] * 4)
    for entry in entries:
        same("bytes", bytes(entry.bytes).decode(), session.token)
        holds("logprob", isinstance(entry.logprob, float) and entry.logprob <= 0, entry.logprob)
        same("alternatives", len(entry.top_logprobs), 3)
        values = [other.logprob for other in entry.top_logprobs]
        same("alternatives, best first", values, sorted(values, reverse=True))


def chat_logit_bias(session: Session) -> None:
    same("text", _answer(session.ask(logit_bias=session.always, max_completion_tokens=5)), session.token * 5)
    never = {str(session.token_id): -100}
    holds("a token that never wins", session.token * 2 not in _answer(session.ask(logit_bias=never)))


def chat_penalties(session: Session) -> None:
    # Of two letters that are favoured alike, the one that comes first is soon outweighed by its own penalty.
    text = _answer(session.ask(logit_bias=session.either, frequency_penalty=2, max_completion_tokens=40))
    same("letters with `frequency_penalty`", set(text), {session.token, session.other})
    plain = session.ask(logit_bias=session.always, presence_penalty=2, max_completion_tokens=4)
    same("a bias over `presence_penalty`", _answer(plain), session.token * 4)
    narrow = {_answer(session.ask(top_p=1e-6, temperature=1.5, seed=seed)) for seed in range(3)}
    same("a tiny `top_p` is greedy", narrow, {_answer(session.ask())})


def chat_content_parts(session: Session) -> None:
    half = len(QUESTION) // 2
    parts: Any = [{"type": "text", "text": QUESTION[:half]}, {"type": "text", "text": QUESTION[half:]}]
    joined, whole = session.ask(parts), session.ask(QUESTION)
    same("prompt tokens", joined.usage.prompt_tokens, whole.usage.prompt_tokens)
    same("text", _answer(joined), _answer(whole))


def chat_developer_role(session: Session) -> None:
    def with_role(role: str, content: str) -> Any:
        messages: Any = [{"role": role, "content": content}, *user(QUESTION)]
        return session.client.chat.completions.create(
            model=session.base, messages=messages, temperature=0, max_completion_tokens=8
        )

    brief = "Answer with one word."
    developer, system = with_role("developer", brief), with_role("system", brief)
    same("prompt tokens", developer.usage.prompt_tokens, system.usage.prompt_tokens)
    same("text", _answer(developer), _answer(system))
    longer = with_role("developer", brief * 3).usage.prompt_tokens
    holds("it is part of the prompt", longer > developer.usage.prompt_tokens, longer)


def chat_conversation(session: Session) -> None:
    first = session.ask(logit_bias=session.always)
    messages: Any = [*user(QUESTION), first.choices[0].message, *user("And the sea?")]
    answer = session.client.chat.completions.create(model=session.base, messages=messages, max_completion_tokens=8)
    holds("the prompt has grown", answer.usage.prompt_tokens > first.usage.prompt_tokens + 8, answer.usage)


def chat_harmless_fields(session: Session) -> None:
    options: Any = {
        "user": "ada",
        "metadata": {"team": "blue"},
        "store": False,
        "service_tier": "auto",
        "parallel_tool_calls": True,
        "prompt_cache_key": "k",
        "safety_identifier": "s",
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "tools": [],
    }
    same("text", _answer(session.ask(**options)), _answer(session.ask()))


def chat_own_fields(session: Session) -> None:
    texts = {_answer(session.ask(temperature=1.5, seed=seed, extra_body={"top_k": 1})) for seed in range(3)}
    same("texts", texts, {_answer(session.ask())})


def chat_raw_response(session: Session) -> None:
    raw = session.client.chat.completions.with_raw_response.create(
        model=session.base, messages=user(QUESTION), temperature=0, max_completion_tokens=8
    )
    id = raw.headers.get("x-request-id")
    holds("x-request-id", (id or "").startswith("req_"), id)
    same("request_id", raw.request_id, id)
    same("status", raw.status_code, 200)
    answer = raw.parse()
    is_a(answer, ChatCompletion)
    same("text", _answer(answer), _answer(session.ask()))


def chat_request_id(session: Session) -> None:
    ids = [session.ask()._request_id for _ in range(2)]
    holds("_request_id", all((id or "").startswith("req_") for id in ids) and ids[0] != ids[1], ids)
    same("our own id", session.ask(extra_headers={"x-request-id": "my-trace.1"})._request_id, "my-trace.1")


def chat_raw_stream(session: Session) -> None:
    with session.client.chat.completions.with_streaming_response.create(
        model=session.base, messages=user(QUESTION), temperature=0, max_completion_tokens=8, stream=True
    ) as response:
        kind = response.headers.get("content-type", "")
        lines = [line for line in response.iter_lines() if line]
    holds("content-type", kind.startswith("text/event-stream"), kind)
    holds("only data lines", all(line.startswith("data: ") for line in lines), lines)
    same("the last line", lines[-1], "data: [DONE]")


def chat_model_in_url(session: Session) -> None:
    client = session.client_with(session.key, base_url=f"{session.base_url}/{quote(session.base)}")
    answer = client.chat.completions.create(
        model=session.base, messages=user(QUESTION), temperature=0, max_completion_tokens=8
    )
    same("text", _answer(answer), _answer(session.ask()))
    same("models", [model.id for model in client.models.list()], [session.base])


def chat_abort(session: Session) -> None:
    room = session.context_length - session.ask().usage.prompt_tokens - 1
    tokens = min(ABORTED_TOKENS, room)
    stream = session.ask(stream=True, logit_bias=session.always, max_completion_tokens=tokens)
    seen = ""
    for chunk in stream:
        seen += chunk.choices[0].delta.content or ""
        if seen:
            break
    stream.close()
    holds("it was left before its end", 0 < len(seen) < tokens, len(seen))
    before = time.monotonic()
    same("the next answer", _answer(session.ask(logit_bias=session.always, max_completion_tokens=3)), session.token * 3)
    holds("the next answer comes soon", time.monotonic() - before < 30)


def chat_parallel(session: Session) -> None:
    # Answers of a known length each: a base in bf16 may round greedy ties otherwise in company than alone.
    lengths = range(1, TOGETHER + 1)
    with ThreadPoolExecutor(TOGETHER) as pool:
        answers = list(pool.map(lambda n: session.ask(logit_bias=session.always, max_completion_tokens=n), lengths))
    same("answers", [_answer(answer) for answer in answers], [session.token * n for n in lengths])
    same("ids", len({answer.id for answer in answers}), TOGETHER)


def _answer(answer: Any) -> str:
    return answer.choices[0].message.content


def _text(chunks: list[Any]) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
