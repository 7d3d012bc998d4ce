"""The webhooks of an owner by HTTP: OpenAI's paths by the unmodified client, ours with the log."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
import openai
import pytest

from tests.control.conftest import Api, assert_error
from tests.control.receivers import answers, closes, receiver
from tuneloom.config import Settings, WebhookSettings, read_webhook_keys
from tuneloom.control.webhook_dispatcher import Dispatcher
from tuneloom.control.webhook_secrets import open_vault
from tuneloom.control.webhook_sender import Sender
from tuneloom.domain import EVENT_TYPES

OURS = "/v1/tuneloom/webhooks"
KEY = "ada:account"
URL = "https://hooks.example.com/tuneloom"
JOBS = ["fine_tuning.job.succeeded", "fine_tuning.job.failed"]


class Control:
    """The part of control that sends, ticking at each poke."""

    def __init__(self, api: Api) -> None:
        settings = api.settings
        sender = Sender(settings.webhooks)
        self.dispatcher = Dispatcher(api.store.records, settings.webhooks, lambda: open_vault(settings), sender)

    def tick(self) -> None:
        self.dispatcher.tick()
        assert self.dispatcher.drain(20)


@pytest.fixture
def local(api, store, tmp_path) -> Api:
    """An API whose settings let webhooks reach loopback."""
    webhooks = WebhookSettings(allow_private=True, timeout_s=2, max_endpoints_per_owner=3)
    return Api(store, api.settings.model_copy(update={"webhooks": webhooks}))


def create(api: Api, **fields) -> dict:
    body = {"url": URL, "event_types": JOBS, "name": "ours", **fields}
    response = api.post(OURS, json=body, key=fields.pop("key", KEY))
    assert response.status_code == 200, response.text
    return response.json()


def test_an_endpoint_is_made_shown_changed_and_deleted(api):
    made = create(api)
    secret = made.pop("signing_secret")
    assert secret.startswith("whsec_") and made["signing_secret_hint"] == f"whsec_...{secret[-4:]}"
    assert (made["object"], made["url"], made["name"], made["event_types"]) == ("webhook_endpoint", URL, "ours", JOBS)
    assert made["tuneloom"]["enabled"] is True
    path = f"{OURS}/{made['id']}"
    assert api.get(path, key=KEY).json() == made
    (stored,) = api.store.records.webhook_endpoints.query()
    assert secret not in stored.value.model_dump_json()
    assert open_vault(api.settings).open(stored.value.secret) == secret

    changed = api.post(path, json={"url": URL + "/2", "enabled": False}, key=KEY).json()
    assert (changed["url"], changed["name"], changed["event_types"]) == (URL + "/2", "ours", JOBS)
    assert changed["tuneloom"]["disabled_reason"] == "Disabled by its owner." and "signing_secret" not in changed
    assert_error(api.post(path + "/test", json={}, key=KEY), 409, None, "disabled")
    assert api.post(path, json={"enabled": True}, key=KEY).json()["tuneloom"]["enabled"] is True

    assert api.delete(path, key=KEY).json() == {"id": made["id"], "object": "webhook_endpoint.deleted", "deleted": True}
    assert api.get(path, key=KEY).status_code == 404
    actions = [stored.value for stored in api.store.records.audit_entries.query(order_by="id")]
    assert [entry.action.split(".")[1] for entry in actions] == ["created", "updated", "updated", "deleted"]
    assert all((entry.actor.id, entry.target.id) == ("key_1", made["id"]) for entry in actions)
    assert all(secret not in entry.model_dump_json() for entry in actions)


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({}, "url", "Missing required parameter"),
        ({"url": URL}, "event_types", "Missing required parameter"),
        ({"url": URL, "event_types": []}, "event_types", "is empty"),
        ({"url": URL, "event_types": ["batch.completed"]}, "event_types", "Unknown type 'batch.completed'"),
        ({"url": URL, "event_types": JOBS, "name": "a\nb"}, "name", "printable"),
        ({"url": URL, "event_types": JOBS, "secret": "x"}, "secret", "Unknown parameter"),
        ({"url": "http://example.com", "event_types": JOBS}, "url", "https"),
        ({"url": "https://127.0.0.1/", "event_types": JOBS}, "url", "not a public address"),
        ({"url": "https://[::ffff:169.254.169.254]/", "event_types": JOBS}, "url", "not a public address"),
    ],
)
def test_a_wrong_create_names_the_field(api, body, param, said):
    assert_error(api.post(OURS, json=body, key=KEY), 400, param, said)
    assert api.store.records.webhook_endpoints.query() == []


def test_a_wrong_change_changes_nothing(api):
    made = create(api)
    path = f"{OURS}/{made['id']}"
    assert_error(api.post(path, json={"url": "https://10.0.0.1/"}, key=KEY), 400, "url")
    assert_error(api.post(path, json={"event_types": ["x"]}, key=KEY), 400, "event_types")
    assert_error(api.post(path + "/rotate", json={"overlap": "soon"}, key=KEY), 400, "overlap")
    assert_error(api.post(path + "/rotate", json={"overlap": "8d"}, key=KEY), 400, "overlap", "7 days")
    assert_error(api.post(path + "/test", json={"event_type": "x"}, key=KEY), 400, "event_type")
    assert api.get(path, key=KEY).json()["url"] == URL


def test_the_scope_is_account(api):
    for method, path in (("GET", OURS), ("POST", OURS), ("GET", OURS + "/we_1"), ("GET", OURS + "/we_1/deliveries")):
        assert api.call(method, path, key="ada:training,inference").status_code == 403
    assert api.get(OURS, key="ada:admin").status_code == 200


def test_an_owner_has_so_many_endpoints_and_no_more(local):
    made = [create(local) for _ in range(3)]
    assert_error(local.post(OURS, json={"url": URL, "event_types": JOBS}, key=KEY), 409, None, "There may be 3")
    assert local.post(OURS, json={"url": URL, "event_types": JOBS}, key="bob:account").status_code == 200
    local.delete(f"{OURS}/{made[0]['id']}", key=KEY)
    create(local)
    page = local.get(OURS + "?limit=2", key=KEY).json()
    rest = local.get(f"{OURS}?limit=2&after={page['last_id']}", key=KEY).json()
    assert [len(page["data"]), page["has_more"], len(rest["data"]), rest["has_more"]] == [2, True, 1, False]


def test_creates_at_once_do_not_go_beyond_the_limit(local):
    def one(_: int) -> int:
        return local.post(OURS, json={"url": URL, "event_types": JOBS}, key=KEY).status_code

    with ThreadPoolExecutor(8) as pool:
        statuses = list(pool.map(one, range(8)))
    assert sorted(statuses) == [200] * 3 + [409] * 5
    assert len(local.store.records.webhook_endpoints.query()) == 3


def test_a_create_that_is_sent_again_makes_one_endpoint_and_tells_the_same_secret(api):
    body = {"url": URL, "event_types": JOBS}
    first = api.post(OURS, json=body, key=KEY).json()
    again = api.post(OURS, json=body, key=KEY, headers={"x-stainless-retry-count": "1"}).json()
    assert again == first
    assert len(api.store.records.webhook_endpoints.query()) == 1
    keyed = [api.post(OURS, json=body, key=KEY, headers={"idempotency-key": "k"}).json()["id"] for _ in range(2)]
    assert keyed[0] == keyed[1] != first["id"]


@pytest.mark.parametrize("overlap", ["8d", -1, "", 1.5, True, [], "soon"])
def test_a_wrong_overlap_is_named(api, overlap):
    made = create(api)
    assert_error(api.post(f"{OURS}/{made['id']}/rotate", json={"overlap": overlap}, key=KEY), 400, "overlap")
    assert api.get(f"{OURS}/{made['id']}", key=KEY).json()["signing_secret_hint"] == made["signing_secret_hint"]


def test_a_rotation_that_is_sent_again_rotates_once(api):
    made = create(api)
    path = f"{OURS}/{made['id']}/rotate"
    first = api.post(path, json={}, key=KEY).json()
    again = api.post(path, json={}, key=KEY, headers={"x-stainless-retry-count": "1"}).json()
    assert first["signing_secret"] == again["signing_secret"] != made["signing_secret"]
    endpoint = api.store.records.webhook_endpoints.get(made["id"]).value
    vault = open_vault(api.settings)
    assert vault.secrets_of(endpoint, time.time()) == [first["signing_secret"], made["signing_secret"]]
    assert vault.secrets_of(endpoint, time.time() + 24 * 3600) == [first["signing_secret"]]
    second = api.post(path, json={"overlap": "1h"}, key=KEY).json()
    endpoint = api.store.records.webhook_endpoints.get(made["id"]).value
    three = [each["signing_secret"] for each in (second, first, made)]
    assert vault.secrets_of(endpoint, time.time()) == three, "each signs for as long as it was said to"
    assert vault.secrets_of(endpoint, time.time() + 2 * 3600) == [three[0], three[2]]
    for _ in range(5):
        newest = api.post(path, json={}, key=KEY).json()
    assert newest["tuneloom"]["old_secret_until"] == pytest.approx(time.time() + 24 * 3600, abs=300)
    assert len(vault.secrets_of(api.store.records.webhook_endpoints.get(made["id"]).value, time.time())) == 5
    at_once = api.post(path, json={"overlap": 0}, key=KEY).json()
    endpoint = api.store.records.webhook_endpoints.get(made["id"]).value
    assert vault.secrets_of(endpoint, time.time()) == [at_once["signing_secret"]]


def test_deliveries_are_listed_by_state_and_replayed(local):
    control = Control(local)
    with receiver(answers(500, b"broken")) as seen:
        made = create(local, url=seen.url, event_types=["fine_tuning.job.cancelled"])
        log = f"{OURS}/{made['id']}/deliveries"
        for _ in range(3):
            job = local.create_job(key="ada:training")
            local.post(f"/v1/fine_tuning/jobs/{job['id']}/cancel")
        for _ in range(4):
            control.tick()
        delivered = local.get(log + "?state=delivered", key=KEY).json()
        (pending,) = local.get(log + "?state=pending", key=KEY).json()["data"]
        assert len(delivered["data"]) == 2 and len(local.get(log, key=KEY).json()["data"]) == 3
        assert (pending["attempts"], pending["tries"][0]["status"], pending["tries"][0]["response"]) == (
            1,
            500,
            "broken",
        )
        assert pending["next_attempt_at"] > time.time() and pending["payload"]["type"] == "fine_tuning.job.cancelled"
        page = local.get(log + "?limit=2", key=KEY).json()
        rest = local.get(f"{log}?limit=2&after={page['last_id']}", key=KEY).json()
        assert page["has_more"] and len({row["id"] for row in page["data"] + rest["data"]}) == 3

        again = local.post(f"{log}/{pending['id']}/replay", key=KEY).json()
        assert (again["state"], again["attempts"]) == ("pending", 0)
        replayed = local.post(f"{log}/{delivered['data'][0]['id']}/replay", key=KEY).json()
        for _ in range(2):
            control.tick()
        for id in (again["id"], replayed["id"]):
            row = local.get(f"{log}/{id}", key=KEY).json()
            assert row["state"] == "delivered" and len(row["tries"]) == 2
        ids = [request.headers["webhook-id"] for request in seen.seen]
        assert ids.count(again["id"]) == ids.count(replayed["id"]) == 2, "a replay keeps its id"
    assert_error(local.post(f"{log}/wh_none/replay", key=KEY), 404, "delivery")
    assert_error(local.get(log + "?state=lost", key=KEY), 400, "state")
    local.post(f"{OURS}/{made['id']}", json={"enabled": False}, key=KEY)
    assert_error(local.post(f"{log}/{again['id']}/replay", key=KEY), 409, None, "disabled")
    replays = [e.value for e in local.store.records.audit_entries.query() if e.value.action.endswith(".replayed")]
    assert {entry.data["delivery_id"] for entry in replays} == {again["id"], replayed["id"]}


@pytest.fixture
def client(local) -> openai.OpenAI:
    transport = httpx2.Client(transport=local.client._transport, base_url="http://tuneloom")
    return openai.OpenAI(api_key=KEY, base_url="http://tuneloom/v1", http_client=transport, max_retries=0)


def test_the_openai_client_manages_its_endpoints(local, client):
    """Create, rotate, test and receive by the plain client; its own test waits for what the receiver says."""
    stop, control = threading.Event(), Control(local)

    def run() -> None:
        while not stop.wait(0.02):
            control.tick()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        with receiver(answers(200), answers(418), closes) as seen:
            made = client.webhooks.create(url=seen.url, event_types=JOBS, name="mine")
            assert client.webhooks.retrieve(made.id).url == seen.url
            assert [endpoint.id for endpoint in client.webhooks.list()] == [made.id]
            assert client.webhooks.event_types.list().data == list(EVENT_TYPES)
            assert client.webhooks.update(made.id, name="other").name == "other"
            result = client.webhooks.test(made.id, event_type="fine_tuning.job.failed")
            assert (result.status_code, result.event_type) == (200, "fine_tuning.job.failed")
            rotated = client.webhooks.rotate_secret(made.id, keep_old_secret_active_for_24_hours=True)
            assert client.webhooks.test(made.id, event_type="fine_tuning.job.failed").status_code == 418
            with pytest.raises(openai.BadRequestError, match="got no answer") as caught:
                client.webhooks.test(made.id, event_type="fine_tuning.job.failed")
            assert caught.value.code == "webhook_unreachable"
            first, second, _ = seen.seen
            assert client.webhooks.unwrap(first.body, first.headers, secret=made.signing_secret).data.id == "ftjob-test"
            for secret in (made.signing_secret, rotated.signing_secret):
                client.webhooks.verify_signature(second.body, second.headers, secret=secret)
            assert client.webhooks.delete(made.id).deleted
    finally:
        stop.set()
        thread.join(20)
    assert len(seen.seen) == 3, "a test is tried once"
    tested = [e.value for e in local.store.records.audit_entries.query() if e.value.action.endswith(".tested")]
    assert [entry.target.id for entry in tested] == [made.id] * 3


def test_keys_that_cannot_be_read_are_the_services_fault(api, store, tmp_path, caplog):
    webhooks = WebhookSettings(key_file=tmp_path / "none")
    broken = Api(store, api.settings.model_copy(update={"webhooks": webhooks}))
    response = broken.post(OURS, json={"url": URL, "event_types": JOBS}, key=KEY)
    assert response.status_code == 500 and str(tmp_path) not in response.text
    assert "`webhooks.key_file`" in caplog.text and str(tmp_path) in caplog.text
    (tmp_path / "none").write_text(" \n")
    assert broken.post(OURS, json={"url": URL, "event_types": JOBS}, key=KEY).status_code == 500


def test_a_key_file_of_the_settings_is_used_and_a_new_key_goes_first(api, store, tmp_path):
    key = open_key(api.settings)
    assert (tmp_path / "webhook-key").stat().st_mode & 0o777 == 0o600
    made = create(api)
    path = tmp_path / "keys"
    path.write_bytes(b"\n".join([open_key(Settings(home=tmp_path / "other")), key]))
    moved = Api(store, api.settings.model_copy(update={"webhooks": WebhookSettings(key_file=path)}))
    endpoint = moved.store.records.webhook_endpoints.get(made["id"]).value
    assert open_vault(moved.settings).secrets_of(endpoint, time.time()) == [made["signing_secret"]]


def open_key(settings: Settings) -> bytes:
    (key,) = read_webhook_keys(settings)
    return key
