"""Requests that are under way when their key ends, each within the five seconds in which a revocation counts."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from pydantic import ValidationError

from tests.serve.conftest import BASE, PEPPER, Service, eventually, hello, make_service
from tuneloom.config import BaseSettings, GatewaySettings, LimitsSettings, Settings
from tuneloom.control import keys
from tuneloom.domain import Principal
from tuneloom.errors import Overloaded, PermissionDenied, Unauthenticated
from tuneloom.generation import Delta, Started
from tuneloom.serve import standing
from tuneloom.store import Store

pytestmark = pytest.mark.anyio
HI: Any = [{"role": "user", "content": "hi"}]
USUAL_CHECK_S = standing.CHECK_S
LONG = [Started(5), [Delta(0, "Hel")], 60.0, *hello()[2:]]


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Keys are looked at all the time."""
    monkeypatch.setattr(standing, "CHECK_S", 0.05)
    return Settings(home=tmp_path, bases=(BaseSettings(id=BASE),), gateway=GatewaySettings(key_cache_s=0.0))


def revoke(service: Service, id: str = "") -> None:
    """Every key, or one, as another process does it."""
    for key in keys.list_keys(service.store.records):
        if id in ("", key.id):
            keys.revoke(service.store.records, key.id)


async def test_a_stream_ends_with_an_error_within_five_seconds_when_its_key_is_revoked(
    tmp_path: Path, store: Store
) -> None:
    settings = Settings(home=tmp_path, bases=(BaseSettings(id=BASE),))
    with pytest.raises(ValidationError):
        GatewaySettings(key_cache_s=4.1 - USUAL_CHECK_S)
    service = make_service(settings, store)
    service.base.play(*LONG)
    async with service.openai(service.key()) as client:
        asking = asyncio.create_task(client.chat.completions.create(model=BASE, messages=HI, stream=True))
        await service.base.is_asleep.wait()
        revoke(service)
        stream = await asyncio.wait_for(asking, 30)
        chunks = []
        with pytest.raises(openai.APIError, match="Incorrect API key") as caught:
            async for chunk in stream:
                chunks.append(chunk)

    assert [chunk.choices[0].delta.content for chunk in chunks] == ["", "Hel"]
    assert isinstance(caught.value.body, dict) and caught.value.body["code"] == "invalid_api_key"
    assert service.base.closed == 1


async def test_the_events_of_a_stream_that_is_ended_are_whole(service: Service) -> None:
    service.base.play(*LONG)
    body = {"model": BASE, "messages": HI, "stream": True}
    async with service.http(service.key(expires_in=1)) as http:
        answer = await http.post("/v1/chat/completions", json=body)

    *events, error, done = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert answer.status_code == 200 and len(events) == 2
    assert "has expired" in json.loads(error)["error"]["message"] and done == "[DONE]"


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_a_call_that_waits_is_refused_when_its_key_is_revoked(service: Service, is_streamed: bool) -> None:
    service.base.play(60.0, *hello())
    async with service.http(service.key()) as http:
        body = {"model": BASE, "messages": HI, "stream": is_streamed}
        asking = asyncio.create_task(http.post("/v1/chat/completions", json=body))
        await service.base.is_asleep.wait()
        revoke(service)
        answer = await asyncio.wait_for(asking, 30)

    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    assert service.base.closed == 1


async def test_requests_that_end_with_their_key_are_no_wrong_keys_of_their_address(
    tmp_path: Path, store: Store
) -> None:
    settings = Settings(
        home=tmp_path,
        bases=(BaseSettings(id=BASE),),
        gateway=GatewaySettings(key_cache_s=0.0),
        limits=LimitsSettings(refused_per_minute=1),
    )
    service = make_service(settings, store)
    key, body = service.key(), {"model": BASE, "messages": HI}
    for _ in range(3):
        service.base.play(60.0)
    async with service.http(key) as http:
        asking = [asyncio.create_task(http.post("/v1/chat/completions", json=body)) for _ in range(3)]
        await eventually(lambda: len(service.base.requests) == 3)
        revoke(service)
        answers = await asyncio.wait_for(asyncio.gather(*asking), 30)

    assert [answer.status_code for answer in answers] == [401] * 3


async def test_the_end_of_another_key_ends_nothing(service: Service) -> None:
    for _ in range(2):
        service.base.play(Started(5), [Delta(0, "Hel")], 0.5, *hello()[2:])
    kept, ended = service.key(), keys.mint(service.store.records, PEPPER, owner="ada", scopes=("inference",))
    body = {"model": BASE, "messages": HI, "stream": True}
    async with service.http(kept) as http:
        asking = asyncio.create_task(http.post("/v1/chat/completions", json=body))
        await service.base.is_asleep.wait()
        revoke(service, ended.key.id)

        answer = (await asking).text

    assert '"lo"' in answer and "error" not in answer


async def test_an_upload_of_a_revoked_key_is_refused_with_its_next_piece(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standing, "CHECK_S", 0.0)
    head = b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
    head += b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'

    async def pieces() -> AsyncIterator[bytes]:
        yield head
        revoke(service)
        yield b'{"text": "hello"}\n\r\n--x--\r\n'

    headers = {"content-type": "multipart/form-data; boundary=x"}
    async with service.http(service.key(scopes=("training",))) as http:
        answer = await http.post("/v1/files", content=pieces(), headers=headers)

    assert answer.status_code == 401, answer.text
    assert not service.store.records.files.query()


async def test_a_download_of_a_revoked_key_breaks_off(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tuneloom.control.files.CHUNK_BYTES", 4)
    key = service.key(scopes=("training",))
    async with service.http(key) as http:
        form = {"purpose": "fine-tune"}
        made = await http.post("/v1/files", data=form, files={"file": ("a.jsonl", b'{"text": "hello"}\n')})
    sent: list[bytes] = []
    scope = request_scope(f"/v1/files/{made.json()['id']}/content", key)

    async def receive() -> Any:
        await asyncio.sleep(60)

    async def send(message: Any) -> None:
        if sent and message.get("body"):
            await asyncio.sleep(60)
        if message["type"] == "http.response.body":
            sent.append(message["body"])
            revoke(service)

    with pytest.raises(Unauthenticated):
        await asyncio.wait_for(service.app(scope, receive, send), 30)
    assert sent == [b'{"te']


def request_scope(path: str, key: str) -> dict[str, Any]:
    return {
        "type": "http",
        "method": "GET",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(b"authorization", f"Bearer {key}".encode()), (b"host", b"test")],
        "client": ("127.0.0.1", 1),
        "asgi": {"version": "3.0"},
    }


class Person:
    """Somebody who signs in, until `error` says otherwise."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.asked = 0

    async def authenticate(self, token: str, headers: Any) -> Principal:
        self.asked += 1
        if self.error is not None:
            raise self.error
        return Principal(owner="uid", key_id="", scopes=("inference",), kind="person")

    def warning(self) -> str | None:
        return None


async def ask_as(person: Person, service: Service, error: Exception, pause_s: float) -> httpx2.Response:
    """A stream of a person to whom that happens in its pause."""
    service.base.play(Started(5), [Delta(0, "Hel")], pause_s, *hello()[2:])
    body = {"model": BASE, "messages": HI, "stream": True}
    async with service.http("eyJhbGciOi.eyJzdWIi.c2ln") as http:
        asking = asyncio.create_task(http.post("/v1/chat/completions", json=body))
        await service.base.is_asleep.wait()
        person.error, asked = error, person.asked
        answer = await asyncio.wait_for(asking, 30)
    assert person.asked > asked
    return answer


@pytest.mark.parametrize(
    "error",
    [
        Unauthenticated("Your account is disabled.", code="user_disabled"),
        PermissionDenied("Only people of certain domains are let in."),
    ],
)
async def test_a_stream_ends_when_its_person_is_not_welcome_any_more(
    settings: Settings, store: Store, error: Any
) -> None:
    person = Person()

    answer = await ask_as(person, make_service(settings, store, person), error, 60.0)

    assert f'"code":"{error.code}"' in answer.text and '"lo"' not in answer.text


@pytest.mark.parametrize(
    "error",
    [
        Unauthenticated("Your ID token has expired.", code="expired_id_token"),
        Overloaded("The users cannot be asked for."),
        RuntimeError("a fault of ours"),
    ],
)
async def test_a_stream_goes_on_when_a_token_is_over_or_nobody_can_tell(
    settings: Settings, store: Store, error: Exception
) -> None:
    person = Person()

    answer = await ask_as(person, make_service(settings, store, person), error, 0.5)

    assert '"lo"' in answer.text and "error" not in answer.text
