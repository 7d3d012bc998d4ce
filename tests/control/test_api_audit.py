import time

import httpx2
import pytest
from openai import AsyncOpenAI

from tests.control.conftest import BASE, assert_error
from tests.control.test_models import add_version
from tuneloom.control import api_audit, audit
from tuneloom.domain import Actor, AuditTarget

LOGS, OWN = "/v1/organization/audit_logs", "/v1/tuneloom/audit"
ADMIN, ADA = "root:admin", "ada:account,inference,training"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def types(api, path: str = LOGS, key: str = ADMIN, **params: object) -> list[str]:
    answer = api.get(path, key=key, params=params)
    assert answer.status_code == 200, answer.text
    return [entry["type"] for entry in answer.json()["data"]]


def write(api, action: str, *, owner: str = "ada", actor: str = "key_1", actor_owner: str = "ada") -> str:
    who = Actor(kind="key", id=actor, owner=actor_owner, address="203.0.113.9", request_id="req_1")
    entry = audit.entry(who, action, AuditTarget(owner=owner, type="thing", id=f"id_{action}"))
    api.store.records.commit(entry)
    return entry.id


def test_every_act_of_an_owner_leaves_one_entry(api):
    made = api.post("/v1/tuneloom/keys", json={"scopes": ["inference"]}, key=ADA).json()
    key = f"/v1/tuneloom/keys/{made['id']}"
    api.post(key, json={"name": "phone"}, key=ADA)
    rotated = api.post(f"{key}/rotate", json={"overlap": "1h"}, key=ADA).json()
    api.delete(key, key=ADA)
    job = api.create_job(suffix="bot", key=ADA)
    for verb in ("pause", "resume", "cancel"):
        api.post(f"/v1/fine_tuning/jobs/{job['id']}/{verb}", key=ADA)
    for _ in range(3):
        add_version(api.store)
    api.post("/v1/tuneloom/models/bot/activate", json={"version": 3}, key=ADA)
    api.post("/v1/tuneloom/models/bot/rollback", key=ADA)
    api.delete("/v1/models/bot@v1", key=ADA)
    api.delete("/v1/models/bot", key=ADA)
    edited = api.post(
        f"/v1/tuneloom/files/{job['training_file']}/edit",
        json={"operations": [{"op": "append", "rows": [{"text": "x"}]}]},
        key=ADA,
    )
    assert edited.status_code == 200, edited.text
    assert api.get(f"/v1/files/{job['training_file']}/content", key=ADA).status_code == 200
    exported = api.get(f"/v1/tuneloom/files/{job['training_file']}/export", key=ADA)
    assert exported.status_code == 200
    api.delete(f"/v1/files/{job['training_file']}", key=ADA)

    wanted = [
        "api_key.created",
        "api_key.updated",
        "api_key.rotated",
        "api_key.deleted",
        "file.created",
        "fine_tuning.job.created",
        "fine_tuning.job.paused",
        "fine_tuning.job.resumed",
        "fine_tuning.job.cancelled",
        "model.version.activated",
        "model.version.rolled_back",
        "model.version.deleted",
        "model.deleted",
        "file.edited",
        "file.downloaded",
        "file.downloaded",
        "file.deleted",
    ]
    assert types(api, limit=100)[::-1] == wanted
    assert types(api, OWN, ADA, limit=100)[::-1] == wanted
    text = api.get(LOGS, key=ADMIN, params={"limit": 100}).text
    stored = api.store.records.keys.get(made["id"]).value
    for secret in (made["secret"], rotated["secret"], stored.hash):
        assert secret not in text


def test_an_entry_tells_who_what_and_what_changed(api):
    made = api.post("/v1/tuneloom/keys", json={"owner": "ada", "scopes": ["inference"]}, key=ADMIN).json()
    path = f"/v1/tuneloom/keys/{made['id']}"
    api.post(path, json={"name": "phone"}, key=ADMIN, headers={"x-request-id": "req_9"})
    entry, first = api.get(LOGS, key=ADMIN).json()["data"]
    assert entry["object"] == "organization.audit_log"
    assert entry["actor"] == {
        "type": "api_key",
        "api_key": {"id": "key_1", "type": "user", "user": {"id": "root", "email": None}},
    }
    assert entry["api_key.updated"] == {"id": made["id"], "changes_requested": {"name": "phone"}}
    assert entry["tuneloom"]["data"] == {"name": {"from": "", "to": "phone"}}
    assert entry["tuneloom"]["actor"]["request_id"] == "req_9"
    assert entry["tuneloom"]["actor"]["address"] == "testclient"
    assert entry["tuneloom"]["target"] == {"type": "api_key", "id": made["id"], "name": "phone", "owner": "ada"}
    assert first["api_key.created"]["data"]["scopes"] == ["inference"]
    assert entry["effective_at"] == pytest.approx(time.time(), abs=60)


def test_what_failed_leaves_no_entry(api):
    assert_error(api.post("/v1/tuneloom/models/none/activate", json={"version": 1}, key=ADA), 404, "model")
    assert api.delete("/v1/models/none", key=ADA).status_code == 404
    assert types(api) == []


def test_a_retried_act_leaves_one_entry(api):
    body = {"model": BASE, "training_file": api.upload()}
    first = api.post("/v1/fine_tuning/jobs", json=body).json()
    again = api.post("/v1/fine_tuning/jobs", json=body, headers={"x-stainless-retry-count": "1"}).json()
    assert again["id"] == first["id"]
    assert types(api) == ["fine_tuning.job.created", "file.created"]


def test_an_owner_sees_only_what_was_done_to_their_things_and_no_operators(api):
    write(api, "a.made", owner="ada")
    write(api, "b.made", owner="bob", actor_owner="bob")
    write(api, "c.changed", owner="ada", actor="key_root", actor_owner="root")
    target = AuditTarget(owner="ada", type="model.version", id="ada:bot:v1")
    api.store.records.commit(audit.entry(audit.SYSTEM, "model.version.created", target))
    answer = api.get(OWN, key=ADA)
    assert [entry["type"] for entry in answer.json()["data"]] == ["model.version.created", "c.changed", "a.made"]
    assert [entry["actor"] for entry in answer.json()["data"]] == [
        {"kind": "system"},
        {"kind": "operator"},
        {"kind": "key", "id": "key_1", "address": "203.0.113.9", "request_id": "req_1"},
    ]
    assert "key_root" not in answer.text


@pytest.mark.parametrize(
    ("path", "key", "scope"),
    [(LOGS, ADA, "`admin`"), (OWN, "ada:training", "`account`"), (OWN, "ada:account:bot", "some models")],
)
def test_who_may_not_read_the_log_is_told_why(api, path, key, scope):
    assert_error(api.get(path, key=key), 403, None, scope)


def test_entries_are_found_by_type_actor_target_and_time(api):
    for action, actor in (("a.made", "key_1"), ("b.made", "key_2"), ("c.made", "key_2")):
        write(api, action, actor=actor)
    assert types(api, **{"event_types[]": "b.made"}) == ["b.made"]
    assert types(api, **{"event_types[]": ["a.made", "c.made"]}) == ["c.made", "a.made"]
    assert types(api, **{"actor_ids[]": "key_2"}) == ["c.made", "b.made"]
    assert types(api, **{"resource_ids[]": "id_a.made"}) == ["a.made"]
    assert types(api, **{"event_types[]": "c.made", "actor_ids[]": "key_1"}) == []
    assert types(api, OWN, ADA, **{"event_types[]": "c.made", "actor_ids[]": "key_2"}) == ["c.made"]


def test_bounds_of_time_are_those_of_the_seconds_that_are_shown(api):
    id = write(api, "a.made")
    at = int(api.store.records.audit_entries.get(id).value.created_at)
    for sign, second, is_found in (
        ("gt", at, False),
        ("gt", at - 1, True),
        ("gte", at, True),
        ("gte", at + 1, False),
        ("lt", at, False),
        ("lt", at + 1, True),
        ("lte", at, True),
        ("lte", at - 1, False),
    ):
        assert types(api, **{f"effective_at[{sign}]": second}) == ["a.made"] * is_found, (sign, second)


def test_pages_go_on_after_an_entry_and_back_before_one(api, monkeypatch):
    monkeypatch.setattr(api_audit, "CHUNK", 2)
    ids = [write(api, f"n{number}.made") for number in range(5)][::-1]
    first = api.get(LOGS, key=ADMIN, params={"limit": 2}).json()
    assert ([entry["id"] for entry in first["data"]], first["has_more"]) == (ids[:2], True)
    assert (first["first_id"], first["last_id"]) == (ids[0], ids[1])
    rest = api.get(LOGS, key=ADMIN, params={"limit": 3, "after": ids[1]}).json()
    assert ([entry["id"] for entry in rest["data"]], rest["has_more"]) == (ids[2:], False)
    back = api.get(LOGS, key=ADMIN, params={"limit": 2, "before": ids[3]}).json()
    assert ([entry["id"] for entry in back["data"]], back["has_more"]) == (ids[1:3], True)


@pytest.mark.parametrize(
    ("params", "status", "param"),
    [
        ({"limit": 101}, 400, "limit"),
        ({"after": "x", "before": "y"}, 400, "before"),
        ({"after": "audit_log-none"}, 404, "after"),
        ({"effective_at[gt]": "yesterday"}, 400, "effective_at[gt]"),
        ({"project_ids[]": "p"}, 400, "project_ids"),
        ({"actor_emails[]": "a@b.c"}, 400, "actor_emails"),
        ({"tenant_only": "true"}, 400, "tenant_only"),
    ],
)
def test_what_cannot_be_asked_for_is_named(api, params, status, param):
    assert_error(api.get(LOGS, key=ADMIN, params=params), status, param)


def test_a_filter_that_fits_next_to_nothing_reads_a_bounded_part(api, monkeypatch):
    monkeypatch.setattr(api_audit, "CHUNK", 2)
    monkeypatch.setattr(api_audit, "MAX_READ", 4)
    for number in range(6):
        write(api, f"n{number}.made")
    assert_error(api.get(LOGS, key=ADMIN, params={"actor_ids[]": "nobody"}), 400, "effective_at", "Narrow")


def test_nothing_changes_or_removes_an_entry(api):
    id = write(api, "a.made")
    for method in ("POST", "PUT", "PATCH", "DELETE"):
        for path in (LOGS, OWN, f"{LOGS}/{id}", f"{OWN}/{id}"):
            assert api.call(method, path, key=ADMIN).status_code in (404, 405)
    assert types(api) == ["a.made"]


@pytest.mark.anyio
async def test_the_openai_client_reads_the_log(api):
    write(api, "a.made")
    api.post("/v1/tuneloom/keys", json={"scopes": ["inference"]}, key=ADA)
    transport = httpx2.ASGITransport(app=api.app)
    async with httpx2.AsyncClient(transport=transport) as http:
        client = AsyncOpenAI(api_key="x", admin_api_key=ADMIN, base_url="http://tuneloom/v1", http_client=http)
        logs = client.admin.organization.audit_logs
        page = await logs.list(event_types=["api_key.created"], effective_at={"gt": int(time.time()) - 600})
        (entry,) = page.data
        assert entry.api_key_created is not None and entry.api_key_created.data.scopes == ["inference"]
        assert entry.actor.api_key.user.id == "ada"
        assert [entry.type async for entry in logs.list(limit=1)] == ["api_key.created", "a.made"]
