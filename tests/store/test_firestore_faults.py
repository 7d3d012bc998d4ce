"""What callers see when Firestore hangs, ends, is slow, or its answer is lost after the commit was applied."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from google.auth import exceptions as auth
from google.auth.credentials import AnonymousCredentials, Credentials

from tests.parts import servers
from tests.parts.proxy import Proxy, proxy
from tuneloom.errors import InvalidRequest, Overloaded, TooLarge, TuneloomError
from tuneloom.store import firestore_api, open_documents
from tuneloom.store.base import (
    CommitUnknown,
    Create,
    Delete,
    Documents,
    Increment,
    Range,
    Replace,
    StoreConflict,
    StoreRefused,
    Write,
)

WAIT_S = 60.0


@pytest.fixture
def between(firestore_server: servers.Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy before the emulator, through which stores opened after it go."""
    with proxy(firestore_server.port) as made:
        monkeypatch.setenv("FIRESTORE_EMULATOR_HOST", made.address)
        yield made


@pytest.fixture
def direct(firestore_url: str) -> Iterator[Documents]:
    """The same database, not through the proxy."""
    documents = open_documents(firestore_url)
    # It reads the environment at its first call.
    documents.commit([Create("things", "a", {"v": 0}), Create("things", "b", {"v": 0})])
    yield documents
    documents.close()


@pytest.fixture
def documents(direct: Documents, between: Proxy, firestore_url: str) -> Iterator[Documents]:
    documents = open_documents(firestore_url)
    assert documents.find("things", "a") is not None
    assert between.num_connections == 1
    yield documents
    documents.close()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less patience, so that what never comes does not take the tests' time."""
    monkeypatch.setattr(firestore_api, "TRY_S", 1.0)
    monkeypatch.setattr("tuneloom.store.firestore_api.Tries.__init__.__defaults__", (2.0,))


CALLS: dict[str, Callable[[Documents], Any]] = {
    "find": lambda documents: documents.find("things", "a"),
    "query": lambda documents: documents.query("things", {"v": 0}),
    "create": lambda documents: documents.commit([Create("things", "new", {})]),
    "increment": lambda documents: documents.commit([Increment("things", "b", "v", 1)]),
}


def wait_until(holds: Callable[[], Any]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < deadline, "it never came to be"
        time.sleep(0.02)


def test_a_store_that_answers_in_two_seconds_works(documents: Documents, between: Proxy) -> None:
    between.set("delay", 2.0)
    started = time.monotonic()
    rev = documents.commit([Create("things", "c", {"v": 1})])["things", "c"]
    assert time.monotonic() - started > 2.0
    documents.commit([Replace("things", "c", {"v": 2}, rev)])
    assert [found.data for found in documents.query("things", {"v": 2})] == [{"v": 2}]
    with pytest.raises(StoreConflict):
        documents.commit([Replace("things", "c", {"v": 3}, rev)])


@pytest.mark.parametrize("mode", ["hang", "refuse", "drop"])
@pytest.mark.parametrize("call", CALLS)
def test_a_store_that_does_not_answer_is_overloaded_soon_and_comes_back(
    documents: Documents, direct: Documents, between: Proxy, quick: None, call: str, mode: Any
) -> None:
    documents.commit([Increment("things", "b", "v", 0)])
    between.set(mode)
    started = time.monotonic()
    with pytest.raises(Overloaded) as error:
        CALLS[call](documents)
    assert time.monotonic() - started < 20
    assert error.value.retry_after_s
    # Only a commit that never left is known to be without effect.
    assert isinstance(error.value, CommitUnknown) == (call in ("create", "increment") and mode != "refuse")
    between.cut()
    between.set("forward")
    assert documents.find("things", "a") == direct.find("things", "a")
    written = direct.find("things", "new"), [each.data["v"] for each in direct.query("things") if each.id == "b"]
    assert (written == (None, [0])) == (mode != "drop" or call in ("find", "query"))
    documents.commit([Increment("things", "b", "v", 10)])


def lose_answer(
    between: Proxy, direct: Documents, call: Callable[[], Any], is_applied: Callable[[], Any]
) -> "Future[Any]":
    """Start the call, let it be applied, and cut the connection before its answer comes."""
    between.set("drop")
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(call)
        wait_until(is_applied)
        between.set("forward")  # what lost bytes is cut
    return future


@pytest.mark.parametrize("kind", ["create", "replace", "delete", "delete_any", "increment", "many"])
def test_an_answer_that_was_lost_is_found_out(
    documents: Documents, direct: Documents, between: Proxy, kind: str
) -> None:
    found = direct.find("things", "a")
    assert found is not None
    writes: list[Write] = {
        "create": [Create("things", "c", {"v": 5})],
        "replace": [Replace("things", "a", {"v": 5}, found.rev)],
        "delete": [Delete("things", "a", found.rev)],
        "delete_any": [Delete("things", "a")],
        "increment": [Increment("things", "a", "v", 5)],
        "many": [Create("things", "c", {"v": 5}), Increment("things", "a", "v", 5), Delete("things", "b")],
    }[kind]
    if kind in ("increment", "many"):  # the first one reads whether there is a number
        documents.commit([Increment("things", "a", "v", 0)])
    ids_before = {each.id: each.rev for each in direct.query("things")}

    def is_applied() -> bool:
        return {each.id: each.rev for each in direct.query("things")} != ids_before

    revs = lose_answer(between, direct, lambda: documents.commit(writes), is_applied).result(timeout=WAIT_S)
    left = direct.query("things")
    assert {key: rev for key, rev in revs.items() if key[1] in "abc"} == {
        (each.collection, each.id): each.rev for each in left if ids_before.get(each.id) != each.rev
    }
    assert {each.id: each.data["v"] for each in left} == {
        "create": {"a": 0, "b": 0, "c": 5},
        "replace": {"a": 5, "b": 0},
        "delete": {"b": 0},
        "delete_any": {"b": 0},
        "increment": {"a": 5, "b": 0},
        "many": {"a": 5, "c": 5},
    }[kind]


def test_a_conflict_stays_one_when_an_answer_was_lost_before(
    documents: Documents, direct: Documents, between: Proxy
) -> None:
    """The commit never arrived; meanwhile another writer was faster."""
    found = direct.find("things", "a")
    assert found is not None
    between.set("hang")
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(documents.commit, [Replace("things", "a", {"v": 1}, found.rev)])
        time.sleep(0.3)
        direct.commit([Replace("things", "a", {"v": 2}, found.rev)])
        between.cut()
        between.set("forward")
        with pytest.raises(StoreConflict):
            future.result(timeout=WAIT_S)
    assert [each.data["v"] for each in direct.query("things")] == [2, 0]


def test_an_increment_that_cannot_be_told_is_not_repeated(
    documents: Documents, direct: Documents, between: Proxy
) -> None:
    documents.commit([Increment("things", "a", "v", 0)])
    before = direct.find("things", "a")

    def another_came() -> bool:
        if direct.find("things", "a") == before:
            return False
        direct.commit([Increment("things", "a", "v", 100)])
        return True

    future = lose_answer(between, direct, lambda: documents.commit([Increment("things", "a", "v", 1)]), another_came)
    with pytest.raises(CommitUnknown) as error:
        future.result(timeout=WAIT_S)
    assert "things/a" in error.value.message and error.value.retry_after_s
    found = direct.find("things", "a")
    assert found is not None and found.data["v"] == 101


def test_a_server_that_hangs_for_a_while_loses_and_doubles_nothing(firestore_server: servers.Server) -> None:
    documents = open_documents("firestore:demo-paused")
    documents.commit([Create("things", "counter", {"v": 0})])
    applied, unknown = [], []

    def write(writer: int) -> None:
        for i in range(5):
            try:
                documents.commit([Create("things", f"w{writer}-{i}", {}), Increment("things", "counter", "v", 1)])
                applied.append(f"w{writer}-{i}")
            except CommitUnknown:
                unknown.append(f"w{writer}-{i}")

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(4)]
    for thread in threads:
        thread.start()
    firestore_server.pause()
    time.sleep(3.0)
    firestore_server.resume()
    for thread in threads:
        thread.join(WAIT_S)
    ids = [each.id for each in documents.query("things") if each.id != "counter"]
    counter = documents.find("things", "counter")
    assert set(applied) <= set(ids) <= {*applied, *unknown}
    assert counter is not None and counter.data["v"] == len(ids)
    assert not unknown, "three seconds are within the patience of a call"


def test_a_server_that_ends_and_starts_again_is_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    port = servers.free_port()
    monkeypatch.setenv("FIRESTORE_EMULATOR_HOST", f"{servers.HOST}:{port}")
    documents = open_documents("firestore:demo-restarted")
    monkeypatch.setattr("tuneloom.store.firestore_api.Tries.__init__.__defaults__", (150.0,))
    with servers.firestore(port=port):
        rev = documents.commit([Create("things", "a", {"v": 0})])["things", "a"]
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(documents.commit, [Create("things", "b", {"v": 1})])
        reading = pool.submit(documents.query, "things", {"v": 1})
        time.sleep(1.0)
        assert not waiting.done() and not reading.done(), "they wait for the server"
        # The emulator keeps nothing over its end; what is asked for is what was written since.
        with servers.firestore(port=port):
            assert waiting.result(timeout=160).keys() == {("things", "b")}
            assert len(reading.result(timeout=160)) in (0, 1)
            with pytest.raises(StoreConflict):
                documents.commit([Replace("things", "a", {"v": 1}, rev)])
            assert [each.id for each in documents.query("things")] == ["b"]
    documents.close()


class Answering(httpx.BaseTransport):
    """Answers of Firestore that the emulator does not give, as its API documents them; after them, `{}`."""

    def __init__(self, *answers: tuple[int, Any]) -> None:
        self.answers = list(answers)
        self.asked: list[httpx.Request] = []

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(request)
        code, body = self.answers.pop(0) if self.answers else (200, [])
        return httpx.Response(code, **({"text": body} if isinstance(body, str) else {"json": body}))


def answering(monkeypatch: pytest.MonkeyPatch, *answers: tuple[int, Any]) -> tuple[Documents, Answering]:
    """A store of Google's address, whose answers are these."""
    monkeypatch.delenv("FIRESTORE_EMULATOR_HOST", raising=False)
    monkeypatch.setattr("google.auth.default", lambda scopes: (AnonymousCredentials(), None))
    transport, client = Answering(*answers), httpx.Client
    monkeypatch.setattr(httpx, "Client", lambda **_: client(transport=transport))
    return open_documents("firestore:acme/main"), transport


def refusal(code: int, status: str, message: str) -> tuple[int, Any]:
    return code, {"error": {"code": code, "status": status, "message": message}}


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (refusal(403, "PERMISSION_DENIED", "Missing or insufficient permissions."), ["roles/datastore.user", "acme"]),
        (refusal(401, "UNAUTHENTICATED", "Request had invalid credentials."), ["roles/datastore.user", "acme"]),
        (refusal(404, "NOT_FOUND", "The database main does not exist for project acme."), ["documents_url", "`main`"]),
        (refusal(400, "FAILED_PRECONDITION", "The query requires an index."), ["cluster/firestore.indexes.json"]),
        (refusal(400, "INVALID_ARGUMENT", "No."), ["INVALID_ARGUMENT"]),
        ((200, [{"readTime": "x"}, refusal(403, "PERMISSION_DENIED", "Late.")[1]]), ["roles/datastore.user"]),
    ],
)
def test_what_does_not_pass_by_itself_says_what_to_check(
    monkeypatch: pytest.MonkeyPatch, answer: tuple[int, Any], words: list[str]
) -> None:
    documents, transport = answering(monkeypatch, answer)
    with pytest.raises(TuneloomError) as error:
        documents.query("things")
    assert not isinstance(error.value, Overloaded | InvalidRequest)
    assert all(word in error.value.message for word in words), error.value.message
    assert len(transport.asked) == 1


@pytest.mark.parametrize(
    "answer",
    [
        refusal(503, "UNAVAILABLE", "The service is currently unavailable."),
        refusal(429, "RESOURCE_EXHAUSTED", "Quota exceeded."),
        refusal(504, "DEADLINE_EXCEEDED", "Deadline expired."),
        refusal(409, "ABORTED", "Too much contention on these documents. Please try again."),
        (502, "<html>bad gateway</html>"),
        (200, "[{"),
    ],
)
def test_what_may_pass_is_tried_again_and_not_for_ever(
    monkeypatch: pytest.MonkeyPatch, answer: tuple[int, Any]
) -> None:
    documents, transport = answering(monkeypatch, answer, answer)
    assert documents.query("things") == []
    assert len(transport.asked) == 3
    monkeypatch.setattr("tuneloom.store.firestore_api.Tries.__init__.__defaults__", (0.5,))
    transport.answers = [answer] * 1000
    started = time.monotonic()
    with pytest.raises(Overloaded) as error:
        documents.commit([Create("things", "a", {})])
    assert time.monotonic() - started < 5
    assert len(transport.asked) < 100
    is_sure = answer[1]["error"]["status"] in firestore_api.NOT_APPLIED if isinstance(answer[1], dict) else False
    assert isinstance(error.value, CommitUnknown) != is_sure


def test_a_contended_increment_is_tried_again_and_an_uncertain_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "projects/acme/databases/main/documents/things/a"
    found = [{"found": {"name": name, "fields": {"data": {"mapValue": {}}}, "updateTime": "2026-01-01T00:00:00Z"}}]
    busy, gone = refusal(409, "ABORTED", "Contention."), refusal(503, "UNAVAILABLE", "Try later.")
    done = {"writeResults": [{"updateTime": "2026-01-01T00:00:01Z"}], "commitTime": "2026-01-01T00:00:01Z"}
    documents, transport = answering(monkeypatch, (200, found), busy, busy, (200, done))
    assert documents.commit([Increment("things", "a", "v", 1)]) == {("things", "a"): "2026-01-01T00:00:01Z"}
    assert len(transport.asked) == 4
    transport.answers = [gone, (200, found)]
    with pytest.raises(CommitUnknown):
        documents.commit([Increment("things", "a", "v", 1)])
    assert [str(request.url).rpartition(":")[2] for request in transport.asked[4:]] == ["commit", "batchGet"]


@pytest.mark.parametrize(
    "answer",
    [
        refusal(404, "NOT_FOUND", "No document to update: projects/acme/databases/main/documents/things/a"),
        refusal(409, "ALREADY_EXISTS", "Document already exists: projects/acme/databases/main/documents/things/a"),
        refusal(400, "FAILED_PRECONDITION", "the stored version (2) does not match the required base version (1)"),
    ],
)
def test_a_precondition_that_did_not_hold_is_a_conflict(monkeypatch: pytest.MonkeyPatch, answer: Any) -> None:
    documents, transport = answering(monkeypatch, answer)
    with pytest.raises(StoreConflict, match="things/a"):
        documents.commit([Create("things", "a", {})])
    assert len(transport.asked) == 1


@pytest.mark.parametrize(
    "answer",
    [
        refusal(404, "NOT_FOUND", "The database main does not exist for project acme. Please visit the console."),
        refusal(400, "FAILED_PRECONDITION", "The API is not available for Firestore in Datastore Mode database main."),
    ],
)
def test_a_database_that_is_not_there_is_no_conflict(monkeypatch: pytest.MonkeyPatch, answer: Any) -> None:
    documents, _ = answering(monkeypatch, answer)
    with pytest.raises(TuneloomError, match="`main`") as error:
        documents.commit([Create("things", "a", {})])
    assert not isinstance(error.value, StoreConflict)


def test_a_commit_that_firestore_finds_too_large_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    told = refusal(400, "INVALID_ARGUMENT", "Request payload size exceeds the maximum allowed size.")
    documents, _ = answering(monkeypatch, told)
    with pytest.raises(TooLarge):
        documents.commit([Create("things", "a", {})])


def test_missing_credentials_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(scopes: list[str]) -> None:
        raise auth.DefaultCredentialsError("none found")

    documents, _ = answering(monkeypatch)
    monkeypatch.setattr("google.auth.default", none)
    with pytest.raises(TuneloomError, match="GOOGLE_APPLICATION_CREDENTIALS") as error:
        documents.find("things", "a")
    assert "`acme`" in error.value.message


class Failing(Credentials):
    """An account whose token cannot be had."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def refresh(self, request: Any) -> None:
        raise self.error


@pytest.mark.parametrize(
    ("error", "kind"), [(auth.TransportError("no route"), Overloaded), (auth.RefreshError("revoked"), StoreRefused)]
)
def test_an_account_without_a_token(monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type) -> None:
    documents, transport = answering(monkeypatch)
    monkeypatch.setattr("google.auth.default", lambda scopes: (Failing(error), None))
    monkeypatch.setattr("tuneloom.store.firestore_api.Tries.__init__.__defaults__", (0.3,))
    with pytest.raises(TuneloomError) as raised:
        documents.commit([Create("things", "a", {})])
    assert type(raised.value) is kind
    assert transport.asked == []


def test_requests_go_to_google_with_the_accounts_token(monkeypatch: pytest.MonkeyPatch) -> None:
    class Account(Credentials):
        def refresh(self, request: Any) -> None:
            self.token = "a-token"

    documents, transport = answering(monkeypatch)
    monkeypatch.setattr("google.auth.default", lambda scopes: (Account(), None))
    documents.query("things", order_by="v", bounds=Range(above=1))
    (asked,) = transport.asked
    assert asked.headers["Authorization"] == "Bearer a-token"
    assert str(asked.url) == "https://firestore.googleapis.com/v1/projects/acme/databases/main/documents:runQuery"


@pytest.mark.parametrize("url", ["firestore:", "firestore:/x", "firestore:p/", "firestore:p/d/e", "firestores:p"])
def test_a_url_that_names_no_database_is_refused(url: str) -> None:
    with pytest.raises(InvalidRequest, match="firestore:PROJECT") as error:
        open_documents(url)
    assert error.value.param == "documents_url"
