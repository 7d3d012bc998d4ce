"""Keys and the audit log on the real queries of Firestore."""

import time

import pytest

from tests.control.conftest import PEPPER
from tuneloom.control import audit, keys
from tuneloom.control.api_audit import Filter, read_entries
from tuneloom.store import open_documents
from tuneloom.store.keys import find_secret, note_use
from tuneloom.store.records import Records


@pytest.fixture
def records(firestore_url):
    documents = open_documents(firestore_url)
    yield Records(documents)
    documents.close()


def test_a_key_is_found_by_both_of_its_secrets_and_its_use_is_kept(records):
    first = keys.mint(records, PEPPER, owner="ada")
    second = keys.rotate(records, PEPPER, first.key.id, "1h")
    for secret, is_previous in ((first.secret, True), (second.secret, False)):
        found = find_secret(records, PEPPER.hashes(secret))
        assert found is not None and (found.key.id, found.is_previous) == (first.key.id, is_previous)
    assert find_secret(records, PEPPER.hashes("sk-nobody")) is None
    now = time.time()
    note_use(records, first.key.id, now)
    assert records.keys.get(first.key.id).value.last_used_at == now
    assert [key.id for key in keys.list_keys(records, "ada")] == [first.key.id]


def test_the_log_is_read_by_owner_type_and_time_in_both_directions_and_swept(records):
    made = [keys.mint(records, PEPPER, owner=owner).key.id for owner in ("ada", "bob", "ada")]
    keys.revoke(records, made[0])
    entries, _ = read_entries(records, Filter(), 10)
    assert [entry.target.id for entry in entries] == [made[0], *reversed(made)]

    def ids(wanted: Filter, **more: object) -> list[str]:
        return [entry.target.id for entry in read_entries(records, wanted, 10, **more)[0]]

    assert ids(Filter(owner="ada", types=frozenset({"api_key.created"}))) == [made[2], made[0]]
    assert ids(Filter(types=frozenset({"api_key.deleted"}))) == [made[0]]
    assert ids(Filter(owner="ada"), after=entries[3], descending=False) == [made[2], made[0]]
    at = int(time.time())
    assert ids(Filter(owner="bob", since=at - 600.0, until=at + 600.0)) == [made[1]]
    assert ids(Filter(since=at + 600.0)) == []
    audit.sweep(records, entries[1].created_at)
    assert ids(Filter()) == [made[0], made[2]]
