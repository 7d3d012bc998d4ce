"""Rows written as CSV or JSON by the standard library come back as they were, and no bytes at all break the reader."""

import csv
import io
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.rows.test_convert import convert, objects, rows_of
from tuneloom.errors import InvalidFile

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30) | st.text(
    '",;\r\n\t \0\\a🙂\u2028\ufeff', min_size=1, max_size=12
)
users = st.fixed_dictionaries({"role": st.just("user"), "content": texts})
answers = st.fixed_dictionaries({"role": st.just("assistant"), "content": texts})
tools = st.lists(
    st.fixed_dictionaries({"type": st.just("function"), "function": st.fixed_dictionaries({"name": texts})}), max_size=2
)
strings = [
    {"text": texts},
    {"prompt": texts, "completion": texts},
    {"instruction": texts, "input": st.just("") | texts, "output": texts},
    {"input": texts, "output": texts},
    {"prompt": texts, "chosen": texts.map("a".__add__), "rejected": texts.map("b".__add__)},
]
with_json = [
    {"messages": st.tuples(users, answers).map(list), "tools": tools},
    {
        "input": st.fixed_dictionaries({"messages": st.tuples(users).map(list)}),
        "preferred_output": st.just([{"role": "assistant", "content": "a"}]),
        "non_preferred_output": st.just([{"role": "assistant", "content": "b"}]),
    },
]
# One format for all rows of a file.
files = st.one_of(
    *(st.lists(st.fixed_dictionaries(columns), min_size=1, max_size=5) for columns in [*strings, *with_json])
)


def to_csv(rows: list[dict[str, Any]], *, indent: int | None, **options: Any) -> bytes:
    out = io.StringIO()
    writer = csv.writer(out, **options)
    writer.writerow(rows[0])
    for row in rows:
        writer.writerow(
            cell if isinstance(cell, str) else json.dumps(cell, indent=indent, ensure_ascii=False)
            for cell in (row[name] for name in rows[0])
        )
    return out.getvalue().encode()


@settings(max_examples=100, deadline=None)
@given(
    files,
    st.sampled_from([None, 1]),
    st.sampled_from(
        [
            {"lineterminator": "\r\n", "quoting": csv.QUOTE_MINIMAL},
            {"lineterminator": "\r\n", "quoting": csv.QUOTE_ALL},
            {"lineterminator": "\n", "quoting": csv.QUOTE_ALL},
        ]
    ),
    st.integers(1, 64),
)
def test_rows_come_back_from_csv(rows: list[dict[str, Any]], indent: int | None, options: Any, step: int) -> None:
    lines = convert(to_csv(rows, indent=indent, **options), "csv", step=step)
    assert objects(lines) == rows
    assert rows_of(lines) == rows_of(json_lines(rows))


@settings(max_examples=100, deadline=None)
@given(files, st.sampled_from([None, 0, 3]), st.booleans(), st.integers(1, 64))
def test_rows_come_back_from_json(rows: list[dict[str, Any]], indent: int | None, ascii_only: bool, step: int) -> None:
    lines = convert(json.dumps(rows, indent=indent, ensure_ascii=ascii_only), "json", step=step)
    assert objects(lines) == rows
    assert rows_of(lines) == rows_of(json_lines(rows))


def json_lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


PIECES = [b"prompt,completion\n", b"a,b\n", b'"', b"\n", b"\r", b",", b"\0", b"\xff", b"\xc5", b"[", b"]", b"{", b"}"]
PIECES += [b'{"text": "a"}', b"1", b" ", b'"text"', b":", b"\xef\xbb\xbf", b"\xff\xfe", b"\\u", b"\xf0\x9f\x99\x82"]


@pytest.mark.parametrize("kind", ["csv", "json"])
@settings(max_examples=200, deadline=None)
@given(
    data=st.lists(st.sampled_from(PIECES) | st.binary(max_size=4), max_size=12).map(b"".join), step=st.integers(1, 9)
)
def test_whatever_the_bytes_they_become_rows_or_are_refused(kind: str, data: bytes, step: int) -> None:
    whole, pieces = outcome(data, kind), outcome(data, kind, step=step)
    assert whole == pieces
    if isinstance(whole, bytes) and (kind == "csv" or data.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")):
        assert len(rows_of(whole)) == whole.count(b"\n") > 0


def outcome(data: bytes, kind: str, **options: Any) -> bytes | str:
    try:
        return convert(data, kind, **options)
    except InvalidFile as error:
        return error.message
