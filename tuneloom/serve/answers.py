"""OpenAI's answers from a stream of frames: whole objects and chunks, for chat and text. No HTTP, no SSE framing."""

import hashlib
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

from tuneloom.domain import Target, new_id
from tuneloom.errors import TuneloomError
from tuneloom.generation import Delta, Finished, Frame, TokenLogprob, ToolCallDelta, Usage
from tuneloom.serve.openai import Call

Json = dict[str, Any]


class Answer(Protocol):
    """One call's answer on the wire. `whole` and the chunk methods say the same; use one of the two."""

    def whole(self, frames: Iterable[Frame]) -> Json:
        """The unary object: the whole stream, folded."""
        ...

    def opening(self) -> Iterator[Json]:
        """Chunks to send before any text."""
        ...

    def chunks(self, delta: Delta) -> Iterator[Json]: ...

    def closing(self, usage: Usage) -> Iterator[Json]:
        """Chunks to send when all choices are done."""
        ...


@dataclass(frozen=True)
class Head:
    """What every object of one answer repeats."""

    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str

    def json(self, choices: list[Json], **more: Any) -> Json:
        return {
            "id": self.id,
            "object": self.object,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            "system_fingerprint": self.system_fingerprint,
            **more,
        }


def make_head(target: Target, prefix: str, kind: str) -> Head:
    weights = f"{target.base}\0{target.adapter.sha256 if target.adapter else ''}"
    return Head(
        id=new_id(prefix, 29),
        object=kind,
        created=int(time.time()),
        model=target.name,
        system_fingerprint="fp_" + hashlib.sha256(weights.encode()).hexdigest()[:10],
    )


class ChatAnswer:
    def __init__(self, call: Call, target: Target) -> None:
        self._call = call
        kind = "chat.completion.chunk" if call.stream else "chat.completion"
        self._head = make_head(target, "chatcmpl-", kind)
        self._more: Json = {"usage": None} if call.include_usage else {}

    def whole(self, frames: Iterable[Frame]) -> Json:
        choices, usage = _fold(frames, self._call.num_choices)
        return self._head.json([self._choice(choice) for choice in choices], usage=_usage(usage))

    def opening(self) -> Iterator[Json]:
        for index in range(self._call.num_choices):
            yield self._chunk(index, {"role": "assistant", "content": "", "refusal": None})

    def chunks(self, delta: Delta) -> Iterator[Json]:
        if delta.text or delta.logprobs:
            yield self._chunk(delta.index, {"content": delta.text}, logprobs=self._logprobs(delta))
        for call in _joined(delta.tool_calls):
            yield self._chunk(delta.index, {"tool_calls": [_call_delta(call)]})
        if delta.finish_reason:
            yield self._chunk(delta.index, {}, finish_reason=_reason(delta))

    def closing(self, usage: Usage) -> Iterator[Json]:
        if self._call.include_usage:
            yield self._head.json([], usage=_usage(usage))

    def _choice(self, delta: Delta) -> Json:
        message: Json = {"role": "assistant", "content": delta.text, "refusal": None, "annotations": []}
        if delta.tool_calls:
            message["content"] = delta.text or None
            message["tool_calls"] = _whole_calls(delta.tool_calls)
        return {
            "index": delta.index,
            "message": message,
            "logprobs": self._logprobs(delta),
            "finish_reason": _reason(delta),
        }

    def _chunk(
        self, index: int, delta: Json, *, logprobs: Json | None = None, finish_reason: str | None = None
    ) -> Json:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return self._head.json([choice], **self._more)

    def _logprobs(self, delta: Delta) -> Json | None:
        if self._call.params.logprobs is None:
            return None
        return {"content": [_logprob(entry) for entry in delta.logprobs], "refusal": None}


class CompletionAnswer:
    def __init__(self, call: Call, target: Target) -> None:
        self._call = call
        self._head = make_head(target, "cmpl-", "text_completion")
        self._more: Json = {"usage": None} if call.include_usage else {}
        # Characters of each choice's text that its tokens so far have covered: the offset of the next token.
        self._offsets = [0] * call.num_choices

    def whole(self, frames: Iterable[Frame]) -> Json:
        choices, usage = _fold(frames, self._call.num_choices)
        return self._head.json([self._choice(choice) for choice in self._best(choices)], usage=_usage(usage))

    def opening(self) -> Iterator[Json]:
        return iter(())

    def chunks(self, delta: Delta) -> Iterator[Json]:
        if delta.text or delta.logprobs or delta.finish_reason:
            yield self._head.json([self._choice(delta)], **self._more)

    def closing(self, usage: Usage) -> Iterator[Json]:
        if self._call.include_usage:
            yield self._head.json([], usage=_usage(usage))

    def _best(self, choices: list[Delta]) -> list[Delta]:
        """Those of each prompt that are the answer, the best first."""
        count, n = self._call.num_best, self._call.params.n
        if count is None:
            return choices
        best: list[Delta] = []
        for start in range(0, len(choices), n):
            best += sorted(choices[start : start + n], key=_mean_logprob, reverse=True)[:count]
        return [replace(choice, index=index) for index, choice in enumerate(best)]

    def _choice(self, delta: Delta) -> Json:
        return {
            "index": delta.index,
            "text": delta.text,
            "logprobs": self._logprobs(delta),
            "finish_reason": _reason(delta),
        }

    def _logprobs(self, delta: Delta) -> Json | None:
        if self._call.params.logprobs is None or not self._call.shows_logprobs:
            return None
        offsets = []
        for entry in delta.logprobs:
            offsets.append(self._offsets[delta.index])
            # A character counts where its first byte is: a token may hold only the rest of one.
            self._offsets[delta.index] += sum((byte & 0xC0) != 0x80 for byte in entry.bytes)
        return {
            "tokens": [_name(entry) for entry in delta.logprobs],
            "token_logprobs": [_finite(entry.logprob) for entry in delta.logprobs],
            "top_logprobs": [{_name(e): _finite(e.logprob) for e in (*entry.top, entry)} for entry in delta.logprobs],
            "text_offset": offsets,
        }


def _fold(frames: Iterable[Frame], num_choices: int) -> tuple[list[Delta], Usage]:
    """One whole delta for each choice, and the usage."""
    texts: list[list[str]] = [[] for _ in range(num_choices)]
    logprobs: list[list[TokenLogprob]] = [[] for _ in range(num_choices)]
    calls: list[list[ToolCallDelta]] = [[] for _ in range(num_choices)]
    last: dict[int, Delta] = {}
    usage = None
    for frame in frames:
        if isinstance(frame, Finished):
            usage = frame.usage
        elif isinstance(frame, list):
            for delta in frame:
                texts[delta.index].append(delta.text)
                logprobs[delta.index].extend(delta.logprobs)
                calls[delta.index].extend(delta.tool_calls)
                if delta.finish_reason:
                    last[delta.index] = delta
    if usage is None or len(last) < num_choices:
        raise TuneloomError("The answer ended before it was complete. Send the request again.")
    choices = [
        Delta(i, "".join(texts[i]), tuple(logprobs[i]), last[i].finish_reason, tuple(calls[i]))
        for i in range(num_choices)
    ]
    return choices, usage


def _mean_logprob(choice: Delta) -> float:
    """An answer without a token is the least likely."""
    return sum(entry.logprob for entry in choice.logprobs) / len(choice.logprobs) if choice.logprobs else -math.inf


def _joined(pieces: Iterable[ToolCallDelta]) -> list[ToolCallDelta]:
    """Pieces of which no two that follow each other could be one."""
    joined: list[ToolCallDelta] = []
    for piece in pieces:
        if joined and piece.id is None and joined[-1].id is None and joined[-1].index == piece.index:
            joined[-1] = replace(piece, arguments=joined[-1].arguments + piece.arguments)
        else:
            joined.append(piece)
    return joined


def _call_delta(call: ToolCallDelta) -> Json:
    """A piece on the wire: `id`, `type` and `name` come with the first of a call."""
    if call.id is None:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    function = {"name": call.name, "arguments": call.arguments}
    return {"index": call.index, "id": call.id, "type": "function", "function": function}


def _whole_calls(pieces: Iterable[ToolCallDelta]) -> list[Json]:
    calls: dict[int, Json] = {}
    for piece in pieces:
        if piece.id is not None:
            function = {"name": piece.name, "arguments": ""}
            calls[piece.index] = {"id": piece.id, "type": "function", "function": function}
        calls[piece.index]["function"]["arguments"] += piece.arguments
    return list(calls.values())


def _reason(delta: Delta) -> str | None:
    if delta.finish_reason == "error":
        raise TuneloomError("The model failed while it wrote the answer. Send the request again.")
    return delta.finish_reason


def _logprob(entry: TokenLogprob) -> Json:
    return {**_alternative(entry), "top_logprobs": [_alternative(other) for other in entry.top]}


def _alternative(entry: TokenLogprob) -> Json:
    return {"token": entry.token, "logprob": _finite(entry.logprob), "bytes": list(entry.bytes)}


def _name(entry: TokenLogprob) -> str:
    """A token where there are no bytes beside it: parts of characters, alike as text, are told apart."""
    data = bytes(entry.bytes)
    try:
        return data.decode() if data else entry.token
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _finite(logprob: float) -> float:
    """JSON has no infinity: what cannot happen at all gets OpenAI's number for it."""
    return max(-9999.0, logprob)


def _usage(usage: Usage) -> Json:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }
