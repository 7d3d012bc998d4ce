"""Signing in with the real flows of Firebase Auth, by Google's emulator, through the whole application."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest
from openai import AsyncOpenAI

from tests.parts.servers import AUTH_PROJECT, Server
from tests.serve.conftest import BASE, PEPPER, FakeBase, Service
from tuneloom.config import IdentitySettings, Settings
from tuneloom.serve.firebase import open_people
from tuneloom.serve.ingress import Context, make_app
from tuneloom.store import Store

pytestmark = pytest.mark.anyio

CHECK_S = 0.3
ADMIN = {"authorization": "Bearer owner"}


class Auth:
    """What a browser does with Firebase's SDK, and an operator in its console."""

    def __init__(self, http: httpx2.AsyncClient) -> None:
        self._http = http

    async def call(self, method: str, **body: Any) -> dict[str, Any]:
        return await self._post(f"/identitytoolkit.googleapis.com/v1/accounts:{method}?key=any", json=body)

    async def manage(self, method: str, **body: Any) -> dict[str, Any]:
        url = f"/identitytoolkit.googleapis.com/v1/projects/{AUTH_PROJECT}/accounts:{method}"
        return await self._post(url, json=body, headers=ADMIN)

    async def sign_up(self, email: str | None = None) -> dict[str, Any]:
        account = {"email": email, "password": "secret12"} if email else {}
        return await self.call("signUp", **account, returnSecureToken=True)

    async def refresh(self, session: dict[str, Any]) -> str:
        sent = {"grant_type": "refresh_token", "refresh_token": session["refreshToken"]}
        return (await self._post("/securetoken.googleapis.com/v1/token?key=any", data=sent))["id_token"]

    async def _post(self, url: str, **options: Any) -> dict[str, Any]:
        answer = await self._http.post(url, **options)
        assert answer.status_code == 200, answer.text
        return answer.json()


@pytest.fixture
async def auth(auth_server: Server) -> AsyncIterator[Auth]:
    async with httpx2.AsyncClient(base_url=f"http://{auth_server.address}", timeout=20, trust_env=False) as http:
        await http.delete(f"/emulator/v1/projects/{AUTH_PROJECT}/accounts", headers=ADMIN)
        yield Auth(http)


@pytest.fixture
def service(settings: Settings, store: Store, auth_server: Server) -> Service:
    identity = IdentitySettings(firebase_project=AUTH_PROJECT, revocation_check_s=CHECK_S, admins=("boss@example.com",))
    settings = settings.model_copy(update={"identity": identity})
    people = open_people(settings, {"FIREBASE_AUTH_EMULATOR_HOST": auth_server.address})
    base = FakeBase()
    app = make_app(Context(settings, store, PEPPER, lambda _: base, lambda: None, people))
    return Service(settings, store, base, app, [])


async def test_a_person_signs_up_signs_in_and_goes_on_with_a_refreshed_token(service: Service, auth: Auth) -> None:
    up = await auth.sign_up("ada@example.com")
    again = await auth.call("signInWithPassword", email="ada@example.com", password="secret12", returnSecureToken=True)
    for token in (up["idToken"], again["idToken"], await auth.refresh(up)):
        async with service.openai(token) as client:
            await client.chat.completions.create(model=BASE, messages=[{"role": "user", "content": "hi"}])
        me = await get(service, token, "/v1/tuneloom/me")
        assert me.json() == {
            "object": "tuneloom.me",
            "owner": up["localId"],
            "kind": "person",
            "scopes": ["inference", "training", "account"],
            "email": "ada@example.com",
            "key": None,
            "models": [],
            "deletion_requested_at": None,
        }
    assert {request.owner for request in service.base.requests} == {up["localId"]}

    async def fresh() -> str:
        return await auth.refresh(up)

    # OpenAI's client asks for the token at each request, so that an hour is not the end.
    async with AsyncOpenAI(api_key=fresh, base_url="http://test/v1", http_client=service.http()) as client:
        assert BASE in [model.id async for model in client.models.list()]


async def test_a_person_of_google_and_an_administrator(service: Service, auth: Auth) -> None:
    claims = '{"sub":"g1","email":"boss@example.com","email_verified":true}'
    session = await auth.call(
        "signInWithIdp",
        postBody=f"id_token={claims}&providerId=google.com",
        requestUri="http://localhost",
        returnSecureToken=True,
    )
    me = (await get(service, session["idToken"], "/v1/tuneloom/me")).json()
    assert (me["kind"], me["scopes"][-1]) == ("person", "admin")
    # The address alone, not verified, is not enough.
    await auth.manage("delete", localId=session["localId"])
    imposter = await auth.sign_up("boss@example.com")
    me = (await get(service, imposter["idToken"], "/v1/tuneloom/me")).json()
    assert "admin" not in me["scopes"]


@pytest.mark.parametrize("end, code", [("revoke", "revoked_id_token"), ("disable", "user_disabled"), ("delete", "")])
async def test_a_user_is_out_within_the_interval(service: Service, auth: Auth, end: str, code: str) -> None:
    session = await auth.sign_up("ada@example.com")
    token, uid = session["idToken"], session["localId"]
    assert (await get(service, token, "/v1/files")).status_code == 200

    if end == "revoke":
        # To the second, as the tokens' times.
        await asyncio.sleep(1.1)
        await auth.manage("update", localId=uid, validSince=str(int(time.time())))
    elif end == "disable":
        await auth.manage("update", localId=uid, disableUser=True)
    else:
        await auth.manage("delete", localId=uid)
    await asyncio.sleep(CHECK_S)
    answer = await get(service, token, "/v1/files")
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, code or "user_not_found")

    if end == "revoke":
        again = await auth.call(
            "signInWithPassword", email="ada@example.com", password="secret12", returnSecureToken=True
        )
        assert (await get(service, again["idToken"], "/v1/files")).status_code == 200


async def test_an_anonymous_person_who_becomes_a_known_one_keeps_everything(service: Service, auth: Auth) -> None:
    session = await auth.sign_up()
    token = session["idToken"]
    me = (await get(service, token, "/v1/tuneloom/me")).json()
    assert (me["kind"], me["scopes"], me["email"]) == ("anonymous", ["inference", "training"], None)
    async with service.openai(token) as client:
        file = await client.files.create(file=("rows.jsonl", b'{"messages": []}\n'), purpose="fine-tune")
    assert (await new_key(service, token)).status_code == 403

    # The password revokes the tokens before it, to the second.
    await asyncio.sleep(1.1)
    linked = await auth.call(
        "update", idToken=token, email="ada@example.com", password="secret12", returnSecureToken=True
    )
    assert linked["localId"] == session["localId"]
    for token in (linked["idToken"], await auth.refresh(linked)):
        me = (await get(service, token, "/v1/tuneloom/me")).json()
        assert (me["kind"], me["scopes"]) == ("person", ["inference", "training", "account"])
        async with service.openai(token) as client:
            assert [found.id async for found in client.files.list()] == [file.id]
    created = await new_key(service, token)
    assert created.status_code == 200, created.text
    assert (await new_key(service, token, scopes=["admin"])).status_code == 403
    assert (await new_key(service, token, owner="local")).status_code == 403
    async with service.openai(created.json()["secret"]) as client:
        assert [found.id async for found in client.files.list()] == [file.id]


async def test_another_person_sees_nothing_of_it(service: Service, auth: Auth) -> None:
    ada, bob = await auth.sign_up("ada@example.com"), await auth.sign_up("bob@example.com")
    async with service.openai(ada["idToken"]) as client:
        file = await client.files.create(file=("rows.jsonl", b'{"messages": []}\n'), purpose="fine-tune")
    foreign = await get(service, bob["idToken"], f"/v1/files/{file.id}")
    absent = await get(service, bob["idToken"], "/v1/files/file-absent")
    assert foreign.status_code == absent.status_code == 404
    assert foreign.text.replace(file.id, "file-absent") == absent.text
    assert (await get(service, bob["idToken"], "/v1/files")).json()["data"] == []


async def test_a_server_that_hangs_is_a_503(service: Service, auth: Auth, auth_server: Server, monkeypatch) -> None:
    monkeypatch.setattr("tuneloom.serve.firebase_users.LOOKUP_TIMEOUT_S", 0.3)
    seen, unseen = await auth.sign_up("ada@example.com"), await auth.sign_up("bob@example.com")
    assert (await get(service, seen["idToken"], "/v1/files")).status_code == 200
    auth_server.pause()
    try:
        await asyncio.sleep(CHECK_S)
        assert (await get(service, seen["idToken"], "/v1/files")).status_code == 200
        answer = await get(service, unseen["idToken"], "/v1/files")
        assert (answer.status_code, "retry-after" in answer.headers) == (503, True)
    finally:
        auth_server.resume()


async def get(service: Service, token: str, path: str) -> httpx2.Response:
    async with service.http(token) as http:
        return await http.get(path)


async def new_key(service: Service, token: str, **more: Any) -> httpx2.Response:
    async with service.http(token) as http:
        return await http.post("/v1/tuneloom/keys", json={"name": "laptop", **more})
