"""An owner leaves: of every table their rows go or stay as `docs/cloud.md` says, on both pairs of stores."""

import time
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import pytest
from pydantic import BaseModel

from tests.control.conftest import open_test_store
from tuneloom.control import audit, departures
from tuneloom.domain import Actor, Record
from tuneloom.store import Store, open_blobs, open_documents
from tuneloom.store.records import Records, Table

ROWS = 3
# What a row of these leads to in the blobs.
BLOBS = {"files", "upload_parts", "versions", "checkpoints", "jobs", "drafts"}


@pytest.fixture(params=["sqlite, files", "firestore, gcs"])
def any_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    if request.param == "sqlite, files":
        store = open_test_store(tmp_path)
    else:
        urls = [request.getfixturevalue(name) for name in ("firestore_url", "gcs_url")]
        store = Store(Records(open_documents(urls[0])), open_blobs(urls[1]))
    yield store
    store.close()


def sample(kind: Any) -> Any:
    """The least that a field of that type takes."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return arguments[0]
    if origin in (Union, UnionType):
        return None if NoneType in arguments else sample(arguments[0])
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return kind.model_validate(
            {name: sample(f.annotation) for name, f in kind.model_fields.items() if f.is_required()}
        )
    if isinstance(origin, type):
        return origin()
    return {str: "x", int: 1, float: 1.0, bool: False}[kind]


def row(kind: type[Record], owner: str, number: int) -> Record:
    """A row of any table; what names a blob names one of its own."""
    named: dict[str, Any] = {"id": owner if kind.collection == "departures" else f"{kind.collection}-{owner}-{number}"}
    if "blob" in kind.model_fields:
        named["blob"] = f"{kind.collection}/{owner}-{number}"
    required = {name: field.annotation for name, field in kind.model_fields.items() if field.is_required()}
    values = {name: sample(annotation) for name, annotation in required.items()}
    if "adapter" in values and isinstance(values["adapter"], BaseModel):
        values["adapter"] = values["adapter"].model_copy(update={"uri": f"{kind.collection}/{owner}-{number}"})
    # Work that is over: what is under way is ended first, which the tests of departures tell.
    values |= {"jobs": {"state": "cancelled"}, "drafts": {"is_open": False}}.get(kind.collection, {})
    return kind.model_validate({**values, "owner": owner, **named})


def blob_of(record: Record) -> str | None:
    """A blob that belongs to the row."""
    match record.collection:
        case "files" | "upload_parts":
            return record.blob  # type: ignore[attr-defined]
        case "versions" | "checkpoints":
            return f"{record.adapter.uri}/adapter_model.safetensors"  # type: ignore[attr-defined]
        case "jobs" | "drafts":
            return f"{record.collection}/{record.id}/anything"
    return None


def fill(store: Store, owner: str) -> list[str]:
    blobs = []
    for table in tables(store).values():
        if table.collection == "departures":
            continue
        records = [row(table._type, owner, number) for number in range(ROWS)]
        store.records.commit(*(table.create(record) for record in records))
        blobs += [blob for record in records if (blob := blob_of(record))]
    for blob in blobs:
        store.blobs.write(blob, owner.encode())
    return blobs


def tables(store: Store) -> dict[str, Table[Any]]:
    return {name: value for name, value in vars(store.records).items() if isinstance(value, Table)}


def rows_of(store: Store, owner: str) -> dict[str, list[Any]]:
    return {name: table.query({"owner": owner}) for name, table in tables(store).items()}


def test_of_every_table_an_owners_rows_go_or_stay_as_documented(any_store: Store) -> None:
    adas, bobs = fill(any_store, "ada"), fill(any_store, "bob")
    assert len(adas) == ROWS * len(BLOBS)
    # An owner whose name begins alike is another one.
    longer = fill(any_store, "ada.b")
    before = {owner: rows_of(any_store, owner) for owner in ("ada", "bob", "ada.b")}
    assert all(len(found) == ROWS for name, found in before["ada"].items() if name != "departures")

    departures.ask(any_store.records, "ada", Actor(kind="person", id="ada", owner="ada"))
    departures.carry_on(any_store, time.time() + departures.SETTLE_S + 1, clock=lambda: 0.0)

    after = rows_of(any_store, "ada")
    stays = {"usage_parts", "usage_folds", "usage_rows", "usage_months", "owner_limits"}
    assert {name for name, found in after.items() if found} == {*stays, "audit_entries"}
    for name in stays:
        assert after[name] == before["ada"][name]
    told = [stored.value.action for stored in after["audit_entries"]]
    assert len(told) == ROWS + 2 and {"account.deletion_requested", "account.deleted"} <= set(told)
    assert sorted(blob.key for blob in any_store.blobs.walk()) == sorted([*bobs, *longer])
    assert rows_of(any_store, "bob") == before["bob"] and rows_of(any_store, "ada.b") == before["ada.b"]


def test_what_stays_of_the_log_goes_with_its_time(any_store: Store) -> None:
    fill(any_store, "ada")
    audit.sweep(any_store.records, time.time())
    assert any_store.records.audit_entries.query({"owner": "ada"}) == []
