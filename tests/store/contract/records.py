"""One document: written, found, replaced, added to and deleted."""

from typing import Any

import pytest

from tests.store.contract.opened import Opened, ids
from tests.store.contract.texts import HARD_TEXTS
from tuneloom.errors import InvalidRequest, TuneloomError
from tuneloom.store import open_documents
from tuneloom.store.base import Create, Delete, Documents, Increment, Replace, StoreConflict


class OfRecords(Opened):
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

    def test_a_later_revision_of_another_document_is_a_conflict(self, documents: Documents) -> None:
        documents.commit([Create("things", "a", {"v": 1})])
        later = documents.commit([Create("things", "b", {"v": 1})])["things", "b"]
        for write in (Replace("things", "a", {"v": 2}, later), Delete("things", "a", later)):
            with pytest.raises(StoreConflict):
                documents.commit([write])
        found = documents.find("things", "a")
        assert found is not None and found.data == {"v": 1}

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
