"""Several writes at once, and how many."""

import pytest

from tests.store.contract.opened import Opened
from tuneloom.errors import InvalidRequest
from tuneloom.store.base import MAX_WRITES, Create, Delete, Documents, Increment, Replace, StoreConflict


class OfCommits(Opened):
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
