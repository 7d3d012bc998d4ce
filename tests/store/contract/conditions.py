"""Documents by the values of their fields."""

from typing import Any

import pytest

from tests.store.contract.opened import Opened, ids
from tests.store.contract.texts import HARD_TEXTS
from tuneloom.errors import InvalidRequest
from tuneloom.store.base import Create, Documents, Range, field_path


class OfConditions(Opened):
    def test_all_documents_of_a_collection_come_ordered_by_id(self, documents: Documents) -> None:
        names = ["b", "a", "B", "é", "10", "9", "日"]
        documents.commit([Create("things", id, {}) for id in names] + [Create("others", "x", {})])
        assert ids(documents.query("things")) == sorted(names)
        assert ids(documents.query("things", descending=True)) == sorted(names, reverse=True)
        assert documents.query("nothing") == []

    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            (None, ["null"]),
            (True, ["yes"]),
            (False, ["no"]),
            (1, ["one"]),
            (1.0, ["one"]),
            (0, ["zero"]),
            (-0.0, ["zero"]),
            (0.5, ["half"]),
            ("1", ["text"]),
            ("", []),
            (2**70, []),
            ("\ud800", []),
        ],
    )
    def test_values_are_equal_only_with_their_type(self, mixed: Documents, value: Any, expected: list[str]) -> None:
        assert ids(mixed.query("things", {"v": value})) == expected
        assert ids(mixed.query("things", {field_path("v"): value, "w": 5})) == []

    def test_large_integers_are_compared_exactly(self, documents: Documents) -> None:
        documents.commit([Create("things", str(i), {"v": 2**53 + i}) for i in range(3)])
        assert ids(documents.query("things", {"v": 2**53 + 1})) == ["1"]
        assert ids(documents.query("things", order_by="v", bounds=Range(above=2**53))) == ["1", "2"]

    def test_every_condition_must_hold(self, documents: Documents) -> None:
        rows = {"a": (1, "x"), "b": (1, "y"), "c": (2, "x")}
        documents.commit([Create("things", id, {"n": n, "s": s}) for id, (n, s) in rows.items()])
        assert ids(documents.query("things", {"n": 1, "s": "x"})) == ["a"]
        assert ids(documents.query("things", {"n": 1, "missing": None})) == []

    def test_a_dotted_key_looks_inside_objects(self, documents: Documents) -> None:
        documents.commit(
            [
                Create("things", "a", {"spec": {"metadata": {"team": "x", "on": True}}}),
                Create("things", "b", {"spec": {"metadata": {"team": "y", "on": 1}}}),
                Create("things", "c", {"spec": {"metadata": None}}),
                Create("things", "d", {"spec": "team"}),
            ]
        )
        assert ids(documents.query("things", {"spec.metadata.team": "x"})) == ["a"]
        assert ids(documents.query("things", {"spec.metadata.on": True})) == ["a"]
        assert ids(documents.query("things", {"spec.metadata.on": 1})) == ["b"]
        assert ids(documents.query("things", {"spec.metadata": None})) == ["c"]
        assert ids(documents.query("things", {"spec.team": "x"})) == []

    @pytest.mark.parametrize("key", [text for text in HARD_TEXTS if len(text) < 100] + ["a b", "$.x", "[0]", "#-1"])
    def test_keys_of_users_are_data_whatever_they_hold(self, documents: Documents, key: str) -> None:
        documents.commit(
            [
                Create("things", "a", {"metadata": {key: "x"}}),
                Create("things", "b", {"metadata": {key: "y"}}),
                Create("things", "c", {"metadata": {key: 1}}),
                Create("things", "d", {"metadata": {}, "a": {"b": "x"}}),
            ]
        )
        path = field_path("metadata", key)
        assert ids(documents.query("things", {path: "x"})) == ["a"]
        assert ids(documents.query("things", {path: 1.0})) == ["c"]
        assert ids(documents.query("things", {path: None})) == []

    @pytest.mark.parametrize("path", ["", ".", "a.", ".a", "a..b", "`a", "a`b`", "a b", "a'b", "$.a", "é"])
    def test_a_broken_field_is_refused(self, documents: Documents, path: str) -> None:
        with pytest.raises(InvalidRequest):
            documents.query("things", {path: 1})
        with pytest.raises(InvalidRequest):
            documents.query("things", order_by=path)

    def test_a_condition_looks_sixteen_names_deep(self, documents: Documents) -> None:
        deep: Any = "x"
        for _ in range(15):
            deep = {"k": deep}
        documents.commit([Create("things", "a", {"v": deep})])
        path = ["v", *["k"] * 15]
        assert ids(documents.query("things", {field_path(*path): "x"})) == ["a"]
        for wrong in ([*path, "k"], ["v", "k" * 1_400], ["v", "\ud800"]):
            with pytest.raises(InvalidRequest):
                documents.query("things", {field_path(*wrong): "x"})

    def test_names_that_look_like_each_other_are_told_apart(self, documents: Documents) -> None:
        names = ["__x__", "__x__-", "-", "--", "", "%0a", "\n", "\\n", "%", "x-"]
        documents.commit([Create("things", str(i), {"o": {name: 1}}) for i, name in enumerate(names)])
        assert [ids(documents.query("things", {field_path("o", name): 1})) for name in names] == [
            [str(i)] for i in range(len(names))
        ]
        documents.commit([Create("others", "a", {"__x__": 1, "__": "y"})])
        assert ids(documents.query("others", {"__x__": 1, "__": "y"}, order_by="__x__")) == ["a"]

    def test_everything_in_a_large_record_is_found(self, documents: Documents) -> None:
        pieces = {f"{i:04}": {"k": f"{i}" * 5} for i in range(4_900)}
        documents.commit([Create("things", "a", {"v": pieces, "l": [1] * 5_000, "last": {"k": "z"}})])
        for i in (0, 2_000, 4_899):
            assert ids(documents.query("things", {field_path("v", f"{i:04}", "k"): f"{i}" * 5})) == ["a"]
        assert ids(documents.query("things", {"last.k": "z"})) == ["a"]
