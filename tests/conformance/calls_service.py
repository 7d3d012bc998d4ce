"""What is no method of the client: health, headers, CORS, unknown URLs, safe repetition. Plain HTTP by the library."""

import json
import secrets
import urllib.error
import urllib.request
from dataclasses import dataclass
from email.message import Message
from typing import Any

from tests.conformance.session import QUESTION, Session, holds, rows, same, user

ORIGIN = "https://console.example"


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Message
    body: bytes


def healthz(session: Session) -> None:
    same("status", _request(session, "GET", "/healthz").status, 200)


def readyz(session: Session) -> None:
    same("status", _request(session, "GET", "/readyz").status, 200)


def response_headers(session: Session) -> None:
    headers = _request(session, "POST", "/v1/chat/completions", _chat(session), key=session.key).headers
    holds("openai-processing-ms", (headers["openai-processing-ms"] or "").isdecimal(), headers["openai-processing-ms"])
    same("openai-version", headers["openai-version"], "2020-10-01")
    same("openai-organization", headers["openai-organization"], session.owner)
    holds("x-request-id", (headers["x-request-id"] or "").startswith("req_"), headers["x-request-id"])
    same("ids in one answer", len(headers.get_all("x-request-id") or []), 1)


def cors_preflight(session: Session) -> None:
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    answer = _request(session, "OPTIONS", "/v1/chat/completions", Origin=ORIGIN, **asked)
    same("status", answer.status, 200)
    origin, allowed = (answer.headers[f"access-control-allow-{name}"] for name in ("origin", "headers"))
    holds("access-control-allow-origin", origin in ("*", ORIGIN), origin)
    holds("access-control-allow-headers", "authorization" in (allowed or "").lower(), allowed)
    methods = answer.headers["access-control-allow-methods"]
    holds("access-control-allow-methods", "POST" in (methods or ""), methods)


def cors_exposed(session: Session) -> None:
    for key, status in ((session.key, 200), ("sk-wrong", 401)):
        answer = _request(session, "GET", "/v1/models", key=key, Origin=ORIGIN)
        same("status", answer.status, status)
        exposed = (answer.headers["access-control-expose-headers"] or "").lower()
        holds("x-request-id is exposed", "x-request-id" in exposed and "openai-processing-ms" in exposed, exposed)
        origin = answer.headers["access-control-allow-origin"]
        holds("access-control-allow-origin", origin in ("*", ORIGIN), origin)


def unknown_url(session: Session) -> None:
    _is_error(_request(session, "GET", "/v1/nothing/here", key=session.key), 404)
    _is_error(_request(session, "GET", "/v1/nothing/here"), 401)


def wrong_method(session: Session) -> None:
    _is_error(_request(session, "PUT", "/v1/chat/completions", _chat(session), key=session.key), 405)


def create_repeated(session: Session) -> None:
    """A client sends a create again when the answer got lost; it must not make a second object."""
    create, count = session.client.files.create, len(list(session.client.files.list()))
    data = rows(10, secrets.token_hex(4))
    first = create(file=("again.jsonl", data), purpose="fine-tune")
    retried = create(file=("again.jsonl", data), purpose="fine-tune", extra_headers={"x-stainless-retry-count": "1"})
    same("the file of the retry", retried.id, first.id)
    named = {"Idempotency-Key": secrets.token_hex(8)}
    keyed = [create(file=("again.jsonl", data), purpose="fine-tune", extra_headers=named).id for _ in range(2)]
    same("the file of the second call with the key", keyed[1], keyed[0])
    holds("another key, another file", keyed[0] != first.id)
    same("new files", len(list(session.client.files.list())) - count, 2)


def _chat(session: Session) -> dict[str, Any]:
    return {"model": session.base, "messages": user(QUESTION), "max_tokens": 1}


def _is_error(answer: Answer, status: int) -> None:
    same("status", answer.status, status)
    error = json.loads(answer.body)["error"]
    same("fields of the error", set(error), {"message", "type", "param", "code"})
    same("type", error["type"], "invalid_request_error")


def _request(
    session: Session,
    method: str,
    path: str,
    body: dict[str, Any] | None = None,
    *,
    key: str | None = None,
    **headers: str,
) -> Answer:
    url = session.base_url.removesuffix("/v1") + path
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **headers}, method=method)
    # Without proxies: the server is asked, whatever the environment says.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=60) as response:
            return Answer(response.status, response.headers, response.read())
    except urllib.error.HTTPError as error:
        with error:
            return Answer(error.code, error.headers, error.read())
