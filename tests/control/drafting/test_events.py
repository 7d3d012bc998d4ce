"""The progress of drafts as server-sent events, read by the plain openai client over a real connection."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import openai
import pytest
import uvicorn

from tests.control.conftest import assert_error
from tests.control.drafting.conftest import DRAFTS, Desk, Open
from tests.control.drafting.model import Hold, Reply, Rows, in_turn
from tuneloom.control import draft_events
from tuneloom.errors import Overloaded


@contextmanager
def served(desk: Desk) -> Iterator[str]:
    """The URL of the API on a real port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(desk.api.app, host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{port}/v1"
    server.should_exit = True
    thread.join(10)


@contextmanager
def carried_on(desk: Desk) -> Iterator[None]:
    over = threading.Event()

    def control() -> None:
        while not over.is_set():
            desk.control.tick()
            time.sleep(0.02)

    thread = threading.Thread(target=control, daemon=True)
    thread.start()
    yield
    over.set()
    thread.join(10)


def follow(url: str, id: str, key: str = "ada:training") -> Iterator[Any]:
    with openai.OpenAI(base_url=url, api_key=key, max_retries=0) as client:
        yield from client.get(
            f"/tuneloom/drafts/{id}/events", cast_to=object, stream=True, stream_cls=openai.Stream[object]
        )


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draft_events, "POLL_S", 0.02)


def test_each_step_is_told_and_the_end_ends_it(open_desk: Open):
    hold = Hold()
    desk = open_desk(in_turn(Rows(), hold))
    id = desk.create(rows=20)["id"]
    with served(desk) as url:
        stream = follow(url, id)
        first = next(stream)
        assert first["object"] == "tuneloom.draft.event" and first["type"] == "draft.progress"
        assert first["draft"]["status"] == "queued"
        with carried_on(desk):
            while (event := next(stream))["draft"]["rows"] < 10:
                assert event["type"] == "draft.progress"
            assert desk.api.post(f"{DRAFTS}/{id}/cancel").status_code == 200
            rest = list(stream)
            hold.go.set()
    assert [event["type"] for event in rest][-1] == "draft.ended"
    assert {event["type"] for event in rest[:-1]} <= {"draft.progress"}
    last = rest[-1]["draft"]
    assert last["status"] == "cancelled" and last["rows"] == 10 and last["file_id"]
    assert last == desk.get(id)
    with served(desk) as url:
        assert [event["draft"] for event in follow(url, id)] == [last], "of one that has ended, its end"


def test_a_draft_that_failed_is_told_as_its_end_and_not_as_an_error_of_the_stream(open_desk: Open):
    desk = open_desk(lambda ask: Reply(status=400, message="bad"))
    id = desk.create()["id"]
    with served(desk) as url, carried_on(desk):
        last = list(follow(url, id))[-1]
    assert last["type"] == "draft.ended" and last["draft"]["error"]["code"] == "provider_refused"


def test_silence_has_heartbeats_and_the_time_that_was_asked_for_ends_it(open_desk: Open, monkeypatch):
    monkeypatch.setattr(draft_events, "HEARTBEAT_S", 0.05)
    desk = open_desk()
    id = desk.create()["id"]
    with served(desk) as url:
        answer = httpx.get(
            f"{url}/tuneloom/drafts/{id}/events?timeout_s=1",
            headers={"authorization": "Bearer ada:training"},
            timeout=60,
        )
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-cache"
    pieces = answer.text.split("\n\n")
    assert pieces[0].startswith("data: {") and pieces[-2:] == ["data: [DONE]", ""]
    assert len(pieces) > 3 and set(pieces[1:-2]) == {": waiting"}
    for text in ("0", "601", "x"):
        answer = desk.api.get(f"{DRAFTS}/{id}/events?timeout_s={text}")
        assert_error(answer, 400, "timeout_s", "from 1 to 600")


def test_a_store_that_is_away_for_a_while_is_waited_for(open_desk: Open, monkeypatch):
    desk = open_desk()
    id = desk.create()["id"]
    find, away = desk.store.records.drafts.find, threading.Event()

    def broken(id: str) -> Any:
        if away.is_set():
            raise Overloaded("The store does not answer.")
        return find(id)

    monkeypatch.setattr(desk.store.records.drafts, "find", broken)
    with served(desk) as url:
        stream = follow(url, id)
        assert next(stream)["draft"]["status"] == "queued"
        away.set()
        time.sleep(0.2)
        away.clear()
        with carried_on(desk):
            assert list(stream)[-1]["draft"]["status"] == "succeeded"


def test_who_leaves_gives_the_place_back_and_an_owner_has_so_many(open_desk: Open, monkeypatch):
    monkeypatch.setattr(draft_events, "MAX_STREAMS", 2)
    desk = open_desk()
    id = desk.create()["id"]
    with served(desk) as url:
        one, two = follow(url, id), follow(url, id)
        next(one), next(two)
        with pytest.raises(openai.RateLimitError, match="2 streams of events are open"):
            next(follow(url, id))
        one.close()
        deadline = time.monotonic() + 20
        while True:
            try:
                assert next(follow(url, id))["draft"]["id"] == id
                break
            except openai.RateLimitError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        two.close()


def test_strangers_and_keys_without_training_see_nothing(open_desk: Open):
    desk = open_desk()
    id = desk.create()["id"]
    assert_error(desk.api.get(f"{DRAFTS}/{id}/events", key="bob:training"), 404, "id", "No such Draft")
    assert desk.api.get(f"{DRAFTS}/{id}/events", key="ada:inference").status_code == 403
