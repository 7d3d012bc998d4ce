"""Exports come back as the same rows when they are uploaded, or are refused by the number of the row."""

import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.rows.test_convert import convert, objects
from tuneloom.errors import InvalidFile
from tuneloom.rows import export, plan_export

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30) | st.text(
    '",;\r\n\t \0\\a🙂=\u2028\u2029\u0085\ufeff{}[]', min_size=1, max_size=12
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.just("") | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
user = st.fixed_dictionaries(
    {"role": st.just("user"), "content": st.just("") | texts}, optional={"name": st.none() | texts}
)
answer = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": texts}, optional={"weight": st.just(1), "refusal": st.none()}
)
function = st.fixed_dictionaries(
    {"name": texts},
    optional={"description": st.none() | st.just("") | texts, "parameters": st.none() | st.dictionaries(texts, values)},
)
tools = st.none() | st.lists(st.fixed_dictionaries({"type": st.just("function"), "function": function}), max_size=2)
chat = st.fixed_dictionaries(
    {"messages": st.tuples(user, answer).map(list)},
    optional={"tools": tools, "parallel_tool_calls": st.none() | st.booleans()},
)
with_functions = st.fixed_dictionaries(
    {"messages": st.tuples(user, answer).map(list)}, optional={"functions": st.none() | st.lists(function, max_size=2)}
)
sharegpt_turns = st.just([{"from": "human", "value": "a"}]) | texts.map(lambda text: [{"from": "user", "value": text}])
sharegpt = {"conversations": sharegpt_turns.map(lambda turns: [*turns, {"from": "gpt", "value": "b"}])}
openai_preference = {
    "input": st.fixed_dictionaries({"messages": st.tuples(user).map(list)}, optional={"tools": tools}),
    "preferred_output": texts.map(lambda text: [{"role": "assistant", "content": "a" + text}]),
    "non_preferred_output": texts.map(lambda text: [{"role": "assistant", "content": "b" + text}]),
}
rows = st.one_of(
    st.lists(row, min_size=1, max_size=5)
    for row in (
        chat,
        with_functions,
        st.fixed_dictionaries({"text": texts}),
        st.fixed_dictionaries({"prompt": st.just("") | texts, "completion": texts}),
        st.fixed_dictionaries({"instruction": texts, "output": texts}),
        st.fixed_dictionaries({"instruction": texts, "input": st.just("") | texts, "output": texts}),
        st.fixed_dictionaries({"input": texts, "output": texts}),
        st.fixed_dictionaries(sharegpt, optional={"tools": tools}),
        st.fixed_dictionaries({**sharegpt, "system": st.just("") | texts}),
        st.fixed_dictionaries({"prompt": texts, "chosen": texts.map("a".__add__), "rejected": texts.map("b".__add__)}),
        st.fixed_dictionaries(openai_preference),
    )
)


def lines_of(rows: list[dict[str, Any]], **options: Any) -> bytes:
    return "".join(json.dumps(row, **options) + "\n" for row in rows).encode()


def exported(lines: bytes, kind: Any) -> bytes:
    return b"".join(export(io.BytesIO(lines), kind, plan_export(io.BytesIO(lines), kind)))


@settings(max_examples=300, deadline=None)
@given(rows, st.sampled_from(["csv", "json"]), st.booleans())
def test_what_is_exported_comes_back_equal(rows: list[dict[str, Any]], kind: str, ascii_only: bool) -> None:
    back = objects(convert(exported(lines_of(rows, ensure_ascii=ascii_only), kind), kind))
    assert back == rows
    assert [json.dumps(row, sort_keys=True) for row in back] == [json.dumps(row, sort_keys=True) for row in rows]


def test_json_rows_are_the_stored_bytes():
    stored = b'\xef\xbb\xbf{"text": "a\\u0041"}\r\n\r\n  {"text":1e0 }\n'.replace(b"1e0 ", b'"x" ')
    assert exported(stored, "json") == b'[\n{"text": "a\\u0041"},\n{"text":"x" }\n]\n'


QA = {"instruction": "a", "output": "b"}
USER_ANSWER = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([QA, {**QA, "input": ""}], "Row 2 (line 2): It has `input` and row 1 has none; CSV cannot tell"),
        ([{**QA, "input": "x"}, QA], "Row 2 (line 2): It has no `input` and rows before it have one"),
        ([{**QA, "input": None}], "`input` is null; a column of this name holds strings."),
        ([{"prompt": USER_ANSWER[:1], "completion": USER_ANSWER[1:]}], "`prompt` is an array; a column of this"),
        ([{"conversations": [{"from": "gpt", "value": "b"}], "id": 7}], "CSV has no column for `id` beside"),
        ([{"messages": USER_ANSWER}, {"text": 1}], "Row 2 (line 2): This row has the format `text`"),
        (
            [{"messages": [USER_ANSWER[0], {"role": "assistant", "content": '"' * (3 << 20)}]}],
            "As CSV it is longer than 8,388,608 bytes.",
        ),
    ],
)
def test_what_csv_cannot_express_is_refused_by_row(rows: list[dict[str, Any]], said: str):
    with pytest.raises(InvalidFile) as caught:
        exported(lines_of(rows), "csv")
    assert said in caught.value.message
    assert caught.value.message.endswith("The format `jsonl` gives it as it is stored.")
    assert caught.value.param == "format"


def test_wrong_rows_are_not_exported_as_json():
    with pytest.raises(InvalidFile, match=r"Row 1 \(line 2\): Not JSON"):
        exported(b"\nnope\n", "json")
    with pytest.raises(InvalidFile, match="It has no rows"):
        exported(b"\n\n", "json")


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_an_export_takes_the_memory_of_a_few_rows(tmp_path: Path, kind: Any):
    path = tmp_path / "rows.jsonl"
    row = json.dumps({"input": 'a "word", ' * 1000, "output": "b\n" * 1000}) + "\n"
    with path.open("w") as file:
        file.writelines(row for _ in range(1500))
    tracemalloc.start()
    try:
        with path.open("rb") as file:
            columns = plan_export(file, kind)
        size = sum(len(piece) for piece in export(path.open("rb"), kind, columns))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert size > 20 << 20
    assert peak < 6 << 20
