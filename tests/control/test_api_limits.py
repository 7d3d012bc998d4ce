import pytest

from tests.control.conftest import BASE, Api, assert_error
from tuneloom.config import LimitsSettings
from tuneloom.domain import Allowance
from tuneloom.store.base import Range

LIMITS = "/v1/tuneloom/limits"
ADMIN = "root:admin"
JOBS = "/v1/fine_tuning/jobs"


def set_limits(api, owner: str = "ada", **limits) -> None:
    assert api.call("PUT", f"{LIMITS}/{owner}", json=limits, key=ADMIN).status_code == 200


def actions(api) -> list[tuple[str, str, dict]]:
    entries = api.store.records.audit_entries.query(order_by="created_at", bounds=Range())
    return [(e.value.action, e.value.target.id, e.value.data) for e in entries if "rate_limit" in e.value.action]


def test_an_admin_sets_reads_and_clears_the_limits_of_an_owner(api):
    nothing = api.get(f"{LIMITS}/ada", key=ADMIN).json()
    assert (nothing["owner"], nothing["updated_at"], set(nothing["limits"])) == (
        "ada",
        None,
        set(Allowance.model_fields),
    )
    body = {"rates": {"requests_per_minute": 10}, "tokens_per_month": 5000, "budget_per_month": 2.5}
    put = api.call("PUT", f"{LIMITS}/ada", json=body, key=ADMIN).json()
    assert put["limits"]["rates"] == {"requests_per_minute": 10, "requests_per_day": None, "tokens_per_minute": None}
    assert api.get(f"{LIMITS}/ada", key=ADMIN).json() == put
    # All of it is said each time.
    assert api.post(f"{LIMITS}/ada", json={"max_concurrent": 3}, key=ADMIN).json()["limits"]["tokens_per_month"] is None
    assert api.delete(f"{LIMITS}/ada", key=ADMIN).json()["deleted"] is True
    assert api.delete(f"{LIMITS}/ada", key=ADMIN).status_code == 200
    assert api.get(f"{LIMITS}/ada", key=ADMIN).json() == nothing

    assert [(action, target) for action, target, _ in actions(api)] == [
        ("rate_limit.updated", "ada"),
        ("rate_limit.updated", "ada"),
        ("rate_limit.deleted", "ada"),
    ]
    assert actions(api)[0][2]["tokens_per_month"] == {"from": None, "to": 5000}


@pytest.mark.parametrize("key", ["ada:training,inference,account", "bob:inference"])
def test_nobody_else_does_not_even_ones_own(api, key):
    for method in ("GET", "PUT", "POST", "DELETE"):
        options = {"json": {}} if method in ("PUT", "POST") else {}
        answers = [api.call(method, f"{LIMITS}/{owner}", key=key, **options) for owner in ("ada", "nobody")]
        assert_error(answers[0], 403, None, "`admin`")
        assert answers[0].content == answers[1].content


@pytest.mark.parametrize(
    "body, param",
    [
        ({"requests": 1}, "requests"),
        ({"rates": {"requests_per_minute": 0}}, "rates.requests_per_minute"),
        ({"rates": {"requests_per_second": 1}}, "rates.requests_per_second"),
        ({"max_concurrent": "4"}, "max_concurrent"),
        ({"budget_per_month": -1}, "budget_per_month"),
    ],
)
def test_what_is_no_limit_is_named(api, body, param):
    assert_error(api.call("PUT", f"{LIMITS}/ada", json=body, key=ADMIN), 400, param)


def test_what_can_be_no_owner_is_refused(api):
    assert_error(api.call("PUT", f"{LIMITS}/a%20b", json={}, key=ADMIN), 400, "owner")


def assert_no_room(answer) -> None:
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["code"]) == (429, "insufficient_quota", "insufficient_quota")
    assert answer.headers["x-should-retry"] == "false"


def test_an_owner_stores_no_more_than_may_be(api):
    set_limits(api, files_bytes=100)
    small = api.upload(b"x" * 60, "a.bin", "user_data")
    options = {"data": {"purpose": "user_data"}}
    refused = api.post("/v1/files", files={"file": ("b.bin", b"x" * 41)}, **options)
    assert_no_room(refused)
    assert "60" in refused.json()["error"]["message"]
    # Nothing of it stays.
    assert len(api.store.blobs.list("files")) == 1
    assert api.post("/v1/files", files={"file": ("b.bin", b"x" * 40)}, **options).status_code == 200
    assert api.upload(b"x" * 101, "a.bin", "user_data", key="bob:training")

    upload = {"filename": "a.bin", "purpose": "user_data", "bytes": 50, "mime_type": "x"}
    assert_no_room(api.post("/v1/uploads", json=upload))
    api.delete(f"/v1/files/{small}")
    assert api.post("/v1/uploads", json=upload).status_code == 200
    # What is announced takes its room.
    assert_no_room(api.post("/v1/files", files={"file": ("c.bin", b"x" * 11)}, **options))


def test_an_upload_that_is_sent_again_is_answered_although_no_room_is_left(api):
    set_limits(api, files_bytes=100)
    sent = {"files": {"file": ("a.bin", b"x" * 90)}, "data": {"purpose": "user_data"}}
    first = api.post("/v1/files", **sent)
    again = api.post("/v1/files", **sent, headers={"x-stainless-retry-count": "1"})
    assert again.json()["id"] == first.json()["id"]


def test_an_edited_file_takes_room_too(api):
    row = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    file = api.upload(row * 3)
    set_limits(api, files_bytes=len(row) * 5)
    body = {"operations": [{"op": "delete", "rows": [1]}]}
    assert api.post(f"/v1/tuneloom/files/{file}/edit", json=body).status_code == 200
    assert_no_room(api.post(f"/v1/tuneloom/files/{file}/edit", json=body))


def test_an_owners_jobs_that_may_wait(api):
    set_limits(api, max_queued_jobs=1)
    job = api.create_job()
    refused = api.post(JOBS, json={"model": BASE, "training_file": job["training_file"]})
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many_queued_jobs")
    for _ in range(2):
        api.create_job(key="bob:training")


def test_defaults_come_from_the_settings(store, tmp_path, api):
    settings = api.settings.model_copy(update={"limits": LimitsSettings(owner={"files_bytes": 5})})
    other = Api(store, settings)
    options = {"data": {"purpose": "user_data"}}
    assert_no_room(other.post("/v1/files", files={"file": ("a.bin", b"x" * 6)}, **options))
    set_limits(other, files_bytes=10)
    assert other.post("/v1/files", files={"file": ("a.bin", b"x" * 6)}, **options).status_code == 200
