import time

import pytest
from starlette.requests import Request

from tuneloom.control import audit
from tuneloom.domain import Actor, ApiKey, AuditTarget, Principal
from tuneloom.store.base import StoreConflict

ACTOR = Actor(kind="key", id="key_1", owner="ada")
TARGET = AuditTarget(owner="ada", type="api_key", id="key_2", name="phone")


def key(**fields: object) -> ApiKey:
    return ApiKey.model_validate(
        {"id": "key_2", "owner": "ada", "name": "phone", "hash": "h", "redacted": "r", "scopes": ["inference"]}
        | {"created_at": 1.0, **fields}
    )


def test_an_entry_is_written_with_its_change_or_not_at_all(store):
    records = store.records
    records.commit(records.keys.create(key()), audit.entry(ACTOR, "api_key.created", TARGET, {"name": "phone"}))
    with pytest.raises(StoreConflict):
        records.commit(records.keys.create(key()), audit.entry(ACTOR, "api_key.created", TARGET))
    (entry,) = [stored.value for stored in records.audit_entries.query({"owner": "ada"})]
    assert (entry.action, entry.actor, entry.target, entry.data) == (
        "api_key.created",
        ACTOR,
        TARGET,
        {"name": "phone"},
    )
    assert entry.created_at == pytest.approx(time.time(), abs=60)


def test_changes_tell_only_the_fields_that_differ():
    before, after = key(), key(name="laptop", expires_at=9.0, hash="other")
    assert audit.changes(before, after, "name", "expires_at", "scopes") == {
        "name": {"from": "phone", "to": "laptop"},
        "expires_at": {"from": None, "to": 9.0},
    }


@pytest.mark.parametrize(("kind", "id"), [("key", "key_1"), ("person", "ada"), ("anonymous", "ada")])
def test_the_actor_of_a_request_is_its_key_or_person(kind, id):
    scope = {
        "type": "http",
        "headers": [(b"x-request-id", b"req_1")],
        "client": ("203.0.113.9", 5000),
        "state": {"principal": Principal(owner="ada", key_id="key_1", scopes=("training",), kind=kind)},
    }
    actor = audit.actor_of(Request(scope))
    assert actor == Actor(kind=kind, id=id, owner="ada", address="203.0.113.9", request_id="req_1")


def test_the_command_line_is_an_actor_by_its_user():
    assert audit.cli_actor().kind == "cli"
    assert audit.cli_actor().id
