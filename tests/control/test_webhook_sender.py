"""What a delivery looks like to a receiver, and what a receiver can do to the one who sends it."""

import base64
import time

import openai
import pytest

from tests.control.receivers import (
    Authority,
    answers,
    closes,
    drips_body,
    drips_headers,
    floods,
    hangs,
    receiver,
)
from tests.control.test_outbox import add_endpoint
from tuneloom.config import WebhookSettings
from tuneloom.control import outbox
from tuneloom.control.webhook_secrets import Vault, hint, new_secret, signature
from tuneloom.control.webhook_sender import JITTER, MAX_RETRY_AFTER_S, PAUSES_S, Outcome, Sender, pause_s
from tuneloom.domain import OldSecret, WebhookDelivery
from tuneloom.errors import InvalidRequest, TuneloomError

# Those who answer get time on a busy machine; those who never do are waited for briefly.
LOCAL = WebhookSettings(allow_private=True, timeout_s=20)
TIMEOUT_S = 0.5
HASTY = WebhookSettings(allow_private=True, timeout_s=TIMEOUT_S)
SECRET = new_secret()
DATA = {"id": "ftjob-1", "tuneloom": {"model": "tiny/llama", "version": "bot@v1", "note": "ü€𝄞"}}


@pytest.fixture
def delivery(store) -> WebhookDelivery:
    return outbox.delivery(add_endpoint(store), "fine_tuning.job.succeeded", DATA, time.time())


def send(url: str, delivery: WebhookDelivery, *secrets: str, settings: WebhookSettings = LOCAL, **options) -> Outcome:
    return Sender(settings, **options).send(url, delivery, secrets or [SECRET])


def test_the_openai_client_verifies_and_parses_what_is_sent(delivery):
    with receiver() as seen:
        outcome = send(seen.url, delivery)
    assert outcome.is_success and (outcome.tried.status, outcome.tried.response) == (200, "ok")
    (request,) = seen.seen
    client = openai.OpenAI(api_key="none", webhook_secret=SECRET)
    event = client.webhooks.unwrap(request.body, request.headers)
    assert type(event).__name__ == "FineTuningJobSucceededWebhookEvent"
    assert (event.id, event.data.id, event.object) == (delivery.event_id, "ftjob-1", "event")
    assert event.data.tuneloom["note"] == "ü€𝄞"
    assert request.headers["webhook-id"] == delivery.id
    assert request.headers["content-type"] == "application/json"
    assert request.headers["user-agent"].startswith("tuneloom/")


@pytest.mark.parametrize("spoil", ["body", "id", "timestamp", "secret"])
def test_the_client_refuses_what_was_changed_on_the_way(delivery, spoil):
    with receiver() as seen:
        send(seen.url, delivery)
    headers, body, secret = dict(seen.seen[0].headers), seen.seen[0].body, SECRET
    match spoil:
        case "body":
            body = body.replace(b"ftjob-1", b"ftjob-2")
        case "id":
            headers["webhook-id"] += "x"
        case "timestamp":
            headers["webhook-timestamp"] = str(int(headers["webhook-timestamp"]) + 1)
        case "secret":
            secret = new_secret()
    with pytest.raises(openai.InvalidWebhookSignatureError):
        openai.OpenAI(api_key="none").webhooks.verify_signature(body, headers, secret=secret)


def test_each_try_has_a_new_time_and_the_same_id_and_bytes(delivery):
    clock = iter([1_000_000.0, 1_000_300.0])
    with receiver() as seen:
        sender = Sender(LOCAL, clock=lambda: next(clock))
        sender.send(seen.url, delivery, [SECRET])
        sender.send(seen.url, delivery, [SECRET])
    first, second = seen.seen
    assert first.body == second.body == delivery.body.encode()
    assert first.headers["webhook-id"] == second.headers["webhook-id"]
    assert first.headers["webhook-timestamp"] == "1000000" and second.headers["webhook-timestamp"] == "1000300"
    assert first.headers["webhook-signature"] != second.headers["webhook-signature"]


def test_during_a_rotation_either_secret_verifies(delivery):
    new, other = new_secret(), new_secret()
    with receiver() as seen:
        send(seen.url, delivery, new, SECRET)
    (request,) = seen.seen
    client = openai.OpenAI(api_key="none")
    for secret in (new, SECRET):
        client.webhooks.verify_signature(request.body, request.headers, secret=secret)
    with pytest.raises(openai.InvalidWebhookSignatureError):
        client.webhooks.verify_signature(request.body, request.headers, secret=other)


def test_the_signature_is_that_of_standard_webhooks():
    """The vector in the tests of its reference libraries."""
    secret, id, timestamp = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330
    expected = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
    assert signature(secret, id, timestamp, b'{"test": 2432232314}') == expected


def test_a_secret_is_32_bytes_and_its_hint_gives_little_away():
    secret = new_secret()
    assert secret.startswith("whsec_") and len(base64.b64decode(secret[6:])) == 32
    assert hint(secret) == f"whsec_...{secret[-4:]}"


def test_secrets_are_opened_by_any_key_and_sealed_by_the_first(store):
    old, new = (base64.urlsafe_b64encode(bytes([n]) * 32) for n in (1, 2))
    sealed = Vault([old]).seal(SECRET)
    assert SECRET not in sealed
    assert Vault([new, old]).open(sealed) == SECRET
    assert Vault([new]).open(Vault([new, old]).seal(SECRET)) == SECRET
    with pytest.raises(TuneloomError, match="cannot be decrypted"):
        Vault([new]).open(sealed)
    with pytest.raises(InvalidRequest, match="32 bytes"):
        Vault([b"short"])
    vault = Vault([old])
    endpoint = add_endpoint(store)
    endpoint = endpoint.model_copy(
        update={"secret": sealed, "old_secrets": (OldSecret(secret=vault.seal("whsec_old"), until=10.0),)}
    )
    assert vault.secrets_of(endpoint, 9.9) == [SECRET, "whsec_old"]
    assert vault.secrets_of(endpoint, 10.0) == [SECRET]


@pytest.mark.parametrize("status", [200, 201, 202, 204, 299])
def test_only_2xx_is_success(delivery, status):
    with receiver(answers(status)) as seen:
        assert send(seen.url, delivery).is_success


@pytest.mark.parametrize("status", [304, 400, 401, 404, 410, 418, 429, 500, 503])
def test_all_else_is_a_failure(delivery, status):
    with receiver(answers(status, b"why")) as seen:
        outcome = send(seen.url, delivery)
    assert not outcome.is_success and outcome.is_gone == (status == 410)
    assert outcome.tried.error and str(status) in outcome.tried.error and outcome.tried.status == status


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_inward_is_a_failure_and_not_followed(delivery, status):
    with receiver() as inside, receiver(answers(status, location=inside.url)) as seen:
        outcome = send(seen.url, delivery)
    assert inside.seen == [] and len(seen.seen) == 1
    assert "not followed" in outcome.tried.error


@pytest.mark.parametrize("behave", [hangs, drips_headers])
def test_a_receiver_that_hangs_or_drips_is_left_at_the_deadline(delivery, behave):
    with receiver(behave) as seen:
        outcome = send(seen.url, delivery, settings=HASTY)
    assert outcome.tried.error == f"No answer within {TIMEOUT_S:g} s."
    assert TIMEOUT_S <= outcome.tried.seconds < TIMEOUT_S + 10


@pytest.mark.parametrize("behave", [drips_body, floods])
def test_a_body_without_end_is_cut_and_its_status_counts(delivery, behave):
    with receiver(behave) as seen:
        outcome = send(seen.url, delivery, settings=WebhookSettings(allow_private=True, timeout_s=3))
    assert outcome.is_success and len(outcome.tried.response) <= 1000
    assert outcome.tried.seconds < 13


def test_a_receiver_that_never_shakes_hands_is_left_too(delivery):
    """It accepts the connection and does not speak TLS."""
    authority = Authority()
    with receiver() as seen:
        url = f"https://hooks.example.com:{seen.port}/"
        outcome = send(url, delivery, tls=authority.trusting(), resolve=lambda *_: ["127.0.0.1"], settings=HASTY)
    assert not outcome.is_success and seen.seen == []


def test_a_closed_connection_and_a_closed_port_are_failures(delivery):
    with receiver(closes) as seen:
        outcome = send(seen.url, delivery)
    assert outcome.tried.status is None and "connection failed" in outcome.tried.error
    outcome = send(seen.url, delivery)
    assert "refused" in outcome.tried.error


def test_a_wrong_certificate_is_named(delivery):
    authority = Authority()
    with receiver(tls=authority.server("other.example.com")) as seen:
        url = f"https://hooks.example.com:{seen.port}/"
        outcome = send(url, delivery, tls=authority.trusting(), resolve=lambda *_: ["127.0.0.1"])
    assert "certificate" in outcome.tried.error and "hooks.example.com" in outcome.tried.error
    assert seen.seen == []


def test_an_address_inside_is_a_failure_that_tells_nothing(delivery):
    with receiver() as seen:
        url = f"https://hooks.example.com:{seen.port}/"
        outcome = Sender(WebhookSettings(), resolve=lambda *_: ["127.0.0.1"]).send(url, delivery, [SECRET])
    assert seen.seen == [] and outcome.tried.status is None
    assert outcome.tried.error == "The host of the URL does not resolve to a public address."


@pytest.mark.parametrize(
    ("status", "text", "seconds"),
    [
        (429, "120", 120),
        (503, " 7 ", 7),
        (502, "Thu, 01 Jan 1970 00:20:00 GMT", 200),
        (504, "Thu, 01 Jan 1970 00:00:01 GMT", 0),
        (503, "99999999999", MAX_RETRY_AFTER_S),
        (503, "Fri, 31 Dec 9999 23:59:59 GMT", MAX_RETRY_AFTER_S),
        (503, "soon", 0),
        (503, "-5", 0),
        (500, "120", 0),
    ],
)
def test_retry_after_is_honoured_within_bounds(delivery, status, text, seconds):
    with receiver(answers(status, retry_after=text)) as seen:
        assert send(seen.url, delivery, clock=lambda: 1000.0).retry_after_s == seconds


def test_the_schedule_is_that_of_standard_webhooks_with_jitter():
    hours = [5 / 3600, 1 / 12, 0.5, 2, 5, 10, 14, 20, 24]
    assert [pause_s(n, draw=lambda: 0.5) / 3600 for n in range(1, 10)] == pytest.approx(hours)
    assert pause_s(10) is None
    for n, pause in enumerate(PAUSES_S, 1):
        drawn = {pause_s(n) for _ in range(20)}
        assert len(drawn) > 1 and all(abs(each - pause) <= JITTER * pause for each in drawn)
    assert pause_s(1, 60.0) == 60.0 and pause_s(9, 60.0) > 70_000
