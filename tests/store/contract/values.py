"""What a document may hold, and that it comes back exactly."""

import json
from typing import Any

import pytest

from tests.store.contract.opened import Opened
from tests.store.contract.texts import HARD_TEXTS
from tuneloom.errors import InvalidRequest, TooLarge
from tuneloom.store.base import Create, Documents, Increment, Replace


class OfValues(Opened):
    @pytest.mark.parametrize(
        ("data", "named"),
        [
            ({"v": float("nan")}, "`v`"),
            ({"v": {"w": [float("inf")]}}, "`v.w[0]`"),
            ({"v": 2**63}, "`v`"),
            ({"v": "\ud800"}, "`v`"),
            ({"v": {1: 2}}, "`v`"),
            ({"v": {1, 2}}, "`v`"),
            ({"v": b"bytes"}, "`v`"),
            ({"a.b": 1}, "`a.b`"),
            ({"a' OR 1": 1}, "`a' OR 1`"),
        ],
    )
    def test_what_cannot_be_stored_exactly_is_refused_by_name(
        self, documents: Documents, data: Any, named: str
    ) -> None:
        with pytest.raises(InvalidRequest) as error:
            documents.commit([Create("things", "a", {"fine": 1}), Create("things", "b", data)])
        assert named in error.value.message
        assert documents.query("things") == []

    def test_a_document_has_at_most_a_megabyte(self, documents: Documents) -> None:
        documents.commit([Create("things", "a", {"v": "é" * 400_000})])
        with pytest.raises(TooLarge):
            documents.commit([Create("things", "b", {"v": "é" * 500_001})])

    @pytest.mark.parametrize(
        "data",
        [
            {},
            {"l": [], "o": {}, "ll": [[[]], [[1, [2.0, [None]]]], {}], "lo": [{"a": [{}]}]},
            {"i": 1, "f": 1.0, "big": 2**63 - 1, "small": -(2**63), "tiny": 5e-324, "huge": 1.7976931348623157e308},
            {"o": {"i": 1, "f": 1.0, "big": 2**53 + 1, "l": [2**53 + 1, 1, 1.0, True, None]}},
            {"o": {"z": 1, "a": 2, "m": {"y": 1, "b": 2}}},
            {"o": {key: {key: key} for key in HARD_TEXTS}, "l": HARD_TEXTS},
            {
                "__x__": 1,
                "__": 2,
                "o": {"__x__": 1, "__x__-": 2, "-": 3, "": 4, "%0a": 5, "\n": 6, "__x__--": {"": ""}},
            },
            {"t": "é" * 1500, "o": {"t": "é" * 1500}, "short": "x" * 1400},
            {"id": "other", "data": 1, "text": {"commit": 1}, "commit": [1]},
        ],
        ids=range(9),
    )
    def test_what_is_written_comes_back_exactly(self, documents: Documents, data: dict[str, Any]) -> None:
        rev = documents.commit([Create("things", "a", data)])["things", "a"]
        documents.commit([Replace("things", "a", data, rev), Create("things", "b", {"w": 1})])
        found = documents.find("things", "a")
        assert found is not None and [found, documents.find("things", "b")] == documents.query("things")
        assert found.data == data
        # As text: 1 is not 1.0 there, and the keys of objects keep their order.
        assert {key: json.dumps(value) for key, value in found.data.items()} == {
            key: json.dumps(value) for key, value in data.items()
        }

    def test_objects_and_lists_may_be_twenty_levels_deep(self, documents: Documents) -> None:
        deep: Any = 1
        for level in range(20):
            deep = [deep] if level % 3 else {"k": deep}
        objects: Any = "x"
        for _ in range(20):
            objects = {"k": objects}
        documents.commit([Create("things", "a", {"v": deep, "o": objects})])
        found = documents.find("things", "a")
        assert found is not None and found.data == {"v": deep, "o": objects}
        with pytest.raises(InvalidRequest, match="deeper"):
            documents.commit([Create("things", "b", {"v": {"k": objects}})])

    @pytest.mark.parametrize("kind", ["text", "texts", "digits", "keys", "objects", "escapes"])
    def test_a_document_of_a_megabyte_comes_back(self, documents: Documents, kind: str) -> None:
        data: dict[str, Any] = {
            "text": {"v": "x" * 999_980},
            "texts": {f"v{i}": "x" * 9_900 for i in range(100)},
            "digits": {"v": [1] * 499_900},
            "keys": {"v": {f"{i:05}": 1 for i in range(99_000)}},
            "objects": {"v": {f"{i:05}": {"a": {"b": True}} for i in range(39_000)}},
            "escapes": {"v": {str(i): '"\\' * 1_000 for i in range(240)}},
        }[kind]
        size = len(json.dumps(data, separators=(",", ":")))
        assert 950_000 < size <= 1_000_000
        documents.commit([Create("things", "a", {**data, "n": 1})])
        documents.commit([Increment("things", "a", "n", 1)])
        (found,) = documents.query("things", {"n": 2})
        assert found.data == {**data, "n": 2}

    def test_a_commit_has_at_most_three_megabytes(self, documents: Documents) -> None:
        writes = [Create("things", f"{i}", {"v": "x" * 990_000}) for i in range(4)]
        with pytest.raises(TooLarge):
            documents.commit(writes)
        assert documents.query("things") == []
        documents.commit(writes[:3])

    def test_a_document_has_at_most_128_fields(self, documents: Documents) -> None:
        fields = {f"{'f' * 120}{i:03}": "x" * 1_401 for i in range(129)}
        with pytest.raises(InvalidRequest, match="128"):
            documents.commit([Create("things", "a", fields)])
        fields.popitem()
        documents.commit([Create("things", "a", {**fields, "f" * 120 + "000": "x" * 700_000})])
