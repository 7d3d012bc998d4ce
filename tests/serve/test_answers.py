"""OpenAI's objects from frames, where the way over HTTP adds nothing to see."""

from tuneloom.domain import Target
from tuneloom.generation import Delta, Finished, TokenLogprob, Usage
from tuneloom.serve.answers import CompletionAnswer
from tuneloom.serve.openai import parse_completion


def test_parts_of_a_character_are_told_apart_where_tokens_are_keys() -> None:
    def entry(data: bytes, logprob: float, *top: TokenLogprob) -> TokenLogprob:
        return TokenLogprob(data.decode("utf-8", "replace"), logprob, tuple(data), top)

    sun = "☀".encode()
    first = entry(sun[:1], -0.5, entry(sun[:1], -0.5), entry(b"\xc3", -1.5), entry("é".encode(), -2.0))
    rest = entry(sun[1:], -0.1, entry(sun[1:], -0.1), entry(b"\xa9", -3.0), entry(b"a", -4.0))
    call = parse_completion({"model": "m", "prompt": "x", "logprobs": 3})
    whole = CompletionAnswer(call, Target(name="m", base="b")).whole(
        [[Delta(0, "☀", (first, rest), "stop")], Finished(Usage(1, 2))]
    )
    logprobs = whole["choices"][0]["logprobs"]
    assert logprobs["tokens"] == [r"bytes:\xe2", r"bytes:\x98\x80"]
    assert logprobs["top_logprobs"] == [
        {r"bytes:\xe2": -0.5, r"bytes:\xc3": -1.5, "é": -2.0},
        {r"bytes:\x98\x80": -0.1, r"bytes:\xa9": -3.0, "a": -4.0},
    ]
    assert logprobs["text_offset"] == [0, 1]
