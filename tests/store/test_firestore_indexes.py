"""Every query has an index: those of the code as it is written, and those that the tests make (tests/conftest.py)."""

import json
from pathlib import Path

import pytest

from tests.store import firestore_indexes as indexes
from tests.store.firestore_indexes import DECLARED, FILE, TABLES, Shape, calls, declared, missing, recorded, render
from tuneloom.control.pages import read_page
from tuneloom.store import open_documents
from tuneloom.store.records import Records

WRITE = "Run `python -m tests.store.firestore_indexes`."


def test_every_call_that_asks_for_records_is_read_or_declared() -> None:
    unknown = [f"tuneloom/{call.place} line {call.line}" for call in calls() if call.shapes is None]
    unknown = [place for place in unknown if place.removeprefix("tuneloom/").split(" ")[0] not in DECLARED]
    assert not unknown, (
        f"What these calls ask for is not written where they stand: {unknown}. Add `FILE:FUNCTION: [shape(TABLE, "
        f"*FIELDS, order_by=..., descending=...)]` to DECLARED of tests/store/firestore_indexes.py. {WRITE}"
    )


def test_what_is_declared_is_there() -> None:
    unread = {call.place for call in calls() if call.shapes is None}
    assert DECLARED.keys() == unread, "Remove what is no longer called from DECLARED."


def test_every_query_has_an_index_and_every_index_a_query() -> None:
    file = json.loads(FILE.read_text(encoding="utf-8"))
    lacking = {str(each): entries for each in sorted(declared()) if (entries := missing(each, file))}
    assert not lacking, f"Add to cluster/firestore.indexes.json: {json.dumps(lacking, indent=1)}\n{WRITE}"
    assert FILE.read_text(encoding="utf-8") == render(declared()), f"Some entries are of no use. {WRITE}"


def test_no_collection_is_indexed_but_where_it_is_asked() -> None:
    fields = json.loads(FILE.read_text(encoding="utf-8"))["fieldOverrides"]
    off = {(each["collectionGroup"], each["fieldPath"]) for each in fields if not each["indexes"]}
    assert {(collection, name) for collection in TABLES.values() for name in ("data", "text", "commit")} <= off


@pytest.mark.parametrize(
    ("each", "fields"),
    [
        (Shape("jobs"), []),
        (Shape("jobs", ("owner",)), ["data.owner"]),
        (Shape("jobs", ("owner",), "id", True), ["data.owner"]),
        (Shape("jobs", ("owner", "state")), ["data.owner", "data.state"]),
        (Shape("jobs", (), "id", True), ["id"]),
        (Shape("jobs", (), "finished_at", True), ["data.finished_at"]),
        (Shape("jobs", ("owner",), "owner", True), ["data.owner"]),
        (Shape("jobs", ("adapter.sha256",)), ["data.adapter.sha256"]),
    ],
)
def test_indexes_of_single_fields(each: Shape, fields: list[str]) -> None:
    assert [entry["fieldPath"] for entry in missing(each, {"indexes": [], "fieldOverrides": []})] == fields


def test_an_order_beside_conditions_needs_an_index_of_its_own_and_of_its_direction() -> None:
    asked = Shape("jobs", ("owner",), "created_at", True)
    (entry,) = missing(asked, {"indexes": [], "fieldOverrides": []})
    assert [(field["fieldPath"], field["order"]) for field in entry["fields"]] == [
        ("data.owner", "ASCENDING"),
        ("data.created_at", "DESCENDING"),
        ("__name__", "DESCENDING"),
    ]
    file = indexes.entries([asked])
    assert missing(asked, file) == []
    assert missing(Shape("jobs", ("owner",), "created_at", False), file)
    assert missing(Shape("jobs", ("owner", "state"), "created_at", True), file)


def test_the_recorder_of_the_tests_sees_what_has_no_index(queries_without_index: list[Shape], tmp_path: Path) -> None:
    records = Records(open_documents(f"sqlite:{tmp_path / 'documents.db'}"))
    records.jobs.query({"never_asked": 1})
    read_page(records.jobs, {"owner": "x"}, order_by="created_at", limit=1)
    assert queries_without_index == []
    read_page(records.jobs, {"never_asked": 1}, order_by="created_at", limit=1)
    records.documents.close()
    assert queries_without_index == [recorded("jobs", {"never_asked": 1}, "created_at", True)]
    queries_without_index.clear()
