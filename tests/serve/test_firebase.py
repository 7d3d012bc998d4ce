"""Signing in by ID tokens, with keys and a certificate server of our own: what is let in, as whom, and what is not."""

import base64
import hashlib
import hmac
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization

from tests.serve import google as fake
from tests.serve.conftest import BASE, PEPPER, FakeBase, Service
from tests.serve.google import (
    PROJECT,
    Google,
    claims,
    id_token,
    identity,
    make_people,
    private_key,
    sign,
    sign_in,
    unsigned,
)
from tuneloom.config import BaseSettings, IdentitySettings, Settings
from tuneloom.errors import PermissionDenied, Unauthenticated
from tuneloom.serve import firebase_keys
from tuneloom.serve.firebase import open_people
from tuneloom.serve.ingress import Context, make_app
from tuneloom.store import Store

pytestmark = pytest.mark.anyio


def make_service(store: Store, settings: Settings, google: Google, **more: Any) -> Service:
    settings = settings.model_copy(update={"identity": identity(google, **more)})
    base = FakeBase()
    people = open_people(settings, {})
    app = make_app(Context(settings, store, PEPPER, lambda _: base, lambda: None, people))
    return Service(settings, store, base, app, [])


def signed_json(payload: Any, raw: bytes | None = None) -> str:
    """Well signed, whatever it says."""
    data = json.dumps(payload).encode() if raw is None else raw
    return jwt.PyJWS().encode(data, private_key("k1"), "RS256", {"kid": "k1"})


def deep_header() -> str:
    return base64.urlsafe_b64encode(b"[" * 5000).decode().rstrip("=") + ".e30.AAAA"


def public_pem() -> bytes:
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return private_key("k1").public_key().public_bytes(serialization.Encoding.PEM, form)


def hs256_with_the_public_key() -> str:
    """The classic: the verifier takes its public key for a shared secret. Libraries refuse to make such a token."""
    body = unsigned(claims(), {"alg": "HS256", "typ": "JWT", "kid": "k1"}).rstrip(".")
    mac = hmac.new(public_pem(), body.encode(), hashlib.sha256).digest()
    return f"{body}.{base64.urlsafe_b64encode(mac).decode().rstrip('=')}"


BAD = {
    "another key": (lambda: sign(claims(), key=private_key("k2")), "signature is wrong"),
    "unknown key id": (lambda: sign(claims(), kid="k9", key=private_key("k2")), "key that Google does not have"),
    "no key id": (lambda: sign(claims(), kid=None), "not signed with RS256"),
    "alg none": (lambda: unsigned(claims(), {"alg": "none", "typ": "JWT", "kid": "k1"}), "not signed with RS256"),
    "the emulator's": (lambda: unsigned(claims(), {"alg": "none", "typ": "JWT"}), "not signed with RS256"),
    "HS256 with the public key": (hs256_with_the_public_key, "not signed with RS256"),
    "RS512": (lambda: sign(claims(), algorithm="RS512"), "not signed with RS256"),
    "RS256 without signature": (lambda: unsigned(claims(), {"alg": "RS256", "kid": "k1"}), "signature is wrong"),
    "changed": (lambda: id_token()[:-10] + "A" * 10, "signature is wrong"),
    "another audience": (lambda: id_token(aud="tuneloom-test"), "another project"),
    "another issuer": (lambda: id_token(iss="https://accounts.google.com"), "another project"),
    "an issuer that only begins so": (
        lambda: id_token(iss=f"https://securetoken.google.com/{PROJECT}.evil"),
        "another project",
    ),
    "an audience of two": (lambda: id_token(aud=[PROJECT, "tuneloom-test"]), "another project"),
    "no audience": (lambda: id_token(aud=None), "another project"),
    "no subject": (lambda: id_token(sub=None), "whose it is"),
    "empty subject": (lambda: id_token(sub=""), "whose it is"),
    "long subject": (lambda: id_token(sub="u" * 129), "whose it is"),
    "a subject that is a number": (lambda: signed_json({**claims(), "sub": 7}), "whose it is"),
    "no end": (lambda: id_token(exp=None), "when it holds"),
    "an end that is text": (lambda: signed_json({**claims(), "exp": "9999999999"}), "when it holds"),
    "an end that is endless": (lambda: signed_json({**claims(), "exp": float("inf")}), "when it holds"),
    "no sign-in": (lambda: id_token(auth_time=None), "when it holds"),
    "expired": (lambda: id_token(exp=int(time.time()) - 11), "has expired. Sign in again"),
    "not yet valid": (lambda: id_token(iat=int(time.time()) + 30), "not valid yet"),
    "signed in later": (lambda: id_token(auth_time=int(time.time()) + 30), "not valid yet"),
    "huge": (lambda: id_token(filler="x" * 9000), "not a JSON Web Token"),
    "deep header": (lambda: "eyJ" + deep_header(), "cannot be read"),
    "a list": (lambda: signed_json([1]), "cannot be read"),
    "deep claims": (lambda: signed_json(None, raw=b"[" * 5000), "cannot be read"),
    "other letters": (lambda: "eyJ\x41é.b.c", "not a JSON Web Token"),
}


@pytest.mark.parametrize("make, reason", BAD.values(), ids=BAD.keys())
async def test_a_bad_token_is_a_401_that_does_not_repeat_it(store, settings, google, make, reason) -> None:
    token = make()
    service = make_service(store, settings, google)
    async with service.http() as http:
        sent = {"authorization": b"Bearer " + token.encode("latin-1")}
        answer = await http.get("/v1/models", headers=sent)

    assert answer.status_code == 401, answer.text
    error = answer.json()["error"]
    assert reason in error["message"] and error["type"] == "invalid_request_error"
    assert error["code"] == ("expired_id_token" if "expired" in reason else "invalid_id_token")
    assert not any(part and part in answer.text for part in token.split(".") if len(part) > 7)


async def test_a_person_calls_as_with_a_key(store: Store, settings: Settings, google: Google) -> None:
    service = make_service(store, settings, google)
    async with service.openai(id_token()) as client:
        answer = await client.chat.completions.create(model=BASE, messages=[{"role": "user", "content": "hi"}])
        assert answer.choices[0].message.content == "Hello"
        file = await client.files.create(file=("a.jsonl", b"{}\n"), purpose="fine-tune")
    assert service.base.requests[0].owner == "uid1"
    stored = store.records.files.find(file.id)
    assert stored is not None and stored.value.owner == "uid1"


async def test_api_keys_work_beside_tokens(store: Store, settings: Settings, google: Google) -> None:
    service = make_service(store, settings, google)
    async with service.http(service.key()) as http:
        assert (await http.get("/v1/models")).status_code == 200
    assert google.hits == {}


async def test_without_a_project_a_token_is_a_wrong_key_as_ever(service: Service) -> None:
    assert open_people(service.settings, {"FIREBASE_AUTH_EMULATOR_HOST": "127.0.0.1:1"}) is None
    async with service.http(id_token()) as http:
        answer = await http.get("/v1/models")
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")


@pytest.mark.parametrize("fault", ["status", "garbage", "empty", "refused", "hangs"])
async def test_an_outage_without_certificates_is_a_503_and_never_a_401(
    store, settings, google, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr(firebase_keys, "FETCH_TIMEOUT_S", 0.3)
    if fault == "status":
        google.status = 503
    elif fault in ("garbage", "empty"):
        google.certificates = {"k1": "no certificate"} if fault == "garbage" else {}
    elif fault == "hangs":
        google.delay_s = 1.0
    else:
        google = replace(google, port=1)
    service = make_service(store, settings, google)
    async with service.http(id_token()) as http:
        for _ in range(3):
            answer = await http.get("/v1/models")
            assert answer.status_code == 503, answer.text
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.json()["error"]["code"] == "overloaded"
    assert google.hits.get("/certs", 0) <= 1


async def test_scopes_of_people(google: Google) -> None:
    people = make_people(google, admins=("root1", "Boss@Example.com"))
    anonymous = {"sign_in_provider": "anonymous", "identities": {}}

    person = await sign_in(people, id_token())
    assert (person.owner, person.kind, person.key_id, person.email) == ("uid1", "person", "", "ada@example.com")
    assert person.scopes == ("inference", "training", "account")
    guest = await sign_in(people, id_token(email=None, email_verified=None, firebase=anonymous))
    assert (guest.owner, guest.kind, guest.scopes) == ("uid1", "anonymous", ("inference", "training"))
    with pytest.raises(PermissionDenied, match="Anonymous accounts lack the scope `account`"):
        guest.require("account")
    with pytest.raises(PermissionDenied, match="Your account lacks the scope `admin`"):
        person.require("admin")

    assert "admin" in (await sign_in(people, id_token(sub="root1"))).scopes
    assert "admin" in (await sign_in(people, id_token(email="boss@example.COM"))).scopes
    assert "admin" not in (await sign_in(people, id_token(email="boss@example.com", email_verified=False))).scopes
    assert "admin" not in (await sign_in(people, id_token(email="boss@example.com", email_verified="true"))).scopes
    assert "admin" not in (await sign_in(people, id_token(sub="root1", firebase=anonymous))).scopes
    # A claim of the token makes nobody an administrator.
    assert "admin" not in (await sign_in(people, id_token(admin=True, scopes=["admin"]))).scopes


async def test_anonymous_accounts_as_the_settings_say(google: Google) -> None:
    guest = id_token(email=None, firebase={"sign_in_provider": "anonymous"})
    fewer = make_people(google, anonymous_scopes=("inference",))
    assert (await sign_in(fewer, guest)).scopes == ("inference",)
    with pytest.raises(PermissionDenied, match="Anonymous accounts are not let in"):
        await sign_in(make_people(google, anonymous=False), guest)


async def test_domains_let_in_only_verified_addresses(google: Google) -> None:
    people = make_people(google, allowed_domains=("Example.com",))
    assert (await sign_in(people, id_token(email="ada@EXAMPLE.com"))).owner == "uid1"
    for other in (
        {"email": "ada@example.org"},
        {"email": "ada@example.com.evil.org"},
        {"email": "ada@sub.example.com"},
        {"email_verified": False},
        {"email": None},
        {"firebase": {"sign_in_provider": "anonymous"}},
    ):
        with pytest.raises(PermissionDenied):
            await sign_in(people, id_token(**other))


@pytest.mark.parametrize("uid", ["local", "Local", "tuneloom", "a/b", "..", "a b", "-a", "ü"])
async def test_a_uid_that_may_not_own_is_refused(google: Google, uid: str) -> None:
    with pytest.raises(PermissionDenied, match="uid"):
        await sign_in(make_people(google), id_token(sub=uid))


async def test_an_account_of_a_tenant_is_refused(google: Google) -> None:
    with pytest.raises(PermissionDenied, match="tenant"):
        await sign_in(make_people(google), id_token(firebase={"sign_in_provider": "password", "tenant": "t1"}))


APP_CHECK = {"app_check": "required", "app_check_project_number": fake.NUMBER}


async def test_app_check_lets_in_whom_both_tokens_prove(google: Google) -> None:
    people = make_people(google, **APP_CHECK)
    assert (await sign_in(people, id_token(), x_firebase_appcheck=fake.app_token())).owner == "uid1"
    only = make_people(google, **APP_CHECK, app_check_apps=("1:1:web:1",))
    assert (await sign_in(only, id_token(), x_firebase_appcheck=fake.app_token())).owner == "uid1"
    with pytest.raises(Unauthenticated, match="that app"):
        await sign_in(only, id_token(), x_firebase_appcheck=fake.app_token(sub="1:1:web:2"))
    assert (await sign_in(make_people(google), id_token())).owner == "uid1"


@pytest.mark.parametrize(
    "make, code",
    [
        (lambda: fake.app_token("a2"), "invalid_app_check_token"),
        (lambda: fake.app_token(iss="https://firebaseappcheck.googleapis.com/1"), "invalid_app_check_token"),
        (lambda: fake.app_token(aud=["projects/1"]), "invalid_app_check_token"),
        (lambda: fake.app_token(aud=None), "invalid_app_check_token"),
        (lambda: fake.app_token(sub=""), "invalid_app_check_token"),
        (lambda: fake.app_token(exp=int(time.time()) - 20), "expired_app_check_token"),
        (lambda: fake.app_token(iat=int(time.time()) + 60), "invalid_app_check_token"),
        (lambda: unsigned(claims(), {"alg": "none", "typ": "JWT", "kid": "a1"}), "invalid_app_check_token"),
        (id_token, "invalid_app_check_token"),
        (lambda: "x", "invalid_app_check_token"),
        (lambda: None, "missing_app_check_token"),
    ],
)
async def test_a_bad_app_check_token_is_a_401(store, settings, google, make, code: str) -> None:
    service = make_service(store, settings, google, **APP_CHECK)
    token = make()
    async with service.http(id_token()) as http:
        headers = {} if token is None else {"X-Firebase-AppCheck": token}
        answer = await http.get("/v1/models", headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, code)
        assert (await http.get("/v1/models", headers={"X-Firebase-AppCheck": fake.app_token()})).status_code == 200
    # Programs have keys.
    async with service.http(service.key()) as http:
        assert (await http.get("/v1/models")).status_code == 200


async def test_browsers_may_send_an_app_check_token(service: Service) -> None:
    async with service.http() as http:
        asked = {
            "origin": "https://app.example.com",
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization, x-firebase-appcheck",
        }
        answer = await http.options("/v1/chat/completions", headers=asked)
    assert answer.status_code == 200
    assert "x-firebase-appcheck" in answer.headers["access-control-allow-headers"].lower()


async def test_the_emulators_tokens_are_for_its_project_and_time_still(google: Google, tmp_path: Path) -> None:
    project = "demo-tuneloom"
    own = {"aud": project, "iss": f"https://securetoken.google.com/{project}"}
    settings = Settings(
        home=tmp_path,
        bases=(BaseSettings(id=BASE),),
        identity=IdentitySettings(firebase_project=project, revocation_check_s=None),
    )
    people = open_people(settings, {"FIREBASE_AUTH_EMULATOR_HOST": "127.0.0.1:9099"})
    header = {"alg": "none", "typ": "JWT"}
    assert people
    assert (await sign_in(people, unsigned(claims(**own), header))).owner == "uid1"
    for wrong in ({"aud": "demo-other"}, {"iss": "x"}, {"exp": 2}, {"sub": ""}, {"iat": int(time.time()) + 60}):
        with pytest.raises(Unauthenticated):
            await sign_in(people, unsigned(claims(**{**own, **wrong}), header))
    people = open_people(settings, {})
    assert people
    with pytest.raises(Unauthenticated, match="RS256"):
        await sign_in(people, unsigned(claims(**own), header))
