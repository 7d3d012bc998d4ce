import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tuneloom.rows.fields import Wrong
from tuneloom.rows.parse import _explain, parse

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=20,
)
# JSON with bytes taken out, put in and doubled, so that most is nearly right.
broken = st.builds(
    lambda value, at, put, cut: (raw := json.dumps(value).encode())[: at % len(raw)] + put + raw[at % len(raw) + cut :],
    st.dictionaries(st.text(max_size=4), values, max_size=3),
    st.integers(0, 999),
    st.sampled_from([b"", b"\\", b'"', b"{", b"\\ud800", b"\xff", b"\x00", b"NaN", b"1e999", b"0", b'"a":1,"a":2,']),
    st.integers(0, 3),
)


@settings(max_examples=200, deadline=None)
@given(broken)
@example(b'{"a": [1e999, -0.0, 5e-324, 123456789012345678901234567890, "\\ud83d\\ude00"]}')
@example(b'{"a": ' + b"[" * 300 + b"]" * 300 + b"}")
@example(b'{"a": ' + b"9" * 5000 + b"}")
@example(b'{"a": {"b": 1, "\\u0062": 2}}')
@example(b"\xef\xbb\xbf{}")
@example(b"")
def test_a_line_is_what_the_standard_library_makes_of_it(raw: bytes) -> None:
    assert _outcome(parse, raw) == _outcome(_explained_object, raw)


def _explained_object(raw: bytes) -> Any:
    data = _explain(raw)
    return data if isinstance(data, dict) else parse(raw)


def _outcome(read: Any, raw: bytes) -> str:
    try:
        # `repr` tells 1 from 1.0 and from True, and 0.0 from -0.0.
        return repr(read(raw))
    except Wrong as problem:
        return f"wrong: {problem}"


@pytest.mark.parametrize("depth", [150, 300])
def test_deep_values_are_read(depth: int) -> None:
    assert parse(b'{"a": ' + b"[" * depth + b"]" * depth + b"}")
