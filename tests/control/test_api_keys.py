import time

import pytest

from tests.control.conftest import BASE, PEPPER, assert_error
from tests.control.test_models import add_version
from tuneloom.store.keys import find_secret

KEYS = "/v1/tuneloom/keys"
MODELS = "/v1/tuneloom/models"
JOBS = "/v1/fine_tuning/jobs"
ADMIN = "root:admin"
ADA = "ada:account,inference,training"
RETRY = {"x-stainless-retry-count": "1"}


def find(api, secret: str) -> str | None:
    found = find_secret(api.store.records, PEPPER.hashes(secret))
    return found.key.id if found else None


def make(api, key: str = ADA, **body: object) -> dict:
    answer = api.post(KEYS, json=body, key=key)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_an_admin_makes_a_key_for_an_owner_sees_its_secret_once_and_revokes_it(api):
    made = make(api, ADMIN, name="laptop", owner="ada", scopes=["inference"], expires_in="30d")
    assert find(api, made["secret"]) == made["id"]
    assert (made["owner"], made["scopes"]) == ("ada", ["inference"])
    assert made["expires_at"] - made["created_at"] == 30 * 86400
    listed = api.get(KEYS, key=ADMIN).json()["data"]
    assert [key["id"] for key in listed] == [made["id"]]
    assert made["secret"] not in str(listed)
    assert api.get(KEYS, params={"owner": "bob"}, key=ADMIN).json()["data"] == []
    assert api.delete(f"{KEYS}/{made['id']}", key=ADMIN).json()["revoked_at"] is not None


def test_the_key_of_a_model_needs_no_body_and_calls_that_model_alone(api):
    add_version(api.store)
    made = api.post(f"{MODELS}/bot/keys", key=ADA)
    assert made.headers["cache-control"] == "no-store"
    made = made.json()
    assert find(api, made["secret"]) == made["id"]
    assert (made["name"], made["models"], made["scopes"], made["owner"]) == ("bot", ["bot"], ["inference"], "ada")
    assert (made["expires_at"], made["last_used_at"]) == (None, None)
    named = {"name": "phone", "scopes": ["inference", "training"], "expires_in": "1d", "rates": {}}
    second = api.post(f"{MODELS}/bot/keys", json=named, key=ADA).json()
    assert (second["name"], second["models"], second["scopes"]) == ("phone", ["bot"], ["inference", "training"])
    of_base = api.post(f"{MODELS}/gpt-4o-mini-2024-07-18/keys", key=ADA).json()
    assert (of_base["name"], of_base["models"]) == (BASE, [BASE])
    make(api)
    listed = api.get(f"{MODELS}/bot/keys", key=ADA).json()
    assert [key["id"] for key in listed["data"]] == [second["id"], made["id"]]
    assert made["secret"] not in str(listed) and second["secret"] not in str(listed)
    assert [key["id"] for key in api.get(f"{MODELS}/{BASE}/keys", key=ADA).json()["data"]] == [of_base["id"]]


def test_keys_of_a_model_are_for_accounts_and_for_models_that_are_theirs(api):
    add_version(api.store)
    assert_error(api.post(f"{MODELS}/bot/keys", key="ada:training,inference"), 403, None, "`account`")
    assert_error(api.post(f"{MODELS}/bot/keys", key="ada:account"), 403, "scopes", "`inference`")
    for path, key in ((f"{MODELS}/none/keys", ADA), (f"{MODELS}/bot/keys", "eve:account,inference")):
        assert_error(api.post(path, key=key), 404, "model")
        assert_error(api.get(path, key=key), 404, "model")
    assert_error(api.post(f"{MODELS}/bot/keys", key="ada:account,inference:other"), 404, "model")
    assert_error(api.post(f"{MODELS}/bot/keys", json={"models": ["bot"]}, key=ADA), 400, "models")
    assert_error(api.post(f"{MODELS}/bot/keys", json={"owner": "eve"}, key=ADA), 403, None, "`admin`")
    admins = api.post(f"{MODELS}/bot/keys", json={"owner": "ada"}, key=ADMIN).json()
    assert (admins["owner"], admins["models"]) == ("ada", ["bot"])
    assert len(api.get(f"{MODELS}/bot/keys", params={"owner": "ada"}, key=ADMIN).json()["data"]) == 1


def test_a_job_brings_the_first_key_of_its_model_if_asked(api):
    body = {"model": BASE, "training_file": api.upload(key=ADA), "suffix": "bot", "tuneloom": {"first_key": True}}
    answer = api.post(JOBS, json=body, key=ADA)
    assert answer.headers["cache-control"] == "no-store"
    job = answer.json()
    made = job["tuneloom"]["key"]
    assert find(api, made["secret"]) == made["id"]
    assert (made["name"], made["models"], made["scopes"]) == ("bot", ["bot"], ["inference"])
    assert "first_key" not in job["tuneloom"]["options"]
    shown = api.get(f"{JOBS}/{job['id']}", key=ADA).text
    assert "key" not in api.get(f"{JOBS}/{job['id']}", key=ADA).json()["tuneloom"] and made["secret"] not in shown
    log = api.get("/v1/tuneloom/audit", key=ADA)
    assert [entry["type"] for entry in log.json()["data"]] == [
        "api_key.created",
        "fine_tuning.job.created",
        "file.created",
    ]
    assert made["secret"] not in log.text

    # The model has a key: another one is made by who asks for it. Without a suffix each job has a model of its own.
    assert "key" not in api.post(JOBS, json=body, key=ADA).json()["tuneloom"]
    nameless = api.post(JOBS, json={**body, "suffix": None}, key=ADA).json()["tuneloom"]
    assert nameless["key"]["models"] == [nameless["name"]]
    api.delete(f"{KEYS}/{made['id']}", key=ADA)
    assert api.post(JOBS, json=body, key=ADA).json()["tuneloom"]["key"]["id"] != made["id"]


def test_a_job_sent_again_shows_its_first_key_until_somebody_has_used_it(api):
    body = {"model": BASE, "training_file": api.upload(key=ADA), "suffix": "bot", "tuneloom": {"first_key": True}}
    first = api.post(JOBS, json=body, key=ADA).json()
    again = api.post(JOBS, json=body, key=ADA, headers=RETRY).json()
    assert again["id"] == first["id"]
    lost, seen = first["tuneloom"]["key"], again["tuneloom"]["key"]
    assert (seen["id"], find(api, lost["secret"]), find(api, seen["secret"])) == (lost["id"], None, lost["id"])
    stored = api.store.records.keys.get(seen["id"])
    api.store.records.commit(
        api.store.records.keys.replace(stored, stored.value.model_copy(update={"last_used_at": 9}))
    )
    shown = api.post(JOBS, json=body, key=ADA, headers=RETRY).json()["tuneloom"]["key"]
    assert shown["id"] == seen["id"] and "secret" not in shown
    assert find(api, seen["secret"]) == seen["id"]


def test_a_secret_that_is_in_use_is_not_replaced_by_a_repetition_of_its_creation(api):
    headers = {"idempotency-key": "k"}
    made = api.post(KEYS, json={"name": "x"}, key=ADA, headers=headers).json()
    stored = api.store.records.keys.get(made["id"])
    api.store.records.commit(
        api.store.records.keys.replace(stored, stored.value.model_copy(update={"last_used_at": 9}))
    )
    assert_error(api.post(KEYS, json={"name": "x"}, key=ADA, headers=headers), 409, None, made["id"])
    assert find(api, made["secret"]) == made["id"]


def test_who_may_not_make_keys_gets_no_first_one_and_no_job(api):
    weak = "ada:training,inference"
    body = {"model": BASE, "training_file": api.upload(key=weak), "tuneloom": {"first_key": True}}
    assert_error(api.post(JOBS, json=body, key=weak), 403, None, "`account`")
    assert_error(api.post(JOBS, json=body, key="ada:training,account"), 403, "scopes", "`inference`")
    assert_error(api.post(JOBS, json={**body, "tuneloom": {"first_key": "maybe"}}, key=ADA), 400, "tuneloom.first_key")
    assert api.get(JOBS, key=weak).json()["data"] == [] and api.store.records.keys.query() == []


def test_an_account_looks_after_its_own_keys(api):
    made = make(api, scopes=["inference"], rates={"requests_per_minute": 5})
    assert (made["owner"], made["rates"]["requests_per_minute"]) == ("ada", 5)
    others = make(api, ADMIN, owner="bob")
    assert [key["id"] for key in api.get(KEYS, key=ADA).json()["data"]] == [made["id"]]
    assert api.get(f"{KEYS}/{made['id']}", key=ADA).json()["id"] == made["id"]
    assert api.post(f"{KEYS}/{made['id']}", json={"name": "phone"}, key=ADA).json()["name"] == "phone"
    assert api.post(f"{KEYS}/{made['id']}/rotate", json={}, key=ADA).status_code == 200
    assert api.post(f"{KEYS}/{made['id']}/revoke", key=ADA).json()["revoked_at"] is not None
    for path, key in ((f"{KEYS}?owner=bob", ADA), (f"{KEYS}?owner=nobody", ADA)):
        assert_error(api.get(path, key=key), 403, None, "`admin`")
    assert_error(api.get(f"{KEYS}/{others['id']}", key=ADA), 404, "id")


@pytest.mark.parametrize("key", ["ada:training,inference", "ada:inference"])
def test_keys_are_for_accounts_and_admins(api, key):
    calls = [
        api.get(KEYS, key=key),
        api.post(KEYS, json={}, key=key),
        api.get(f"{KEYS}/x", key=key),
        api.post(f"{KEYS}/x", json={"name": "y"}, key=key),
        api.post(f"{KEYS}/x/rotate", json={}, key=key),
        api.delete(f"{KEYS}/x", key=key),
    ]
    for call in calls:
        assert_error(call, 403, None, "`account`")


@pytest.mark.parametrize("scope", ["admin", "training"])
def test_nobody_gains_a_scope_by_a_key(api, scope):
    weak = "ada:account,inference"
    assert_error(api.post(KEYS, json={"scopes": [scope]}, key=weak), 403, "scopes")
    strong = make(api, ADMIN, owner="ada", scopes=[scope])
    for call in (
        api.post(f"{KEYS}/{strong['id']}/rotate", json={}, key=weak),
        api.post(f"{KEYS}/{strong['id']}", json={"name": "x"}, key=weak),
        api.delete(f"{KEYS}/{strong['id']}", key=weak),
    ):
        assert_error(call, 403, "scopes", f"`{scope}`")
    assert find(api, strong["secret"]) == strong["id"]


def test_nobody_gains_a_model_by_a_key(api):
    add_version(api.store)
    add_version(api.store, name="cat")
    narrow = "ada:account,inference:bot"
    assert_error(api.post(KEYS, json={"scopes": ["inference"]}, key=narrow), 403, "models")
    for models in (["cat"], ["bot", "cat"], [BASE]):
        refused = api.post(KEYS, json={"scopes": ["inference"], "models": models}, key=narrow)
        absent = api.post(KEYS, json={"scopes": ["inference"], "models": [*models[:-1], "none"]}, key=narrow)
        assert refused.status_code == 400
        assert refused.content == absent.content.replace(b"`none`", f"`{models[-1]}`".encode())
    made = make(api, narrow, scopes=["inference"], models=["bot"])
    assert_error(api.post(f"{KEYS}/{made['id']}", json={"models": []}, key=narrow), 403, "models")


def test_nobody_gains_a_day_by_a_key(api):
    ends = time.time() + 3600
    brief = f"ada:account,inference,training::{ends}"
    made = make(api, brief, scopes=["inference"])
    assert made["expires_at"] == int(ends)
    assert make(api, brief, scopes=["inference"], expires_in="10m")["expires_at"] < int(ends)
    assert_error(api.post(KEYS, json={"expires_in": "2h"}, key=brief), 403, "expires_in")
    for longer in (None, "2h"):
        refused = api.post(f"{KEYS}/{made['id']}", json={"expires_in": longer}, key=brief)
        assert_error(refused, 403, "expires_in", "Your key ends before")
    lasting = make(api)
    for call in (
        api.post(f"{KEYS}/{lasting['id']}/rotate", json={}, key=brief),
        api.delete(f"{KEYS}/{lasting['id']}", key=brief),
    ):
        assert_error(call, 403, "expires_in")
    assert find(api, lasting["secret"]) == lasting["id"]
    job = api.create_job(key=brief, suffix="brief", tuneloom={"first_key": True})
    assert job["tuneloom"]["key"]["expires_at"] == int(ends)


def test_a_key_for_some_models_sees_no_key_that_is_for_others(api):
    add_version(api.store)
    add_version(api.store, name="cat")
    narrow = "ada:account,inference:bot"
    mine = make(api, narrow, scopes=["inference"], models=["bot"])
    assert api.get(f"{KEYS}/{mine['id']}", key=narrow).json()["id"] == mine["id"]
    for models in ([], ["cat"], ["bot", "cat"]):
        wide = make(api, ADA, name="secret", scopes=["inference"], models=models)["id"]
        for method, path, body in (
            ("GET", "", None),
            ("POST", "", {"name": "x"}),
            ("POST", "/rotate", {}),
            ("POST", "/revoke", None),
            ("DELETE", "", None),
        ):
            more = {} if body is None else {"json": body}
            hidden = api.call(method, f"{KEYS}/{wide}{path}", key=narrow, **more)
            absent = api.call(method, f"{KEYS}/key_none{path}", key=narrow, **more)
            assert hidden.status_code == 404 and hidden.content == absent.content.replace(b"key_none", wide.encode())
    for path in (KEYS, f"{MODELS}/bot/keys"):
        assert [key["id"] for key in api.get(path, key=narrow).json()["data"]] == [mine["id"]]


def test_a_key_is_for_models_of_its_owner_and_for_bases(api):
    add_version(api.store)
    made = make(api, models=["bot", "gpt-4o-mini-2024-07-18", BASE])
    assert made["models"] == ["bot", BASE]
    for name in ("no-bot", "bot@v1", "x/y"):
        assert_error(api.post(KEYS, json={"models": [name]}, key=ADA), 400, "models", name)
    foreign = api.post(KEYS, json={"models": ["bot"]}, key="bob:account,inference,training")
    absent = api.post(KEYS, json={"models": ["cat"]}, key="bob:account,inference,training")
    assert foreign.content == absent.content.replace(b"cat", b"bot")
    assert_error(
        api.post(KEYS, json={"models": ["bot"], "scopes": ["admin"], "owner": "ada"}, key=ADMIN), 400, "models"
    )


def test_a_key_is_changed_in_what_is_named_only(api):
    add_version(api.store)
    made = make(api, name="a", models=["bot"], rates={"tokens_per_minute": 9}, expires_in="1h")
    path = f"{KEYS}/{made['id']}"
    named = api.post(path, json={"name": "b"}, key=ADA).json()
    assert {**named, "name": "a"} == {name: value for name, value in made.items() if name != "secret"}
    rates = api.post(path, json={"rates": {"requests_per_day": 4}, "models": []}, key=ADA).json()
    assert (rates["rates"]["tokens_per_minute"], rates["rates"]["requests_per_day"], rates["models"]) == (None, 4, [])
    assert api.post(path, json={"expires_in": None}, key=ADA).json()["expires_at"] is None
    assert api.post(path, json={"expires_in": "2h"}, key=ADA).json()["expires_at"] >= time.time() + 7190
    assert find(api, made["secret"]) == made["id"]
    assert_error(api.post(path, json={}, key=ADA), 400, None)
    assert_error(api.post(path, json={"scopes": ["admin"]}, key=ADA), 400, "scopes")
    assert_error(api.post(path, json={"rates": {"requests_per_minute": 0}}, key=ADA), 400, "rates.requests_per_minute")


def test_a_revoked_key_stays_so(api):
    made = make(api)
    api.delete(f"{KEYS}/{made['id']}", key=ADA)
    for path, body in ((f"{KEYS}/{made['id']}", {"name": "x"}), (f"{KEYS}/{made['id']}/rotate", {})):
        answer = api.post(path, json=body, key=ADA)
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "revoked")


def test_a_rotation_shows_the_new_secret_and_when_the_old_one_ends(api):
    made = make(api)
    path = f"{KEYS}/{made['id']}/rotate"
    rotated = api.post(path, json={"overlap": "1h"}, key=ADA).json()
    assert rotated["id"] == made["id"] and rotated["secret"] != made["secret"]
    assert rotated["previous_secret_ends_at"] == pytest.approx(time.time() + 3600, abs=30)
    assert find(api, made["secret"]) == find(api, rotated["secret"]) == made["id"]
    at_once = api.post(path, json={}, key=ADA).json()
    assert at_once["previous_secret_ends_at"] is None
    assert find(api, rotated["secret"]) is None
    assert_error(api.post(path, json={"overlap": "200d"}, key=ADA), 400, "overlap", "90 days")


def test_a_retried_rotation_keeps_the_secret_that_is_in_use(api):
    made = make(api)
    path = f"{KEYS}/{made['id']}/rotate"
    lost = api.post(path, json={"overlap": "1h"}, key=ADA).json()
    seen = api.post(path, json={"overlap": "1h"}, key=ADA, headers=RETRY).json()
    assert find(api, made["secret"]) == find(api, seen["secret"]) == made["id"]
    assert find(api, lost["secret"]) is None


def test_a_retried_creation_is_one_key_with_the_secret_that_was_seen(api):
    first = api.post(KEYS, json={"name": "x"}, key=ADMIN).json()
    second = api.post(KEYS, json={"name": "x"}, key=ADMIN, headers=RETRY).json()
    assert second["id"] == first["id"]
    assert find(api, second["secret"]) == first["id"]
    assert find(api, first["secret"]) is None


@pytest.mark.parametrize(
    "body, param",
    [
        ({"scopes": ["root"]}, "scopes"),
        ({"expires_in": "soon"}, "expires_in"),
        ({"x": 1}, "x"),
        ({"rates": {"requests_per_hour": 1}}, "rates.requests_per_hour"),
        ({"rates": {"tokens_per_minute": "many"}}, "rates.tokens_per_minute"),
        ({"models": ["m"] * 101}, "models"),
        ({"owner": "a:b"}, "owner"),
    ],
)
def test_what_a_key_may_not_be_is_named(api, body, param):
    assert_error(api.post(KEYS, json=body, key=ADMIN), 400, param)
