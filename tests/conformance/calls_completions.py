"""Calls of `completions` on a base."""

from typing import Any
from urllib.parse import quote

from openai.types import Completion, CompletionUsage

from tests.conformance.session import Session, holds, is_a, same

PROMPT = "The quick brown fox"
OTHER = "Rain and sun"


def completions_text(session: Session) -> None:
    answer = _complete(session)
    is_a(answer, Completion)
    holds("id", answer.id.startswith("cmpl-"), answer.id)
    same("object and model", (answer.object, answer.model), ("text_completion", session.base))
    choice = answer.choices[0]
    same("choice", (len(answer.choices), choice.index, choice.logprobs), (1, 0, None))
    holds("text", isinstance(choice.text, str), choice.text)
    holds("finish_reason", choice.finish_reason in ("stop", "length"), choice.finish_reason)
    usage = answer.usage
    is_a(usage, CompletionUsage)
    holds("token counts", usage.prompt_tokens > 0 and 0 < usage.completion_tokens <= 8, usage)
    same("total_tokens", usage.total_tokens, usage.prompt_tokens + usage.completion_tokens)


def completions_list(session: Session) -> None:
    both = _complete(session, prompt=[PROMPT, OTHER])
    same("indices", [choice.index for choice in both.choices], [0, 1])
    each = [_complete(session, prompt=prompt) for prompt in (PROMPT, OTHER)]
    same("texts", [choice.text for choice in both.choices], [answer.choices[0].text for answer in each])
    same("prompt tokens", both.usage.prompt_tokens, sum(answer.usage.prompt_tokens for answer in each))


def completions_tokens(session: Session) -> None:
    ids = [session.token_id] * 3
    one = _complete(session, prompt=ids, echo=True)
    same("prompt tokens", one.usage.prompt_tokens, 3)
    holds("the text of the ids", one.choices[0].text.startswith(session.token * 3), one.choices[0].text)
    several = _complete(session, prompt=[ids, ids[:2]])
    same("choices and prompt tokens", (len(several.choices), several.usage.prompt_tokens), (2, 5))


def completions_stream(session: Session) -> None:
    chunks = list(_complete(session, stream=True))
    is_a(chunks[0], Completion)
    same("id on every chunk", len({chunk.id for chunk in chunks}), 1)
    same("text", "".join(chunk.choices[0].text for chunk in chunks), _complete(session).choices[0].text)
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    holds("a finish reason, once and last", reasons[-1] and not any(reasons[:-1]), reasons)


def completions_stream_usage(session: Session) -> None:
    *chunks, last = _complete(session, stream=True, stream_options={"include_usage": True})
    holds("no usage before the end", all(chunk.usage is None for chunk in chunks))
    same("choices of the last chunk", last.choices, [])
    whole = _complete(session).usage
    same("usage", last.usage.total_tokens, whole.total_tokens)


def completions_echo(session: Session) -> None:
    bare = _complete(session).choices[0].text
    same("text", _complete(session, echo=True).choices[0].text, PROMPT + bare)
    chunks = list(_complete(session, echo=True, stream=True))
    same("streamed", "".join(chunk.choices[0].text for chunk in chunks), PROMPT + bare)


def completions_logprobs(session: Session) -> None:
    logprobs = _complete(session, logprobs=2, logit_bias=session.always, max_tokens=3).choices[0].logprobs
    same("tokens", logprobs.tokens, [session.token] * 3)
    holds("values", all(isinstance(value, float) and value <= 0 for value in logprobs.token_logprobs), logprobs)
    same("alternatives", len(logprobs.top_logprobs), 3)
    for best in logprobs.top_logprobs:
        holds("two, and the chosen one", 2 <= len(best) <= 3 and session.token in best, best)
    same("offsets", logprobs.text_offset, [0, 1, 2])


def completions_n(session: Session) -> None:
    answer = _complete(session, prompt=[PROMPT, OTHER], n=2, temperature=1, seed=3)
    same("indices", [choice.index for choice in answer.choices], [0, 1, 2, 3])
    again = _complete(session, prompt=[PROMPT, OTHER], n=2, temperature=1, seed=3)
    same("texts of one seed", [c.text for c in again.choices], [c.text for c in answer.choices])
    best = _complete(session, best_of=3, temperature=1, seed=3)
    same("the best of three", len(best.choices), 1)


def completions_max_tokens(session: Session) -> None:
    answer = session.client.completions.create(
        model=session.base, prompt=PROMPT, logit_bias=session.always, temperature=0
    )
    same("text", answer.choices[0].text, session.token * 16)
    same("finish_reason", answer.choices[0].finish_reason, "length")


def completions_model_in_url(session: Session) -> None:
    client = session.client_with(session.key, base_url=f"{session.base_url}/{quote(session.base)}")
    answer = client.completions.create(model=session.base, prompt=PROMPT, max_tokens=8, temperature=0)
    same("text", answer.choices[0].text, _complete(session).choices[0].text)


def _complete(session: Session, **options: Any) -> Any:
    options = {"model": session.base, "prompt": PROMPT, "max_tokens": 8, "temperature": 0, **options}
    return session.client.completions.create(**options)
