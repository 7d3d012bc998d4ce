"""What every `Documents` and every `Blobs` must do: the sentences of the seams as tests.

An implementation joins by a class that inherits the tests and a fixture `documents_url` or `blobs_url` that names an
empty store. Everything is asked through the seam, so that other engines can join without a change here.
"""

import itertools
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from tuneloom.errors import InvalidRequest, TooLarge, TuneloomError
from tuneloom.store import open_blobs, open_documents
from tuneloom.store.base import (
    MAX_WRITES,
    BlobCorrupt,
    BlobExists,
    BlobInfo,
    BlobNotFound,
    Blobs,
    Create,
    Delete,
    Documents,
    Increment,
    Range,
    Replace,
    StoreConflict,
    Write,
    field_path,
)

SPAWN = multiprocessing.get_context("spawn")
PROCESS_TIMEOUT_S = 60
HARD_TEXTS = [
    "",
    " ",
    "'",
    '"',
    "\\",
    "a'; DROP TABLE documents; --",
    '$."x"',
    "%_*?",
    "a.b",
    "`",
    "null",
    "1",
    "true",
    "\n\r\t",
    "nul\0inside",
    "é\u0301 日本語 🙂",
    "\u2028\ufeff",
    "x" * 5000,
]


def ids(found: list[Any]) -> list[str]:
    return [document.id for document in found]


class DocumentsContract:
    # Of random commits and queries; fewer where each call takes milliseconds.
    NUM_EXAMPLES = 60

    @pytest.fixture
    def documents(self, documents_url: str) -> Iterator[Documents]:
        documents = open_documents(documents_url)
        yield documents
        documents.close()

    @pytest.fixture
    def mixed(self, documents: Documents) -> Documents:
        """One document for each kind of value in `v`, and one without it."""
        values = {"null": None, "no": False, "yes": True, "neg": -1, "zero": 0, "half": 0.5, "one": 1, "text": "1"}
        writes: list[Write] = [Create("things", id, {"v": value}) for id, value in values.items()]
        documents.commit([*writes, Create("things", "none", {"w": 1})])
        return documents

    # --- one document ---

    def test_a_created_document_is_found_as_it_was_written(self, documents: Documents) -> None:
        data = {"s": "x", "i": 2**63 - 1, "f": 0.1, "b": True, "n": None, "l": [1, [], {}], "o": {"a b": {"": "q"}}}
        revs = documents.commit([Create("things", "a", data)])
        found = documents.find("things", "a")
        assert found is not None
        assert (found.collection, found.id, found.data) == ("things", "a", data)
        assert revs == {("things", "a"): found.rev}

    def test_an_absent_document_is_none(self, documents: Documents) -> None:
        documents.commit([Create("things", "a", {})])
        assert documents.find("things", "b") is None
        assert documents.find("others", "a") is None

    @pytest.mark.parametrize("id", ["", "a/b", ".", "..", "__x__", "a\0", "\ud800", "x" * 1501])
    def test_an_id_that_cannot_be_is_not_found_and_not_written(self, documents: Documents, id: str) -> None:
        assert documents.find("things", id) is None
        with pytest.raises(InvalidRequest):
            documents.commit([Create("things", id, {})])

    @pytest.mark.parametrize("id", ["a b", "o'clock", '"', "ft:x:y:z:1", "a%_", "日本🙂", "-", "x" * 1500])
    def test_an_id_may_be_almost_any_text(self, documents: Documents, id: str) -> None:
        documents.commit([Create("things", id, {"id": id})])
        found = documents.find("things", id)
        assert found is not None and found.id == id
        assert ids(documents.query("things", {"id": id})) == [id]

    @pytest.mark.parametrize("text", HARD_TEXTS)
    def test_text_is_data_whatever_it_holds(self, documents: Documents, text: str) -> None:
        documents.commit([Create("things", "a", {"v": text}), Create("things", "b", {"v": text + "!"})])
        found = documents.find("things", "a")
        assert found is not None and found.data == {"v": text}
        assert ids(documents.query("things", {"v": text})) == ["a"]

    def test_creating_again_conflicts_and_changes_nothing(self, documents: Documents) -> None:
        documents.commit([Create("things", "a", {"v": 1})])
        before = documents.find("things", "a")
        with pytest.raises(StoreConflict):
            documents.commit([Create("things", "a", {"v": 2})])
        assert documents.find("things", "a") == before

    def test_replace_needs_the_current_revision(self, documents: Documents) -> None:
        first = documents.commit([Create("things", "a", {"v": 1, "w": 1})])["things", "a"]
        second = documents.commit([Replace("things", "a", {"v": 2}, first)])["things", "a"]
        assert second != first
        with pytest.raises(StoreConflict):
            documents.commit([Replace("things", "a", {"v": 3}, first)])
        found = documents.find("things", "a")
        assert found is not None and (found.data, found.rev) == ({"v": 2}, second)

    def test_replacing_by_equal_data_is_a_new_revision_too(self, documents: Documents) -> None:
        first = documents.commit([Create("things", "a", {"v": 1})])["things", "a"]
        assert documents.commit([Replace("things", "a", {"v": 1}, first)])["things", "a"] != first

    def test_an_absent_document_cannot_be_changed(self, documents: Documents) -> None:
        rev = documents.commit([Create("things", "b", {})])["things", "b"]
        for write in (
            Replace("things", "a", {}, rev),
            Delete("things", "a"),
            Delete("things", "a", rev),
            Increment("things", "a", "v", 1),
        ):
            with pytest.raises(StoreConflict):
                documents.commit([write])
        assert documents.find("things", "a") is None

    def test_delete_needs_the_current_revision_if_one_is_given(self, documents: Documents) -> None:
        first = documents.commit([Create("things", "a", {"v": 1}), Create("things", "b", {})])["things", "a"]
        second = documents.commit([Replace("things", "a", {"v": 2}, first)])["things", "a"]
        with pytest.raises(StoreConflict):
            documents.commit([Delete("things", "a", first)])
        assert documents.commit([Delete("things", "a", second), Delete("things", "b")]) == {}
        assert documents.query("things") == []

    def test_a_revision_does_not_come_back_with_a_document_of_the_same_id(self, documents: Documents) -> None:
        first = documents.commit([Create("things", "a", {"v": 1})])["things", "a"]
        documents.commit([Delete("things", "a")])
        assert documents.commit([Create("things", "a", {"v": 1})])["things", "a"] != first
        with pytest.raises(StoreConflict):
            documents.commit([Replace("things", "a", {"v": 2}, first)])

    def test_increment_adds_and_is_a_new_revision(self, documents: Documents) -> None:
        first = documents.commit([Create("things", "a", {"v": 1, "w": "kept"})])["things", "a"]
        second = documents.commit([Increment("things", "a", "v", 41)])["things", "a"]
        documents.commit([Increment("things", "a", "f", 0.5)])
        found = documents.find("things", "a")
        assert found is not None and found.data == {"v": 42, "w": "kept", "f": 0.5}
        assert len({first, second, found.rev}) == 3

    # --- commits ---

    def test_a_commit_over_several_collections_is_all_or_nothing(self, documents: Documents) -> None:
        rev = documents.commit([Create("things", "a", {"v": 1}), Create("things", "b", {"v": 1})])["things", "a"]
        before = documents.query("things")
        with pytest.raises(StoreConflict):
            documents.commit(
                [
                    Replace("things", "a", {"v": 2}, rev),
                    Increment("things", "b", "v", 1),
                    Create("others", "x", {}),
                    Delete("others", "absent"),
                ]
            )
        assert documents.query("things") == before
        assert documents.query("others") == []

    def test_a_commit_does_all_its_writes_and_tells_their_revisions(self, documents: Documents) -> None:
        old = documents.commit([Create("things", id, {"v": 1}) for id in "abc"])
        new = documents.commit(
            [
                Replace("things", "a", {"v": 2}, old["things", "a"]),
                Increment("things", "b", "v", 2),
                Delete("things", "c"),
                Create("others", "d", {"v": 4}),
            ]
        )
        found = [*documents.query("things"), *documents.query("others")]
        assert [(f.id, f.data["v"]) for f in found] == [("a", 2), ("b", 3), ("d", 4)]
        assert new == {(f.collection, f.id): f.rev for f in found}

    def test_a_commit_has_up_to_400_writes(self, documents: Documents) -> None:
        writes = [Create("things", f"{i:04}", {"v": i}) for i in range(MAX_WRITES + 1)]
        with pytest.raises(InvalidRequest):
            documents.commit(writes)
        assert documents.query("things") == []
        assert documents.commit([]) == {}
        assert len(documents.commit(writes[:MAX_WRITES])) == MAX_WRITES == 400

    def test_a_commit_writes_a_document_once(self, documents: Documents) -> None:
        with pytest.raises(InvalidRequest, match="twice"):
            documents.commit([Create("things", "a", {"v": 1}), Increment("things", "a", "v", 1)])
        assert documents.find("things", "a") is None

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

    @pytest.mark.parametrize("value", [None, True, "1", "x" * 2000, [1], {"w": 1}])
    def test_only_a_number_is_added_to(self, documents: Documents, value: Any) -> None:
        documents.commit([Create("things", "a", {"v": value}), Create("things", "b", {"v": 1})])
        before = documents.query("things")
        with pytest.raises(InvalidRequest, match="`v`"):
            documents.commit([Increment("things", "b", "v", 1), Increment("things", "a", "v", 1)])
        assert documents.query("things") == before

    def test_a_number_that_became_a_text_is_not_added_to(self, documents: Documents) -> None:
        documents.commit([Create("things", "a", {"v": 1})])
        rev = documents.commit([Increment("things", "a", "v", 1)])["things", "a"]
        documents.commit([Replace("things", "a", {"v": "text"}, rev)])
        with pytest.raises(InvalidRequest, match="`v`"):
            documents.commit([Increment("things", "a", "v", 1)])
        documents.commit([Delete("things", "a")])
        with pytest.raises(StoreConflict):
            documents.commit([Increment("things", "a", "v", 1)])

    def test_a_closed_store_says_so(self, documents_url: str) -> None:
        documents = open_documents(documents_url)
        documents.commit([Create("things", "a", {})])
        documents.close()
        documents.close()
        for call in (
            lambda: documents.find("things", "a"),
            lambda: documents.query("things"),
            lambda: documents.commit([Create("things", "b", {})]),
        ):
            with pytest.raises(TuneloomError, match="closed"):
                call()

    @pytest.mark.parametrize("name", ["", "Things", "a b", "a'--", "a/b", "é"])
    def test_a_collection_has_a_plain_name(self, documents: Documents, name: str) -> None:
        for call in (lambda: documents.find(name, "a"), lambda: documents.query(name)):
            with pytest.raises(InvalidRequest):
                call()
        with pytest.raises(InvalidRequest):
            documents.commit([Create(name, "a", {})])

    # --- queries ---

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

    def test_order_is_null_then_booleans_then_numbers_then_text(self, mixed: Documents) -> None:
        expected = ["null", "no", "yes", "neg", "zero", "half", "one", "text"]
        assert ids(mixed.query("things", order_by="v")) == expected
        assert ids(mixed.query("things", order_by="v", descending=True)) == expected[::-1]

    def test_equal_values_are_ordered_by_id_in_the_same_direction(self, documents: Documents) -> None:
        documents.commit([Create("things", id, {"v": 1}) for id in "cab"] + [Create("things", "z", {"v": 0})])
        assert ids(documents.query("things", order_by="v")) == ["z", "a", "b", "c"]
        assert ids(documents.query("things", order_by="v", descending=True)) == ["c", "b", "a", "z"]

    def test_text_is_ordered_by_code_point(self, documents: Documents) -> None:
        texts = ["", "A", "B", "a", "aa", "b", "é", "日", "🙂"]
        documents.commit([Create("things", f"{-i}", {"v": text}) for i, text in enumerate(texts)])
        assert [d.data["v"] for d in documents.query("things", order_by="v")] == texts

    @pytest.mark.parametrize(
        ("bounds", "expected"),
        [
            (Range(), ["0", "1", "2", "3", "t"]),
            (Range(above=1), ["2", "3"]),
            (Range(at_least=1), ["1", "2", "3"]),
            (Range(below=2), ["0", "1"]),
            (Range(at_most=2.0), ["0", "1", "2"]),
            (Range(above=0, at_most=2), ["1", "2"]),
            (Range(above=2, below=1), []),
            (Range(at_least="a"), ["t"]),
            (Range(at_least=False), []),
            (Range(at_least=1, below="z"), []),
        ],
    )
    def test_bounds_admit_values_of_their_own_type(
        self, documents: Documents, bounds: Range, expected: list[str]
    ) -> None:
        documents.commit([Create("things", str(i), {"v": i}) for i in range(4)] + [Create("things", "t", {"v": "b"})])
        assert ids(documents.query("things", order_by="v", bounds=bounds)) == expected
        assert ids(documents.query("things", order_by="v", bounds=bounds, descending=True)) == expected[::-1]

    def test_bounds_on_the_id(self, documents: Documents) -> None:
        documents.commit([Create("things", id, {"v": 1}) for id in "abcd"])
        assert ids(documents.query("things", {"v": 1}, bounds=Range(above="a", at_most="c"))) == ["b", "c"]

    @pytest.mark.parametrize("edge", ["", "b/", "b\0", "."])
    def test_bounds_and_cursors_need_not_be_ids_of_documents(self, documents: Documents, edge: str) -> None:
        documents.commit([Create("things", id, {"v": 1}) for id in "abcd"])
        behind = [id for id in "abcd" if id > edge]
        assert ids(documents.query("things", bounds=Range(above=edge))) == behind
        assert ids(documents.query("things", {"v": 1}, bounds=Range(at_least=edge), descending=True)) == behind[::-1]
        assert ids(documents.query("things", after=(edge, edge))) == behind
        assert ids(documents.query("things", order_by="v", after=(1, edge))) == behind

    def test_limit_takes_the_first_of_the_order(self, documents: Documents) -> None:
        documents.commit([Create("things", id, {"v": id}) for id in "abcd"])
        assert ids(documents.query("things", limit=2)) == ["a", "b"]
        assert ids(documents.query("things", order_by="v", descending=True, limit=2)) == ["d", "c"]
        assert ids(documents.query("things", limit=9)) == ["a", "b", "c", "d"]

    @pytest.mark.parametrize("descending", [False, True])
    @pytest.mark.parametrize("order_by", ["v", "id"])
    def test_pages_show_every_document_once(self, mixed: Documents, order_by: str, descending: bool) -> None:
        mixed.commit([Create("things", f"tie{i}", {"v": 0.5, "w": 1}) for i in range(5)])
        mixed.commit([Create("things", f"time{i}", {"v": 1759300000.1 + i / 1e6}) for i in range(5)])
        whole = mixed.query("things", order_by=order_by, descending=descending)
        seen: list[Any] = []
        after = None
        while page := mixed.query("things", order_by=order_by, descending=descending, limit=2, after=after):
            seen += page
            after = (page[-1].id if order_by == "id" else page[-1].data["v"], page[-1].id)
            # What comes between two pages, before the cursor, disturbs neither.
            mixed.commit([Create("things", f"{'~' if descending else '!'}{len(seen)}", {"w": 2})])
        assert ids(seen) == [id for id in ids(whole) if id[0] not in "~!"]

    def test_a_cursor_goes_on_behind_a_document_that_is_gone(self, documents: Documents) -> None:
        documents.commit([Create("things", id, {"v": 1}) for id in "abcd"])
        documents.commit([Delete("things", "b")])
        assert ids(documents.query("things", order_by="v", after=(1, "b"))) == ["c", "d"]

    def test_it_behaves_like_a_dictionary(self, documents: Documents) -> None:
        run_state_machine_as_test(
            lambda: DocumentsMachine(documents),
            settings=settings(
                max_examples=self.NUM_EXAMPLES,
                stateful_step_count=25,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            ),
        )

    @pytest.mark.parametrize("order_by", ["v", "id"])
    def test_a_long_result_comes_whole(self, documents: Documents, order_by: str) -> None:
        names = [f"{i:04}" for i in range(750)]
        for start in (0, 375):
            documents.commit([Create("things", id, {"v": int(id) // 3}) for id in names[start : start + 375]])
        assert ids(documents.query("things", order_by=order_by)) == names
        assert ids(documents.query("things", order_by=order_by, descending=True, limit=700)) == names[:49:-1]

    # --- several writers ---

    def test_eight_writers_of_one_document_all_come_to_an_end(
        self, documents: Documents, capsys: pytest.CaptureFixture[str]
    ) -> None:
        documents.commit([Create("things", "a", {"v": 0, "n": 0})])
        barrier = threading.Barrier(8)

        def write(_: int) -> int:
            attempts = 0
            barrier.wait(timeout=PROCESS_TIMEOUT_S)
            for _ in range(10):
                documents.commit([Increment("things", "a", "n", 1)])
                for attempt in itertools.count():
                    attempts += 1
                    found = documents.find("things", "a")
                    assert found is not None
                    changed = {**found.data, "v": found.data["v"] + 1}
                    try:
                        documents.commit([Replace("things", "a", changed, found.rev)])
                        break
                    except StoreConflict:
                        time.sleep(random.uniform(0, 0.005 * 2 ** min(attempt, 6)))
            return attempts

        started = time.monotonic()
        with ThreadPoolExecutor(8) as pool:
            attempts = sum(pool.map(write, range(8)))
        took_s = time.monotonic() - started
        found = documents.find("things", "a")
        assert found is not None and found.data == {"v": 80, "n": 80}
        with capsys.disabled():
            print(
                f"\n{type(documents).__name__}, 8 writers of one document: {160 / took_s:.0f} commits/s, "
                f"{attempts} attempts for 80 replacements"
            )
        assert took_s < PROCESS_TIMEOUT_S

    def test_a_long_result_is_of_one_moment(self, documents: Documents) -> None:
        for start in (0, 350):
            documents.commit([Create("things", f"{start + i:04}", {"v": 0}) for i in range(350)])
        is_done = threading.Event()

        def move() -> None:
            while not is_done.is_set():
                documents.commit([Increment("things", "0000", "v", -1), Increment("things", "0699", "v", 1)])

        with ThreadPoolExecutor(1) as pool:
            mover = pool.submit(move)
            sums = {sum(d.data["v"] for d in documents.query("things")) for _ in range(6)}
            is_done.set()
            mover.result(timeout=PROCESS_TIMEOUT_S)
        assert sums == {0}

    def test_a_forked_process_goes_on_while_threads_write(self, documents: Documents, documents_url: str) -> None:
        done = subprocess.run(
            [sys.executable, "-c", FORKS, documents_url], capture_output=True, text=True, timeout=120, cwd=Path.cwd()
        )
        assert done.returncode == 0, done.stderr
        found = documents.query("things")
        assert ids(found) == ["a", "child0", "child1", "child2", "child3", "child4"]
        assert found[0].data["v"] > 5000

    def test_increments_of_many_threads_all_count(self, documents: Documents) -> None:
        documents.commit([Create("things", "a", {"v": 0})])
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda _: documents.commit([Increment("things", "a", "v", 1)]), range(80)))
        found = documents.find("things", "a")
        assert found is not None and found.data["v"] == 80

    def test_increments_of_many_processes_all_count(self, documents: Documents, documents_url: str) -> None:
        documents.commit([Create("things", "a", {"v": 0})])
        in_processes(3, count_up, documents_url, 25)
        found = documents.find("things", "a")
        assert found is not None and found.data["v"] == 75

    def test_only_one_of_many_creates_wins(self, documents: Documents) -> None:
        def create(writer: int) -> bool:
            try:
                documents.commit([Create("things", "a", {"v": writer}), Create("things", f"mine{writer}", {})])
            except StoreConflict:
                return False
            return True

        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(create, range(16)))
        found = documents.find("things", "a")
        assert found is not None and won == [writer == found.data["v"] for writer in range(16)]
        assert len(documents.query("things")) == 2

    def test_no_update_by_revision_is_lost(self, documents: Documents) -> None:
        documents.commit([Create("things", "a", {"v": 0})])

        def add_one(_: int) -> None:
            while True:
                found = documents.find("things", "a")
                assert found is not None
                try:
                    documents.commit([Replace("things", "a", {"v": found.data["v"] + 1}, found.rev)])
                    return
                except StoreConflict:
                    continue

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(add_one, range(40)))
        found = documents.find("things", "a")
        assert found is not None and found.data["v"] == 40

    def test_nobody_sees_half_a_commit(self, documents: Documents) -> None:
        documents.commit([Create("things", "a", {"v": 0}), Create("things", "b", {"v": 0})])
        is_done = threading.Event()

        def move() -> None:
            for _ in range(60):
                documents.commit([Increment("things", "a", "v", -1), Increment("things", "b", "v", 1)])

        def watch() -> set[int]:
            sums = set()
            while not is_done.is_set():
                sums.add(sum(d.data["v"] for d in documents.query("things")))
            return sums

        with ThreadPoolExecutor(4) as pool:
            watchers = [pool.submit(watch) for _ in range(2)]
            movers = [pool.submit(move) for _ in range(2)]
            for mover in movers:
                mover.result(timeout=PROCESS_TIMEOUT_S)
            is_done.set()
            assert [watcher.result(timeout=PROCESS_TIMEOUT_S) for watcher in watchers] == [{0}, {0}]

    @pytest.mark.parametrize("acknowledged", [1, 7, 30])
    def test_a_writer_killed_at_any_moment_leaves_whole_commits(self, documents_url: str, acknowledged: int) -> None:
        receiver, sender = SPAWN.Pipe(duplex=False)
        child = SPAWN.Process(target=write_pairs, args=(documents_url, sender))
        child.start()
        sender.close()
        last = -1
        while last < acknowledged:
            assert receiver.poll(PROCESS_TIMEOUT_S), "the writer is silent"
            last = receiver.recv()
        os.kill(child.pid or 0, signal.SIGKILL)
        child.join(PROCESS_TIMEOUT_S)
        while receiver.poll():
            try:
                last = receiver.recv()
            except EOFError:
                break
        documents = open_documents(documents_url)
        left, right = ids(documents.query("left")), ids(documents.query("right"))
        counter = documents.find("things", "counter")
        documents.close()
        assert left == right == [f"{i:06}" for i in range(len(left))]
        assert len(left) > last, "an acknowledged commit is lost"
        assert counter is not None and counter.data["v"] == len(left)


# In a process of its own: the one of the tests holds threads of other libraries, which need not outlive a fork.
FORKS = """
import os, sys, threading
from tuneloom.store import open_documents
from tuneloom.store.base import Create, Increment

documents = open_documents(sys.argv[1])
documents.commit([Create("things", "a", {"v": 0})])
is_done = threading.Event()

def write():
    while not is_done.is_set():
        documents.commit([Increment("things", "a", "v", 1)])

threads = [threading.Thread(target=write) for _ in range(2)]
for thread in threads:
    thread.start()
children = []
for i in range(5):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            documents.commit([Create("things", f"child{i}", {}), Increment("things", "a", "v", 1000)])
            code = 0
        finally:
            os._exit(code)
    children.append(child)
codes = [os.waitpid(child, 0)[1] for child in children]
is_done.set()
for thread in threads:
    thread.join(30)
assert codes == [0] * 5, codes
"""


class DocumentsMachine(RuleBasedStateMachine):
    """Random commits and queries against a plain dictionary that does the same."""

    ID = st.sampled_from("abcdé")
    VALUE = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-3, 3),
        st.sampled_from([0.5, -1.5, 1.0, 1759300000.123456, 2**53 + 1]),
        st.sampled_from(["", "a", "A", "é", "1", "a'b", "\0"]),
    )
    DATA = st.fixed_dictionaries({}, optional={"v": VALUE, "w": st.integers(0, 2), "n": st.integers(-5, 5)})
    STEP = st.tuples(st.sampled_from(["create", "replace", "stale", "delete", "drop", "add"]), ID, DATA)

    def __init__(self, documents: Documents) -> None:
        super().__init__()
        self.documents = documents
        self.model: dict[str, dict[str, Any]] = {}
        self.revs: dict[str, str] = {}
        self.old_revs: set[str] = set()

    @initialize()
    def take_an_empty_collection(self) -> None:
        self.name = f"c{uuid.uuid4().hex}"

    @rule(steps=st.lists(STEP, min_size=1, max_size=4, unique_by=lambda step: step[1]))
    def commit(self, steps: list[tuple[str, str, dict[str, Any]]]) -> None:
        writes = [self.write(*step) for step in steps]
        expected = None if any(not self.is_allowed(write) for write in writes) else dict(self.model)
        try:
            revs = self.documents.commit(writes)
        except StoreConflict:
            assert expected is None
            return
        assert expected is not None, writes
        for write in writes:
            self.apply(write)
        new = {id: rev for (_, id), rev in revs.items()}
        assert set(new) == {write.id for write in writes if not isinstance(write, Delete)}
        assert not set(new.values()) & self.old_revs, "a revision came back"
        self.old_revs |= set(new.values())
        self.revs = {id: new.get(id, self.revs.get(id, "")) for id in self.model}

    @rule(
        where=st.dictionaries(st.sampled_from("vw"), VALUE, max_size=1),
        order_by=st.sampled_from(["id", "v", "n"]),
        descending=st.booleans(),
        low=st.one_of(st.none(), VALUE),
        is_open=st.booleans(),
        limit=st.one_of(st.none(), st.integers(1, 3)),
        cursor=st.one_of(st.none(), ID),
    )
    def query(
        self,
        where: dict[str, Any],
        order_by: str,
        descending: bool,
        low: Any,
        is_open: bool,
        limit: int | None,
        cursor: str | None,
    ) -> None:
        keys = {id: self.key(id, order_by) for id in self.model if order_by == "id" or order_by in self.model[id]}
        chosen = [id for id in keys if all(same(self.model[id], field, value) for field, value in where.items())]
        bounds = None
        if low is not None:
            bounds = Range(above=low) if is_open else Range(at_least=low)
            chosen = [id for id in chosen if admits(keys[id], low, is_open)]
        chosen.sort(key=keys.__getitem__, reverse=descending)
        after = None
        if cursor in keys:
            after = (cursor if order_by == "id" else self.model[cursor][order_by], cursor)
            mark = keys[cursor]
            chosen = [id for id in chosen if (keys[id] < mark if descending else keys[id] > mark)]
        found = self.documents.query(
            self.name, where, order_by=order_by, descending=descending, bounds=bounds, limit=limit, after=after
        )
        assert ids(found) == chosen[:limit]

    @invariant()
    def holds_the_same(self) -> None:
        if self.revs or not self.model:
            found = self.documents.query(getattr(self, "name", "nothing"))
            assert [(d.id, d.data, d.rev) for d in found] == [
                (id, self.model[id], self.revs[id]) for id in sorted(self.model)
            ]

    def write(self, kind: str, id: str, data: dict[str, Any]) -> Write:
        match kind:
            case "create":
                return Create(self.name, id, data)
            case "replace":
                return Replace(self.name, id, data, self.revs.get(id, "never"))
            case "stale":
                return Replace(self.name, id, data, min(self.old_revs - {self.revs.get(id)}, default="never"))
            case "delete":
                return Delete(self.name, id, self.revs.get(id, "never"))
            case "drop":
                return Delete(self.name, id)
        return Increment(self.name, id, "n", data.get("n", 1))

    def is_allowed(self, write: Write) -> bool:
        match write:
            case Create():
                return write.id not in self.model
            case Delete(rev=None) | Increment():
                return write.id in self.model
        return write.id in self.model and write.rev == self.revs[write.id]

    def apply(self, write: Write) -> None:
        match write:
            case Create() | Replace():
                self.model[write.id] = dict(write.data)
            case Delete():
                del self.model[write.id]
            case Increment():
                data = self.model[write.id]
                self.model[write.id] = {**data, write.field: data.get(write.field, 0) + write.by}

    def key(self, id: str, order_by: str) -> tuple[Any, ...]:
        value = id if order_by == "id" else self.model[id][order_by]
        return (rank(value), 0 if value is None else value, id)


def rank(value: Any) -> int:
    if value is None:
        return 0
    if isinstance(value, bool):
        return 1
    return 2 if isinstance(value, int | float) else 3


def same(data: dict[str, Any], field: str, value: Any) -> bool:
    return field in data and rank(data[field]) == rank(value) and data[field] == value


def admits(key: tuple[Any, ...], low: Any, is_open: bool) -> bool:
    return key[0] == rank(low) and (key[1] > low if is_open else key[1] >= low)


def in_processes(count: int, target: Callable[..., None], *args: Any) -> None:
    children = [SPAWN.Process(target=target, args=args) for _ in range(count)]
    for child in children:
        child.start()
    for child in children:
        child.join(PROCESS_TIMEOUT_S)
    assert [child.exitcode for child in children] == [0] * count


def count_up(url: str, times: int) -> None:
    documents = open_documents(url)
    for _ in range(times):
        documents.commit([Increment("things", "a", "v", 1)])
    documents.close()


def write_pairs(url: str, sender: Any) -> None:
    documents = open_documents(url)
    documents.commit([Create("things", "counter", {"v": 0})])
    for i in itertools.count():
        documents.commit(
            [
                Create("left", f"{i:06}", {"text": "x" * 2000}),
                Increment("things", "counter", "v", 1),
                Create("right", f"{i:06}", {"text": "y" * 2000}),
            ]
        )
        sender.send(i)


class BlobsContract:
    @pytest.fixture
    def blobs(self, blobs_url: str) -> Blobs:
        return open_blobs(blobs_url)

    HELLO = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"

    @pytest.mark.parametrize("kind", ["bytes", "file", "pieces"])
    def test_a_blob_is_read_as_it_was_written(self, blobs: Blobs, tmp_path: Path, kind: str) -> None:
        path = tmp_path / "source"
        path.write_bytes(b"hello")
        source: Any = {"bytes": b"hello", "file": path, "pieces": iter([b"he", b"", b"llo"])}[kind]
        assert blobs.write("a/b", source) == self.HELLO
        assert blobs.read("a/b") == b"hello"
        assert blobs.find("a/b") == BlobInfo("a/b", 5)

    @pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, 3_000_001])
    def test_a_blob_may_have_any_size(self, blobs: Blobs, size: int) -> None:
        data = (b"0123456789abcdef!" * (size // 17 + 1))[:size]
        blobs.write("a", data)
        assert blobs.read("a") == data
        assert blobs.find("a") == BlobInfo("a", size)

    def test_an_open_blob_can_seek(self, blobs: Blobs) -> None:
        blobs.write("a", b"hello")
        with blobs.open("a") as file:
            assert file.seekable()
            assert file.read(2) == b"he"
            file.seek(-1, os.SEEK_END)
            assert file.read() == b"o"
            file.seek(0)
            assert file.read() == b"hello"

    def test_an_absent_blob_is_said_to_be_absent(self, blobs: Blobs) -> None:
        blobs.write("a/b/c", b"x")
        for key in ("z", "a", "a/b", "a/z/c"):
            assert blobs.find(key) is None
            with pytest.raises(BlobNotFound):
                blobs.open(key)
            with pytest.raises(BlobNotFound):
                blobs.read(key)

    def test_writing_the_same_bytes_again_changes_nothing(self, blobs: Blobs) -> None:
        assert blobs.write("a", b"hello") == blobs.write("a", iter([b"hello"])) == self.HELLO
        assert blobs.read("a") == b"hello"

    @pytest.mark.parametrize("other", [b"", b"hellO", b"hello!"])
    def test_a_blob_never_changes(self, blobs: Blobs, other: bytes) -> None:
        blobs.write("a", b"hello")
        with pytest.raises(BlobExists):
            blobs.write("a", other)
        assert blobs.read("a") == b"hello"

    def test_bytes_that_are_not_the_promised_ones_are_not_kept(self, blobs: Blobs) -> None:
        with pytest.raises(BlobCorrupt):
            blobs.write("a", b"hellO", sha256=self.HELLO)
        assert blobs.find("a") is None
        assert blobs.write("a", b"hello", sha256=self.HELLO) == self.HELLO

    def test_a_source_that_fails_leaves_nothing(self, blobs: Blobs) -> None:
        def source() -> Iterator[bytes]:
            yield b"x" * 3_000_000
            raise OSError("the client went away")

        with pytest.raises(OSError, match="went away"):
            blobs.write("a/b", source())
        assert blobs.find("a/b") is None
        assert blobs.list("a") == []
        blobs.write("a/b", b"later")

    def test_a_list_is_what_is_under_a_prefix_by_key(self, blobs: Blobs) -> None:
        for key in ("a/c", "a/b/2", "a/b/10", "a/b-", "ab/x", "a.b/x", "b"):
            blobs.write(key, key.encode())
        assert [info.key for info in blobs.list("a")] == ["a/b-", "a/b/10", "a/b/2", "a/c"]
        assert blobs.list("a/b") == [BlobInfo("a/b/10", 6), BlobInfo("a/b/2", 5)]
        assert blobs.list("b") == blobs.list("nothing") == blobs.list("a/nothing") == []

    def test_a_walk_passes_every_blob_by_key(self, blobs: Blobs) -> None:
        assert list(blobs.walk()) == []
        keys = ["a-", "a.b/x", "a/b-", "a/b/10", "a/b/2", "a/c", "ab/x", "b"]
        for key in reversed(keys):
            blobs.write(key, key.encode())
        assert list(blobs.walk()) == [BlobInfo(key, len(key)) for key in keys]

    def test_a_deleted_blob_is_gone_and_its_key_is_free(self, blobs: Blobs) -> None:
        blobs.write("a/b/c", b"x")
        blobs.write("a/d", b"x")
        blobs.delete("a/b/c")
        blobs.delete("a/b/c")
        blobs.delete("never/was")
        assert [info.key for info in blobs.list("a")] == ["a/d"]
        blobs.write("a/b/c", b"y")
        assert blobs.read("a/b/c") == b"y"

    def test_a_reader_keeps_what_it_opened(self, blobs: Blobs) -> None:
        blobs.write("a", b"hello")
        with blobs.open("a") as file:
            blobs.delete("a")
            blobs.write("a", b"other")
            assert file.read() == b"hello"

    @pytest.mark.parametrize("key", ["a", "A-b_c.d", "...", "a..b", ".a", "a.", "-", "1/2/3/4/5/6/7/8", "x" * 255])
    def test_a_key_may_be(self, blobs: Blobs, key: str) -> None:
        blobs.write(key, b"x")
        assert blobs.read(key) == b"x"

    @pytest.mark.parametrize(
        "key",
        [
            "",
            "/",
            "/a",
            "a/",
            "a//b",
            ".",
            "..",
            "../a",
            "a/../b",
            "a/./b",
            "a/..",
            "a b",
            "a\\b",
            "a\n",
            "\n",
            "é",
            "a\0",
            "~/a:b",
            "1/2/3/4/5/6/7/8/9",
            "x" * 256,
        ],
    )
    def test_a_key_may_not_be(self, blobs: Blobs, key: str) -> None:
        calls: list[Callable[[], Any]] = [
            lambda: blobs.write(key, b"x"),
            lambda: blobs.open(key),
            lambda: blobs.read(key),
            lambda: blobs.find(key),
            lambda: blobs.list(key),
            lambda: blobs.delete(key),
        ]
        for call in calls:
            with pytest.raises(InvalidRequest):
                call()

    def test_only_one_of_many_writers_wins_a_key(self, blobs: Blobs) -> None:
        barrier = threading.Barrier(8)

        def write(writer: int) -> bool:
            barrier.wait(timeout=PROCESS_TIMEOUT_S)
            try:
                blobs.write("a/b/c", f"writer {writer}".encode() * 1000)
            except BlobExists:
                return False
            return True

        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(write, range(8)))
        assert won.count(True) == 1
        assert blobs.read("a/b/c") == f"writer {won.index(True)}".encode() * 1000

    def test_writing_and_deleting_side_by_side_disturbs_neither(self, blobs: Blobs) -> None:
        def come_and_go(writer: int) -> None:
            for i in range(20):
                blobs.write(f"a/b/{writer}", f"{i}".encode())
                assert blobs.read(f"a/b/{writer}") == f"{i}".encode()
                blobs.list("a")
                blobs.delete(f"a/b/{writer}")

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(come_and_go, range(4)))
        assert blobs.list("a") == []

    def test_a_writer_killed_half_way_leaves_nothing(self, blobs: Blobs, blobs_url: str) -> None:
        receiver, sender = SPAWN.Pipe(duplex=False)
        child = SPAWN.Process(target=write_endlessly, args=(blobs_url, sender))
        child.start()
        for _ in range(3):
            assert receiver.poll(PROCESS_TIMEOUT_S), "the writer is silent"
            receiver.recv()
        os.kill(child.pid or 0, signal.SIGKILL)
        child.join(PROCESS_TIMEOUT_S)
        assert blobs.find("a/b") is None
        assert blobs.list("a") == []
        assert blobs.write("a/b", b"hello") == self.HELLO


def write_endlessly(url: str, sender: Any) -> None:
    def source() -> Iterator[bytes]:
        while True:
            sender.send(None)
            yield b"x" * (1 << 20)

    open_blobs(url).write("a/b", source())
