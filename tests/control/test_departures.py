"""Who they are, and how people leave: everything of theirs goes, nothing of anybody else's."""

import time
from typing import Any

import pytest

from tests.control.conftest import BASE, Api, assert_error
from tests.control.test_models import add_version
from tuneloom.control import departures, jobs
from tuneloom.control.sweep import sweep
from tuneloom.domain import ApiKey, Checkpoint, Principal
from tuneloom.store import Store
from tuneloom.store.records import Table

ME = "/v1/tuneloom/me"


class Person:
    """Calls as somebody who has signed in, where the stub of authentication knows keys only."""

    def __init__(self, api: Api, owner: str, kind: str, patch: pytest.MonkeyPatch) -> None:
        self._api, self._patch = api, patch
        self._principal = Principal.model_validate(
            {
                "owner": owner,
                "key_id": "",
                "scopes": ("inference", "training"),
                "kind": kind,
                "email": "ada@example.com",
            }
        )

    def call(self, method: str, **options: Any) -> Any:
        with self._patch.context() as patch:
            patch.setattr("tests.control.conftest.Principal", lambda **_: self._principal)
            return self._api.call(method, ME, **options)


@pytest.fixture
def ada(api: Api, monkeypatch: pytest.MonkeyPatch) -> Person:
    return Person(api, "ada", "person", monkeypatch)


def test_a_key_says_whose_it_is(api: Api) -> None:
    key = ApiKey(id="key_1", owner="ada", name="laptop", hash="0", redacted="sk", scopes=("inference",), created_at=1.0)
    api.store.records.commit(api.store.records.keys.create(key))
    assert api.get(ME, key="ada:inference").json() == {
        "object": "tuneloom.me",
        "owner": "ada",
        "kind": "key",
        "scopes": ["inference"],
        "email": None,
        "key": {"id": "key_1", "name": "laptop"},
        "models": [],
        "deletion_requested_at": None,
    }


def test_only_a_person_leaves_and_only_on_purpose(api: Api, ada: Person) -> None:
    assert api.delete(ME, key="ada:admin").status_code == 403
    assert_error(ada.call("DELETE", json={}), 400, "confirm")
    assert_error(ada.call("DELETE", json={"confirm": "bob"}), 400, "confirm", "`ada`")
    assert api.store.records.departures.query() == []

    first = ada.call("DELETE", json={"confirm": "ada"})
    assert first.status_code == 202
    assert first.json() == ada.call("DELETE", json={"confirm": "ada"}).json()
    assert ada.call("GET").json()["deletion_requested_at"] == first.json()["requested_at"]
    (told,) = [entry.value for entry in api.store.records.audit_entries.query({"owner": "ada"})]
    assert (told.action, told.actor.kind, told.actor.id) == ("account.deletion_requested", "person", "ada")


def test_it_is_decided_of_every_kind_of_record_whether_it_goes(store: Store) -> None:
    tables = {name for name, value in vars(store.records).items() if isinstance(value, Table)}
    decided = (*departures.FIRST, *departures.REST, *departures.KEPT)
    assert sorted(decided) == sorted(tables)
    assert all(getattr(store.records, name)._type.collection == name for name in decided)


def test_everything_of_an_owner_goes_and_nothing_of_others(api: Api, ada: Person) -> None:
    store = api.store
    for owner in ("ada", "bob"):
        fill(api, owner)
    theirs, blobs = held(store, "bob"), blobs_of(store, "bob")
    assert ada.call("DELETE", json={"confirm": "ada"}).status_code == 202
    asked_at = store.records.departures.query()[0].value.requested_at
    # Keys do not wait for a round.
    assert [key.value.owner for key in store.records.keys.query()] == ["bob"]

    departures.carry_on(store, asked_at + 1)
    # What is made meanwhile goes too, until every request has had its time.
    assert held(store, "ada") == {"audit_entries", "departures"}
    api.upload(key="ada:training")
    departures.carry_on(store, asked_at + departures.SETTLE_S)

    assert held(store, "ada") == {"audit_entries"}
    actions = [
        entry.value.action for entry in store.records.audit_entries.query({"owner": "ada"}, order_by="created_at")
    ]
    assert actions[-3:] == ["account.deletion_requested", "file.created", "account.deleted"]
    assert held(store, "bob") == theirs
    assert sorted(blob.key for blob in store.blobs.walk()) == sorted(blobs)


def test_a_running_job_is_cancelled_and_waited_for(api: Api, ada: Person) -> None:
    store = api.store
    job_id = api.create_job(suffix="bot")["id"]
    stored = store.records.jobs.get(job_id)
    running = stored.value.model_copy(update={"state": "running", "attempt": 1, "attempt_open": True})
    store.records.commit(store.records.jobs.replace(stored, running))
    store.blobs.write(f"jobs/{job_id}/a1/adapter.safetensors", b"x")
    ada.call("DELETE", json={"confirm": "ada"})
    late = time.time() + departures.SETTLE_S + 1

    departures.carry_on(store, late)
    stored = store.records.jobs.get(job_id)
    assert (stored.value.state, stored.value.attempt_open) == ("cancelled", True)
    assert store.blobs.list(f"jobs/{job_id}") and "files" in held(store, "ada")

    closed = jobs.apply(stored.value, jobs.Closed())
    store.records.commit(store.records.jobs.replace(stored, closed))
    departures.carry_on(store, late)
    assert held(store, "ada") == {"audit_entries"}
    assert list(store.blobs.walk()) == []


def test_a_departure_that_breaks_off_goes_on(api: Api, ada: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    store = api.store
    fill(api, "ada")
    ada.call("DELETE", json={"confirm": "ada"})
    late = time.time() + departures.SETTLE_S + 1
    real, ends = store.blobs.delete, 0

    def delete(key: str) -> None:
        is_there = store.blobs.find(key) is not None
        real(key)
        if is_there:
            raise OSError("the process ends here")

    monkeypatch.setattr(store.blobs, "delete", delete)
    while store.records.departures.query() and ends < 100:
        try:
            departures.carry_on(store, late)
        except OSError:
            ends += 1
    assert ends > 3
    assert held(store, "ada") == {"audit_entries"}
    assert list(store.blobs.walk()) == []


def test_a_round_is_bounded_and_the_next_one_goes_on(api: Api, ada: Person) -> None:
    store = api.store
    fill(api, "ada")
    ada.call("DELETE", json={"confirm": "ada"})
    late, rounds, now = time.time() + departures.SETTLE_S + 1, 0, 0.0

    def clock() -> float:
        nonlocal now
        now += departures.ROUND_S / 3
        return now

    while store.records.departures.query() and rounds < 100:
        departures.carry_on(store, late, clock)
        rounds += 1
    assert 3 < rounds < 100
    assert held(store, "ada") == {"audit_entries"}


def test_the_sweep_carries_departures_on(api: Api, ada: Person) -> None:
    api.upload()
    ada.call("DELETE", json={"confirm": "ada"})
    sweep(api.store, lambda: time.time() + departures.SETTLE_S + 1)
    assert held(api.store, "ada") == {"audit_entries"}


def fill(api: Api, owner: str) -> None:
    """Something of each kind that the API makes."""
    store, records, key = api.store, api.store.records, f"{owner}:training"
    api.upload(key=key)
    job = api.create_job(key=key, suffix="bot")
    version = add_version(store, owner=owner)
    store.blobs.write(f"{version.adapter.uri}/adapter.safetensors", owner.encode())
    store.blobs.write(f"jobs/{job['id']}/states/s1/{owner}", b"state")
    checkpoint = Checkpoint(
        id=f"ftckpt_{owner}",
        owner=owner,
        job_id=job["id"],
        base=BASE,
        step=2,
        name=version.ft_name + ":ckpt-step-2",
        created_at=1.0,
        adapter=version.adapter.model_copy(update={"uri": f"jobs/{job['id']}/checkpoints/step-2"}),
    )
    store.blobs.write(f"{checkpoint.adapter.uri}/adapter.safetensors", b"c")
    minted = ApiKey(
        id=f"key_{owner}", owner=owner, name="", hash=owner, redacted="sk", scopes=("inference",), created_at=1.0
    )
    records.commit(records.checkpoints.create(checkpoint), records.keys.create(minted))
    upload = {"filename": "a.jsonl", "purpose": "fine-tune", "bytes": 1, "mime_type": "text/plain"}
    upload_id = api.post("/v1/uploads", json=upload, key=key, headers={"idempotency-key": owner}).json()["id"]
    part = api.post(f"/v1/uploads/{upload_id}/parts", files={"data": ("part", b"x")}, key=key)
    assert part.status_code == 200, part.text


def held(store: Store, owner: str) -> set[str]:
    """The collections in which an owner has records."""
    tables = {name: value for name, value in vars(store.records).items() if isinstance(value, Table)}
    return {name for name, table in tables.items() if table.query({"owner": owner}, limit=1)}


def blobs_of(store: Store, owner: str) -> list[str]:
    """The keys of the blobs to which an owner's records lead."""
    found = set()
    for name in (*departures.FIRST, *departures.REST):
        for stored in getattr(store.records, name).query({"owner": owner}):
            found |= set(departures._blobs_of(store, stored.value))
    return [key for key in found if store.blobs.find(key)]
