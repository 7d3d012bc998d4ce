import io
import json
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.rows.conftest import ANSWER, SKIPPED, USER, chat, only_problem, scan
from tuneloom.rows import Conversation, Pair, Row, Scan, Text


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (chat(USER, ANSWER), Conversation((USER, ANSWER))),
        (chat(USER, {**ANSWER, "weight": 0}, USER, ANSWER), Conversation((USER, SKIPPED, USER, ANSWER))),
        (
            chat({"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}, ANSWER),
            Conversation((USER, ANSWER)),
        ),
        ({"prompt": "1 + 1 =", "completion": " 2"}, Pair("1 + 1 =", " 2")),
        ({"prompt": [USER], "completion": [ANSWER]}, Conversation((USER, ANSWER))),
        (
            {"prompt": [USER, ANSWER, USER], "completion": [ANSWER]},
            Conversation((USER, SKIPPED, USER, ANSWER)),
        ),
        ({"instruction": "hi", "output": "hello"}, Conversation((USER, ANSWER))),
        (
            {"instruction": "Add.", "input": "1 1", "output": "hello"},
            Conversation(({"role": "user", "content": "Add.\n\n1 1"}, ANSWER)),
        ),
        ({"instruction": "hi", "input": "", "output": "hello"}, Conversation((USER, ANSWER))),
        ({"input": "hi", "output": "hello"}, Conversation((USER, ANSWER))),
        ({"text": "once"}, Text("once")),
        (
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}], "id": "x"},
            Conversation((USER, ANSWER)),
        ),
        (
            {
                "system": "Be kind.",
                "conversations": [
                    USER,
                    {"from": "gpt", "value": "hello", "weight": 0},
                    {"from": "tool", "value": "3"},
                    {"from": "assistant", "value": "hello"},
                ],
            },
            Conversation(
                ({"role": "system", "content": "Be kind."}, USER, SKIPPED, {"role": "tool", "content": "3"}, ANSWER)
            ),
        ),
        (chat(USER, {"content": "hello", "role": "assistant"}), Conversation((USER, ANSWER))),
        (
            chat(USER, {**ANSWER, "refusal": None, "annotations": [], "audio": None, "tool_calls": None}),
            Conversation((USER, ANSWER)),
        ),
    ],
)
def test_each_format_becomes_its_row(row: dict[str, Any], expected: Row) -> None:
    rows, result = scan(row)
    assert rows == [expected]
    assert result.problems == []


def test_tools_and_calls_are_kept_and_the_older_spelling_becomes_the_newer() -> None:
    tool = {"type": "function", "function": {"name": "sum", "parameters": {"type": "object"}}}
    call = {"type": "function", "function": {"name": "sum", "arguments": "{}"}}
    new = chat(
        USER,
        {"role": "assistant", "content": None, "tool_calls": [{"id": "c1", **call}]},
        {"role": "tool", "tool_call_id": "c1", "content": "3"},
        ANSWER,
        tools=[tool],
        parallel_tool_calls=False,
    )
    old = chat(
        USER,
        {"role": "assistant", "content": None, "function_call": call["function"]},
        {"role": "function", "name": "sum", "content": "3"},
        ANSWER,
        functions=[tool["function"]],
    )
    (first, second), result = scan(new, old)
    assert result.problems == []
    assert isinstance(first, Conversation) and isinstance(second, Conversation)
    assert first.tools == second.tools == (tool,)
    assert first.messages[1]["tool_calls"] == [{"id": "c1", **call}]
    assert second.messages[1]["tool_calls"] == [call]
    assert second.messages[2] == {"role": "tool", "content": "3", "name": "sum"}


def test_a_weight_or_arguments_that_say_nothing_are_none() -> None:
    call = {"type": "function", "function": {"name": "sum", "arguments": ""}}
    plain, called = chat(USER, {**ANSWER, "weight": None}), chat(USER, {"role": "assistant", "tool_calls": [call]})
    rows, result = scan(plain, called)
    assert result.problems == [] and rows[0] == Conversation((USER, ANSWER))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{oops", "Not JSON"),
        ("[1]", "JSON array"),
        ("3", "a number, not a JSON object"),
        (b'{"text": "\xff"}', "byte 11 of the line is 0xff"),
        ('{"messages": [], "x": NaN}', "`NaN`"),
        ('{"messages": 1, "messages": 2}', "appears twice"),
        (r'{"messages": [{"role": "user", "content": "\ud83d"}]}', "half of a character"),
        ("[" * 200_000, "nested too deeply"),
        ('{"messages": ' + "9" * 5000 + "}", "Not usable JSON: a number has too many digits."),
        ({}, "No known format"),
        ({"question": "a"}, "`question`"),
        ({"text": "other"}, "A file has one format"),
        ({"input": {}, "preferred_output": [], "non_preferred_output": []}, "preference rows"),
        (chat(USER, ANSWER, extra=1), "`extra`"),
        (chat(), "`messages` is empty"),
        ({"messages": "hi"}, "`messages` is a string"),
        (chat(USER), "no message with the role `assistant`"),
        (chat(USER, ANSWER, USER), "must be `assistant`"),
        (chat(USER, {**ANSWER, "weight": 0}), "`weight` 0"),
        (chat(USER, {**ANSWER, "weight": 2}), "`weight` is `2`"),
        (chat(USER, {**ANSWER, "weight": True}), "`weight` is `true`"),
        (chat(USER, {**ANSWER, "weight": "1"}), "`weight` is a string, `1`; it must be the number 0 or 1"),
        (
            chat(USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "x"}}]}),
            "`messages[1]`: `tool_calls[0]`: `function.arguments`: Not JSON",
        ),
        (chat({**USER, "weight": 1}, ANSWER), "`weight`"),
        (chat({"role": "bot", "content": "x"}, ANSWER), "unknown role `bot`"),
        (chat({"content": "x"}, ANSWER), "`role` is missing"),
        (chat({"role": "user"}, ANSWER), "`messages[0]`: `content` is missing"),
        (chat({"role": "user", "content": 3}, ANSWER), "`content` is a number"),
        (chat({"role": "user", "content": [{"type": "image_url"}]}, ANSWER), "`image_url`"),
        (chat("hi", ANSWER), "`messages[0]` is a string"),
        (chat(USER, {"role": "assistant", "content": ""}), "`content` is empty"),
        (chat(USER, {"role": "assistant", "content": None}), "no `tool_calls`"),
        (
            chat(USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}),
            "`function.arguments` is null",
        ),
        (chat(USER, ANSWER, tools=[{"type": "web"}]), "`tools[0]`: `type` is `web`"),
        (chat(USER, ANSWER, tools={}), "`tools` is an object"),
        (chat(USER, ANSWER, parallel_tool_calls="yes"), "`parallel_tool_calls` is a string"),
    ],
)
def test_a_wrong_line_is_named_with_its_reason(line: bytes | str | dict[str, Any], reason: str) -> None:
    assert reason in only_problem(line)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a"}, "`completion` is missing"),
        ({"completion": "a"}, "`prompt` is missing"),
        ({"prompt": "a", "completion": ""}, "`completion` is empty"),
        ({"prompt": "a", "completion": ["b"]}, "`completion` is an array"),
        ({"prompt": [USER], "completion": "b"}, "`completion` is a string"),
        ({"instruction": "a", "output": None}, "`output` is null"),
        ({"instruction": "", "output": "b"}, "`instruction` is empty"),
        ({"instruction": "a", "input": 3, "output": "b"}, "`input` is a number"),
        ({"input": "a"}, "`output` is missing"),
        ({"text": 7}, "`text` is a number"),
        ({"conversations": [{"from": "bot", "value": "x"}]}, "`conversations[0]`: unknown `from` `bot`"),
        ({"conversations": [{"value": "x"}]}, "`conversations[0]`: `from` is missing"),
        ({"conversations": [{"from": ["gpt"], "value": "x"}]}, "`from` is an array"),
        ({"conversations": [{"from": "gpt", "value": 1}]}, "`value` is a number"),
        ({"conversations": [{"from": "gpt", "value": ""}]}, "`content` is empty"),
        ({"conversations": [{"from": "human", "value": "x"}]}, "no message with the role `assistant`"),
        ({"conversations": [{"from": "system", "value": "x"}], "system": "y"}, "not both"),
        (chat(USER, {**ANSWER, "audio": {"id": "x"}}), "`audio`"),
        ({"text": "a", "label": "b"}, "`label`"),
    ],
)
def test_other_formats_name_what_is_wrong(row: dict[str, Any], reason: str) -> None:
    rows, result = scan(row)
    assert rows == []
    assert [(problem.line, reason in problem.message) for problem in result.problems] == [(1, True)]


def test_a_byte_order_mark_and_empty_lines_are_fine_and_lines_keep_their_numbers() -> None:
    result = Scan()
    body = b"\xef\xbb\xbf" + json.dumps(chat(USER, ANSWER)).encode() + b"\r\n\n  \n" + b"oops\n"
    assert [line for line, _ in result.rows(io.BytesIO(body))] == [1]
    assert [problem.line for problem in result.problems] == [4]
    assert result.num_rows == 2


def test_an_empty_file_is_a_problem_of_the_file() -> None:
    for body in (b"", b"\n\n", b"\xef\xbb\xbf"):
        _, result = scan(body)
        assert [(problem.line, "empty" in problem.message) for problem in result.problems] == [(None, True)]


def test_utf_16_is_named_once() -> None:
    _, result = scan(json.dumps({"text": "a\nb"}).encode("utf-16"))
    assert [problem.message for problem in result.problems] == ["The file is UTF-16. Save it as UTF-8."]


def test_too_few_rows_is_a_problem_of_the_file() -> None:
    rows, result = scan({"text": "a"}, {"text": "b"}, min_rows=10)
    assert len(rows) == 2
    assert result.problems[0].message == "The file has 2 rows; at least 10 are needed."


def test_problems_beyond_the_limit_are_counted() -> None:
    _, result = scan(*["oops"] * 250)
    assert len(result.problems) == 100
    assert result.problem_count == 250


def test_a_huge_line_is_named_and_the_next_ones_are_read_in_bounded_memory() -> None:
    def chunks() -> Iterator[bytes]:
        yield b'{"text": "'
        for _ in range(64):
            yield b"x" * (1 << 20)
        yield b'"}\n{"text": "b"}\n'

    body = io.BytesIO(b"".join(chunks()))
    tracemalloc.start()
    result = Scan(max_line_bytes=1 << 20)
    rows = [line for line, _ in result.rows(body)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rows == [2]
    assert [(problem.line, "longer than" in problem.message) for problem in result.problems] == [(1, True)]
    assert peak < 8 << 20


KEYS = ["messages", "role", "content", "tool_calls", "function", "name", "weight", "tools", "type", "prompt"]
KEYS += ["completion", "text", "input", "output", "instruction", "x"]
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["user", "assistant"]),
    lambda children: (
        st.lists(children, max_size=4)
        | st.dictionaries(
            st.sampled_from(KEYS),
            children,
            max_size=5,
        )
    ),
    max_leaves=20,
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.binary(max_size=60) | json_values.map(lambda value: json.dumps(value).encode()), max_size=5))
def test_whatever_the_bytes_every_row_is_read_or_named(lines: list[bytes]) -> None:
    body = b"\n".join(lines)
    result = Scan()
    good = [line for line, _ in result.rows(io.BytesIO(body))]
    named = [problem.line for problem in result.problems if problem.line is not None]
    last = body.count(b"\n") + 1
    assert all(1 <= line <= last for line in good + named)
    assert not set(good) & set(named)
    if not body.startswith((b"\xff\xfe", b"\xfe\xff")):
        assert result.num_rows == len(good) + len(named)


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"messages": [{"role": "user"}, {"role": "assistant", "content": "b"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "a", "foo": 1}]}, "messages[0].foo"),
        ({"messages": [{"role": "boss", "content": "a"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"prompt": "a", "completion": 3}, "completion"),
        ({"whatever": 3}, None),
    ],
)
def test_a_problem_names_the_field(row: dict[str, Any], field: str | None) -> None:
    scan = Scan()
    assert not list(scan.rows(io.BytesIO(json.dumps(row).encode())))
    assert [problem.field for problem in scan.problems] == [field], scan.problems


def test_an_array_over_several_lines_is_one_problem_and_not_one_a_line() -> None:
    result = Scan()
    assert list(result.rows(io.BytesIO(json.dumps([chat(USER, ANSWER)] * 12, indent=1).encode()))) == []
    assert result.problem_count == 1 and "ends in `.json`" in result.problems[0].message


def test_utf_32_is_called_by_its_name() -> None:
    for encoding in ("utf-32", "utf-32-le", "utf-32-be"):
        result = Scan()
        list(result.rows(io.BytesIO(json.dumps(chat(USER, ANSWER)).encode(encoding))))
        assert "UTF-32" in result.problems[0].message
