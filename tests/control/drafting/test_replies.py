"""Replies of models as they come: what is repaired, what is dropped, and under which reason."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.control.drafting.model import row
from tuneloom.control.drafting import shapes
from tuneloom.control.drafting.replies import read_reply
from tuneloom.domain import DraftFormat
from tuneloom.rows import Scan

QA = {"instruction": "a", "input": "", "output": "b"}
TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
PREFERENCE = {
    "input": {"messages": [{"role": "user", "content": "a"}]},
    "preferred_output": [{"role": "assistant", "content": "b"}],
    "non_preferred_output": [{"role": "assistant", "content": "c"}],
}


@pytest.mark.parametrize(
    ("format", "text", "rows"),
    [
        ("instruction", json.dumps([QA, QA]), [QA, QA]),
        ("instruction", json.dumps({"rows": [QA]}), [QA]),
        ("instruction", json.dumps({"data": [QA]}), [QA]),
        ("instruction", json.dumps({"my_rows": [QA]}), [QA]),
        ("instruction", json.dumps(QA), [QA]),
        ("instruction", f"```json\n{json.dumps([QA])}\n```", [QA]),
        ("instruction", f"Sure!\n```\n{json.dumps({'rows': [QA]})}\n```\nMore?", [QA]),
        ("instruction", f"```json\n{json.dumps([QA])}", [QA]),
        ("instruction", f"Here: {json.dumps([QA])} Enjoy.", [QA]),
        ("instruction", f"{json.dumps(QA)}\n{json.dumps(QA)}\n", [QA, QA]),
        ("instruction", json.dumps({"Question": "a", "Answer": "b", "id": 7}), [QA]),
        ("instruction", json.dumps({"instruction": "a", "input": "", "output": 42}), [{**QA, "output": "42"}]),
        ("instruction", json.dumps({"instruction": "a", "input": "c", "output": "b"}), [{**QA, "input": "c"}]),
        ("instruction", json.dumps({"instruction": "a", "output": ["b", "c"]}), [{**QA, "output": "b\nc"}]),
        ("text", json.dumps([{"content": "x"}, {"text": "y"}]), [{"text": "x"}, {"text": "y"}]),
        ("chat", json.dumps([{"messages": TURNS}]), [{"messages": TURNS}]),
        ("chat", json.dumps({"conversations": [{"messages": TURNS}]}), [{"messages": TURNS}]),
        (
            "chat",
            json.dumps({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}),
            [{"messages": TURNS}],
        ),
        (
            "chat",
            json.dumps([{"dialogue": [{"role": "Human", "text": "a"}, {"speaker": "Bot", "content": "b"}]}]),
            [{"messages": TURNS}],
        ),
        ("preference", json.dumps([{"prompt": "a", "chosen": "b", "rejected": "c"}]), [PREFERENCE]),
        ("preference", json.dumps([{"question": "a", "good": "b", "bad": "c"}]), [PREFERENCE]),
    ],
)
def test_rows_are_found_and_repaired(format: DraftFormat, text: str, rows: list[Any]):
    reply = read_reply(format, text)
    assert reply.rows == rows
    assert reply.received == len(rows) and not reply.dropped


@pytest.mark.parametrize(
    ("format", "text", "repaired"),
    [
        ("instruction", json.dumps({"rows": [QA, QA]}), 0),
        ("instruction", json.dumps([{**QA, "input": ""}]), 0),
        ("instruction", json.dumps([{**QA, "id": 7}, QA]), 1),
        ("instruction", json.dumps([{"question": "a", "output": "b"}, QA]), 1),
        ("instruction", json.dumps([{**QA, "output": 42}, QA]), 1),
        ("instruction", f"```json\n{json.dumps([QA, QA])}\n```", 2),
        ("instruction", f"<think>Say [1] {{x}}.</think>{json.dumps([QA, QA])}", 2),
        ("instruction", f"```json\n{json.dumps([QA])}\n```\nand\n```\n{json.dumps({'rows': [QA]})}\n```", 2),
        ("instruction", json.dumps({"rows": [QA]}) + "\n" + json.dumps({"rows": [QA, QA]}), 3),
        ("instruction", json.dumps([{**QA, "output": "b\nc"}]).replace("\\n", "\n"), 1),
        ("chat", json.dumps([{"messages": TURNS}]), 0),
        ("chat", json.dumps([{"messages": [{**TURNS[0], "role": "human"}, TURNS[1]]}]), 1),
        ("preference", json.dumps([{"prompt": "a", "chosen": "b", "rejected": "c"}]), 0),
    ],
)
def test_repaired_rows_are_counted(format: DraftFormat, text: str, repaired: int):
    assert read_reply(format, text).repaired == repaired


@pytest.mark.parametrize(
    ("format", "text", "dropped"),
    [
        ("instruction", "I cannot help with that.", {"not_json": 1}),
        ("instruction", "", {"not_json": 1}),
        ("instruction", "[1, [], null]", {"wrong_shape": 3}),
        ("instruction", "{}", {"wrong_shape": 1}),
        ("instruction", json.dumps([{"instruction": "a", "output": " "}]), {"empty": 1}),
        ("instruction", json.dumps([{"instruction": "a", "output": {"b": 1}}]), {"wrong_shape": 1}),
        ("instruction", json.dumps([{"instruction": "a", "output": "\ud800"}]), {"invalid": 1}),
        ("chat", json.dumps([{"messages": TURNS[:1]}]), {"no_answer": 1}),
        ("chat", json.dumps([{"messages": []}]), {"wrong_shape": 1}),
        ("chat", json.dumps([{"messages": TURNS[1:]}]), {"wrong_shape": 1}),
        ("chat", json.dumps([{"messages": [{**TURNS[0], "content": " "}, TURNS[1]]}]), {"empty": 1}),
        ("chat", json.dumps([{"messages": [TURNS[0], {**TURNS[1], "content": "\n"}]}]), {"no_answer": 1}),
        ("instruction", "<think>First [{...", {"not_json": 1}),
        ("chat", json.dumps([{"messages": [TURNS[0], {"role": "assistant", "content": ""}]}]), {"no_answer": 1}),
        ("chat", json.dumps([{"messages": [{"role": "narrator", "content": "x"}, TURNS[1]]}]), {"wrong_shape": 1}),
        ("preference", json.dumps([{"prompt": "a", "chosen": "b", "rejected": "b"}]), {"invalid": 1}),
        ("preference", json.dumps([{"prompt": "a", "chosen": "b"}]), {"wrong_shape": 1}),
        ("text", "[" * 100_000, {"not_json": 1}),
    ],
)
def test_what_is_no_row_is_dropped_by_reason(format: DraftFormat, text: str, dropped: dict[str, int]):
    reply = read_reply(format, text)
    assert reply.rows == [] and reply.dropped == dropped
    assert reply.received == sum(dropped.values())


@pytest.mark.parametrize("envelope", ['{"rows": %s}', "%s", "```json\n%s\n```"])
@pytest.mark.parametrize("format", ["chat", "instruction", "text", "preference"])
def test_a_reply_cut_off_anywhere_keeps_its_whole_rows(format: DraftFormat, envelope: str):
    given = [row(format, number) for number in range(3)]
    text = envelope % json.dumps(given)
    ends = [text.index(json.dumps(each)) + len(json.dumps(each)) for each in given]
    wanted = read_reply(format, json.dumps(given)).rows
    for cut in range(len(text)):
        reply = read_reply(format, text[:cut])
        whole = sum(end <= cut for end in ends)
        assert reply.rows == wanted[:whole], text[:cut]
        assert len(reply.rows) + sum(reply.dropped.values()) == reply.received


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                ["rows", "messages", "role", "content", "text", "instruction", "output", "prompt", "chosen", "x"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(["chat", "instruction", "text", "preference"]), json_values | st.text(max_size=40), st.data())
def test_whatever_comes_gives_rows_that_can_be_trained_on(format: DraftFormat, value: Any, data: st.DataObject):
    text = value if isinstance(value, str) else json.dumps(value)
    reply = read_reply(format, text[: data.draw(st.integers(0, len(text)))])
    assert len(reply.rows) + sum(reply.dropped.values()) == reply.received
    for each in reply.rows:
        Scan(method="dpo" if format == "preference" else "supervised").row(each)
        assert shapes.text_of(each).strip()


def test_a_row_is_shown_to_a_model_as_it_would_write_it():
    for format in ("chat", "instruction", "text", "preference"):
        given = row(format, 1)
        made = read_reply(format, json.dumps([given])).rows[0]
        assert shapes.from_row(format, made) == given
