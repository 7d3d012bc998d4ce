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


def test_best_of_answers_with_the_likeliest_by_token() -> None:
    def sample(index: int, text: str, *logprobs: float) -> Delta:
        entries = tuple(TokenLogprob(text[:1], logprob, tuple(text[:1].encode())) for logprob in logprobs)
        return Delta(index, text, entries, "stop")

    samples = [
        *(sample(0, "aa", -3.0, -1.0), sample(1, "b", -0.5), sample(2, "")),
        *(sample(3, "c", -2.0), sample(4, "dddd", *[-1.0] * 4), sample(5, "e", -9.0)),
    ]
    body = {"model": "m", "prompt": ["x", "y"], "n": 2, "best_of": 3}
    for logprobs, shown in ((None, [None] * 4), (0, [["b"], ["a", "a"], ["d"] * 4, ["c"]])):
        call = parse_completion({**body, "logprobs": logprobs})
        assert (call.num_choices, call.params.logprobs) == (6, 0)
        whole = CompletionAnswer(call, Target(name="m", base="b")).whole([samples, Finished(Usage(2, 12))])
        assert [(c["index"], c["text"]) for c in whole["choices"]] == [(0, "b"), (1, "aa"), (2, "dddd"), (3, "c")]
        assert [c["logprobs"] and c["logprobs"]["tokens"] for c in whole["choices"]] == shown
        assert whole["usage"]["completion_tokens"] == 12
