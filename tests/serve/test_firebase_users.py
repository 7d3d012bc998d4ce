"""Whether users are still welcome: seen within the interval, asked for once, through outages."""

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization

from tests.serve.google import Clock, Google, claims, id_token, make_people, private_key, sign, sign_in
from tuneloom.errors import Overloaded, Unauthenticated
from tuneloom.serve import firebase_users
from tuneloom.serve.firebase import open_http
from tuneloom.serve.firebase_clock import GoogleClock
from tuneloom.serve.firebase_users import GoogleCredentials, Users

pytestmark = pytest.mark.anyio


def make_users(google: Google, monotonic: Clock, headers: Any = firebase_users.emulator_headers) -> Users:
    return Users(open_http(), google.url("lookup"), headers, GoogleClock(), check_s=30, monotonic=monotonic)


async def test_a_users_end_is_seen_within_the_interval(google: Google) -> None:
    monotonic = Clock()
    people = make_people(google, users=make_users(google, monotonic))
    ends = {
        "revoked_id_token": {"validSince": str(int(time.time()) + 1)},
        "user_disabled": {"disabled": True},
        "user_not_found": None,
    }
    for code, state in ends.items():
        google.users["uid1"] = {"validSince": str(int(time.time()) - 60)}
        monotonic.now += 30
        for _ in range(3):
            assert (await sign_in(people, id_token())).owner == "uid1"
        hits = google.hits["/lookup"]
        if state is None:
            del google.users["uid1"]
        else:
            google.users["uid1"] = state
        monotonic.now += 29.9
        await sign_in(people, id_token())
        assert google.hits["/lookup"] == hits
        monotonic.now += 0.1
        with pytest.raises(Unauthenticated) as refused:
            await sign_in(people, id_token())
        assert refused.value.code == code


async def test_a_token_issued_after_a_revocation_works(google: Google) -> None:
    now = int(time.time())
    google.users["uid1"] = {"validSince": str(now - 5)}
    people = make_people(google, users=make_users(google, Clock()))
    assert (await sign_in(people, id_token(iat=now - 5, auth_time=now - 500))).owner == "uid1"
    with pytest.raises(Unauthenticated, match="revoked"):
        await sign_in(people, id_token(iat=now - 6))


async def test_a_hundred_requests_of_a_user_make_one_lookup(google: Google) -> None:
    google.users["uid1"] = {}
    google.delay_s = 0.1
    people = make_people(google, users=make_users(google, Clock()))
    await asyncio.gather(*(sign_in(people, id_token()) for _ in range(100)))
    assert google.hits == {"/certs": 1, "/lookup": 1}


async def test_a_bad_token_asks_for_no_user(google: Google) -> None:
    people = make_people(google, users=make_users(google, Clock()))
    with pytest.raises(Unauthenticated):
        await sign_in(people, sign(claims(), key=private_key("k2")))
    assert google.hits == {"/certs": 1}


async def test_an_outage_of_lookups_is_bridged_for_a_minute_after_the_last_answer(google: Google) -> None:
    monotonic = Clock()
    google.users["uid1"] = {}
    people = make_people(google, users=make_users(google, monotonic))
    await sign_in(people, id_token())
    google.status = 500
    monotonic.now += 30
    for _ in range(5):
        await sign_in(people, id_token())
    assert google.hits["/lookup"] == 2
    # Whom nobody has seen yet may be anybody.
    with pytest.raises(Overloaded):
        await sign_in(people, id_token(sub="uid2"))
    monotonic.now += 29.9
    await sign_in(people, id_token())
    monotonic.now += 0.1
    with pytest.raises(Overloaded) as refused:
        await sign_in(people, id_token())
    assert refused.value.retry_after_s
    google.status = 200
    monotonic.now += firebase_users.RETRY_S
    await sign_in(people, id_token())


async def test_a_user_who_is_revoked_in_an_outage_is_out_within_a_minute(google: Google) -> None:
    monotonic = Clock()
    google.users["uid1"] = {}
    people = make_people(google, users=make_users(google, monotonic))
    await sign_in(people, id_token())
    google.users["uid1"] = {"disabled": True}
    google.status = 500
    answers = []
    for _ in range(12):
        monotonic.now += 5
        try:
            await sign_in(people, id_token())
            answers.append(200)
        except (Overloaded, Unauthenticated) as error:
            answers.append(error.status)
    assert answers[:5] == [200] * 5 and answers[-1] == 503
    google.status = 200
    monotonic.now += firebase_users.RETRY_S
    with pytest.raises(Unauthenticated, match="disabled"):
        await sign_in(people, id_token())


async def test_lookups_that_hang_are_given_up(google: Google, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(firebase_users, "LOOKUP_TIMEOUT_S", 0.2)
    users = make_users(google, Clock())
    google.delay_s = 1.0
    with pytest.raises(Overloaded):
        await users.check("uid1", 1)
    with pytest.raises(Overloaded):
        await users.check("uid2", 1)
    # The second was not even asked.
    assert google.hits == {"/lookup": 1}


async def test_what_is_remembered_of_users_is_bounded(google: Google, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(firebase_users, "MAX_CACHED", 2)
    google.users = {"a": {}, "b": {}, "c": {}}
    users = make_users(google, Clock())
    for uid in "abcca":
        await users.check(uid, 1)
    assert google.hits["/lookup"] == 4


async def test_lookups_prove_who_asks_by_the_default_credentials(
    google: Google, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    form, plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    account = {
        "type": "service_account",
        "client_email": "tuneloom@example.iam.gserviceaccount.com",
        "private_key": private_key("k3").private_bytes(serialization.Encoding.PEM, form, plain).decode(),
        "token_uri": google.url("token"),
    }
    path = tmp_path / "account.json"
    path.write_text(json.dumps(account))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(path))
    google.users = {"a": {}, "b": {}}
    users = make_users(google, Clock(), GoogleCredentials())
    await asyncio.gather(users.check("a", 1), users.check("b", 1))
    assert google.authorizations == ["Bearer t1", "Bearer t1"]
    assert google.hits["/token"] == 1


async def test_without_credentials_the_log_says_what_is_missing(
    google: Google, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "absent.json"))
    with pytest.raises(Overloaded):
        await make_users(google, Clock(), GoogleCredentials()).check("a", 1)
    assert "roles/firebaseauth.viewer" in caplog.text and "absent.json" in caplog.text
