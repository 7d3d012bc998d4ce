"""What tokens are judged by: Google's certificates, through rotation and outages, and Google's time."""

import asyncio
import logging
import time

import pytest

from tests.serve import google as fake
from tests.serve.conftest import eventually, make_service
from tests.serve.google import PROJECT, Clock, Google, claims, id_token, make_people, private_key, sign, sign_in
from tuneloom.config import Settings
from tuneloom.errors import Overloaded, Unauthenticated
from tuneloom.serve import firebase_keys
from tuneloom.serve.firebase import open_http
from tuneloom.serve.firebase_clock import GoogleClock
from tuneloom.serve.firebase_keys import KeySet, parse_certificates
from tuneloom.serve.firebase_tokens import Tokens
from tuneloom.store import Store

pytestmark = pytest.mark.anyio


def cached_tokens(google: Google, monotonic: Clock, clock: GoogleClock | None = None) -> Tokens:
    clock = clock or GoogleClock()
    keys = KeySet(open_http(), google.url("certs"), parse_certificates, clock, what="certificates", monotonic=monotonic)
    issuer = f"https://securetoken.google.com/{PROJECT}"
    return Tokens(keys, clock, issuer=issuer, audience=PROJECT, leeway_s=10, times=("iat", "auth_time"))


async def test_a_hundred_at_once_make_one_fetch(google: Google) -> None:
    google.delay_s = 0.2
    people = make_people(google)
    found = await asyncio.gather(*(sign_in(people, id_token(sub=f"u{i}")) for i in range(100)))
    assert [principal.owner for principal in found] == [f"u{i}" for i in range(100)]
    assert google.hits == {"/certs": 1}


async def test_a_caller_that_leaves_does_not_end_the_fetch_of_the_others(google: Google) -> None:
    google.delay_s = 0.2
    people = make_people(google)
    first, second = (asyncio.create_task(sign_in(people, id_token())) for _ in range(2))
    await asyncio.sleep(0.05)
    first.cancel()
    assert (await second).owner == "uid1"
    assert google.hits == {"/certs": 1}


async def test_certificates_are_kept_for_their_time(google: Google) -> None:
    monotonic = Clock()
    tokens = cached_tokens(google, monotonic)
    google.age_s = 600
    for _ in range(3):
        await tokens.verify(id_token())
    monotonic.now += 2990
    await tokens.verify(id_token())
    assert google.hits == {"/certs": 1}
    # Over: the old ones answer while new ones are fetched.
    monotonic.now += 20
    await tokens.verify(id_token())
    await eventually(lambda: google.hits == {"/certs": 2})


async def test_new_certificates_are_found_by_their_first_token(google: Google) -> None:
    monotonic = Clock()
    tokens = cached_tokens(google, monotonic)
    await tokens.verify(id_token())
    google.certificates = {"k2": fake.certificate("k2")}
    monotonic.now += firebase_keys.RETRY_S
    assert (await tokens.verify(sign(claims(), "k2", private_key("k2"))))["sub"] == "uid1"
    # The old one is withdrawn with that.
    with pytest.raises(Unauthenticated, match="no longer has"):
        await tokens.verify(id_token())


async def test_garbage_does_not_make_fetches(google: Google) -> None:
    monotonic = Clock()
    tokens = cached_tokens(google, monotonic)
    for i in range(50):
        with pytest.raises(Unauthenticated):
            await tokens.verify(sign(claims(), f"k{i + 10}", private_key("k2")))
    assert google.hits == {"/certs": 1}
    monotonic.now += firebase_keys.RETRY_S
    for i in range(50):
        with pytest.raises(Unauthenticated):
            await tokens.verify(sign(claims(), f"k{i + 10}", private_key("k2")))
    assert google.hits == {"/certs": 2}


async def test_an_outage_with_certificates_is_bridged_for_hours(google: Google) -> None:
    monotonic = Clock()
    tokens = cached_tokens(google, monotonic)
    await tokens.verify(id_token())
    google.status = 500
    for _ in range(6):
        monotonic.now += 3600
        await tokens.verify(id_token())
    # A key that may be new cannot be told from garbage now.
    with pytest.raises(Overloaded):
        await tokens.verify(sign(claims(), "k2", private_key("k2")))
    monotonic.now += 3601
    with pytest.raises(Overloaded):
        await tokens.verify(id_token())
    google.status = 200
    monotonic.now += firebase_keys.RETRY_S
    assert (await tokens.verify(id_token()))["sub"] == "uid1"


@pytest.mark.parametrize("ahead_s", [300, -300])
async def test_five_minutes_of_skew_are_allowed_for_and_told(
    google: Google, caplog: pytest.LogCaptureFixture, ahead_s: int
) -> None:
    people = make_people(google, GoogleClock(lambda: time.time() + ahead_s))
    now = int(time.time())
    with caplog.at_level(logging.WARNING):
        # The first second and the last minute of a token.
        assert (await sign_in(people, id_token(iat=now, auth_time=now))).owner == "uid1"
        assert (await sign_in(people, id_token(exp=now + 60))).owner == "uid1"
    with pytest.raises(Unauthenticated, match="expired"):
        await sign_in(people, id_token(exp=now - 20))
    with pytest.raises(Unauthenticated, match="not valid yet"):
        await sign_in(people, id_token(iat=now + 20))
    (record,) = [record for record in caplog.records if "clock" in record.message]
    assert "ahead of" in record.message if ahead_s > 0 else "behind" in record.message
    assert people.warning() == record.message


async def test_a_wrong_clock_is_told_by_readyz_once_it_is_known(
    google: Google, settings: Settings, store: Store
) -> None:
    shift = Clock(0.0)
    people = make_people(google, GoogleClock(lambda: time.time() + shift.now))
    service = make_service(settings, store, people)
    async with service.http() as http:
        await sign_in(people, id_token())
        assert (await http.get("/readyz")).json() == {"status": "ok"}
    shift.now = 300.0
    late = make_people(google, GoogleClock(lambda: time.time() + shift.now))
    service = make_service(settings, store, late)
    async with service.http() as http:
        assert (await http.get("/readyz")).json() == {"status": "ok"}
        await sign_in(late, id_token())
        answer = await http.get("/readyz")
    assert answer.status_code == 200 and "ahead of Google's" in answer.json()["warning"]


@pytest.mark.parametrize("ahead_s, reason", [(7200, "has expired"), (-7200, "not valid yet")])
async def test_a_clock_that_is_wrong_by_hours_is_named(google: Google, ahead_s: int, reason: str) -> None:
    people = make_people(google, GoogleClock(lambda: time.time() + ahead_s))
    where = "ahead of" if ahead_s > 0 else "behind"
    with pytest.raises(Unauthenticated, match=rf"{reason} \(the server's clock is 7[12]\d\d s {where} Google's"):
        await sign_in(people, id_token())


async def test_a_clock_that_jumps_back_is_noticed_by_the_next_token(google: Google) -> None:
    shift = Clock(0.0)
    monotonic = Clock()
    tokens = cached_tokens(google, monotonic, GoogleClock(lambda: time.time() + shift.now))
    await tokens.verify(id_token())
    shift.now = -300.0
    monotonic.now += firebase_keys.RETRY_S
    assert (await tokens.verify(id_token()))["sub"] == "uid1"
    assert google.hits == {"/certs": 2}


async def test_the_leeway_is_the_settings(google: Google) -> None:
    now = int(time.time())
    for token in (id_token(iat=now + 30, auth_time=now + 30), id_token(exp=now - 30)):
        assert (await sign_in(make_people(google, clock_leeway_s=60), token)).owner == "uid1"
        with pytest.raises(Unauthenticated):
            await sign_in(make_people(google, clock_leeway_s=0), token)
