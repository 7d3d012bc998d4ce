import re
import time

import pytest

from tests.control.conftest import PEPPER
from tuneloom.config import Pepper
from tuneloom.control import key_fields, keys
from tuneloom.errors import InvalidRequest, NotFound
from tuneloom.store.keys import find_secret


def test_a_secret_is_shown_once_and_kept_as_a_keyed_hash(store):
    minted = keys.mint(store.records, PEPPER, owner="ada", name="laptop")
    assert re.fullmatch(r"sk-[A-Za-z0-9_-]{43}", minted.secret)
    found = store.records.keys.query({"hash": PEPPER.hash(minted.secret).hash})
    assert [stored.value.id for stored in found] == [minted.key.id]
    assert minted.secret not in minted.key.model_dump_json()
    assert minted.key.redacted == f"{minted.secret[:6]}...{minted.secret[-4:]}"


def test_revoking_is_final_and_may_be_repeated(store):
    minted = keys.mint(store.records, PEPPER, owner="ada")
    first = keys.revoke(store.records, minted.key.id)
    assert first.revoked_at is not None
    assert keys.revoke(store.records, minted.key.id) == first
    with pytest.raises(NotFound):
        keys.revoke(store.records, "key_unknown")


def test_keys_are_listed_newest_first_by_owner(store):
    names = [("ada", "1"), ("bob", "2"), ("ada", "3")]
    for owner, name in names:
        keys.mint(store.records, PEPPER, owner=owner, name=name)
    assert [key.name for key in keys.list_keys(store.records)] == ["3", "2", "1"]
    assert [key.name for key in keys.list_keys(store.records, "ada")] == ["3", "1"]


@pytest.mark.parametrize(
    "text, seconds",
    [("30d", 2592000), ("12h", 43200), ("90m", 5400), ("2w", 1209600), (60, 60), ("60", 60), (None, None)],
)
def test_durations(text, seconds):
    assert key_fields.parse_duration(text) == seconds


def test_an_expiry_counts_from_now(store):
    minted = keys.mint(store.records, PEPPER, owner="ada", expires_in="1h")
    assert minted.key.expires_at == pytest.approx(time.time() + 3600, abs=5)


@pytest.mark.parametrize(
    "wrong, param",
    [
        ({"expires_in": "soon"}, "expires_in"),
        ({"expires_in": "٣d"}, "expires_in"),
        ({"expires_in": 0}, "expires_in"),
        ({"expires_in": "99999w"}, "expires_in"),
        ({"scopes": ["root"]}, "scopes"),
        ({"scopes": []}, "scopes"),
        ({"owner": "a:b"}, "owner"),
        ({"owner": "../etc"}, "owner"),
        ({"name": "x" * 200}, "name"),
    ],
)
def test_what_a_key_may_not_be_is_named(store, wrong, param):
    with pytest.raises(InvalidRequest) as caught:
        keys.mint(store.records, PEPPER, **{"owner": "ada", **wrong})
    assert caught.value.param == param


def test_the_peppers_that_are_needed_are_those_of_secrets_that_work(store):
    def mint(value: bytes, **fields) -> keys.Minted:
        return keys.mint(store.records, Pepper((value * 32,)), owner="ada", **fields)

    live, revoked, rotated, ended = mint(b"a"), mint(b"b"), mint(b"c"), mint(b"d")
    keys.revoke(store.records, revoked.key.id)
    keys.rotate(store.records, PEPPER, rotated.key.id, "1h")
    keys.rotate(store.records, PEPPER, ended.key.id)
    assert keys.needed_peppers(store.records) == {live.key.pepper, rotated.key.pepper, PEPPER.id}


def test_each_change_of_a_key_is_one_commit_with_its_entry(store):
    minted = keys.mint(store.records, PEPPER, owner="ada")
    keys.rotate(store.records, PEPPER, minted.key.id, "1h")
    keys.revoke(store.records, minted.key.id)
    keys.revoke(store.records, minted.key.id)
    found = store.records.audit_entries.query({"owner": "ada"}, order_by="created_at")
    assert [stored.value.action for stored in found] == ["api_key.created", "api_key.rotated", "api_key.deleted"]
    assert {stored.value.actor.kind for stored in found} == {"cli"}


def test_a_rotation_without_an_overlap_ends_the_secret_before(store):
    minted = keys.mint(store.records, PEPPER, owner="ada")
    rotated = keys.rotate(store.records, PEPPER, minted.key.id)
    assert find_secret(store.records, PEPPER.hashes(minted.secret)) is None
    found = find_secret(store.records, PEPPER.hashes(rotated.secret))
    assert found is not None and (found.key.id, found.is_previous) == (minted.key.id, False)
