"""What an owner and an admin look after: webhooks, keys of models, admin keys, the audit log, usage and costs."""

import queue
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import openai

from tests.conformance.calls_jobs import SUFFIX
from tests.conformance.session import Lacking, Session, fails, holds, same, user, wait_for

EVENTS = ["fine_tuning.job.succeeded", "fine_tuning.job.cancelled"]
# Nothing has such a name (RFC 2606), so that nobody is ever called.
URL = "https://hooks.invalid/tuneloom"
USAGE_WITHIN_S = 30.0
DELIVERED_WITHIN_S = 30.0


def webhooks_create(session: Session) -> None:
    hooks = _hooks(session)
    made = hooks.create(url=URL, event_types=EVENTS, name="conformance")
    holds("signing_secret", made.signing_secret.startswith("whsec_"), made.signing_secret[:6])
    same("what came back", (made.object, made.url, made.event_types), ("webhook_endpoint", URL, EVENTS))
    again = hooks.retrieve(made.id)
    same("retrieved", (again.id, again.name), (made.id, "conformance"))
    holds("the secret is not shown again", made.signing_secret not in again.to_json())
    session.made["hook"] = made


def webhooks_list_update(session: Session) -> None:
    hooks, hook = _hooks(session), session.earlier("hook")
    same("ids", [endpoint.id for endpoint in hooks.list()], [hook.id])
    same("name", hooks.update(hook.id, name="other").name, "other")
    same("what was not named", hooks.retrieve(hook.id).event_types, EVENTS)


def webhooks_event_types(session: Session) -> None:
    found = set(_hooks(session).event_types.list().data)
    holds("OpenAI's types of jobs", {f"fine_tuning.job.{end}" for end in ("succeeded", "failed", "cancelled")} <= found)


def webhooks_rotate_secret(session: Session) -> None:
    hooks, hook = _hooks(session), session.earlier("hook")
    rotated = hooks.rotate_secret(hook.id, keep_old_secret_active_for_24_hours=False)
    holds("another secret", rotated.signing_secret != hook.signing_secret)


def webhooks_test_unreachable(session: Session) -> None:
    hooks, hook = _hooks(session), session.earlier("hook")
    call = lambda: hooks.test(hook.id, event_type=EVENTS[0])  # noqa: E731
    fails(openai.BadRequestError, call, code="webhook_unreachable")


def webhooks_wrong_url(session: Session) -> None:
    hooks = _hooks(session)
    for url in ("ftp://example.com/", "https://user:password@example.com/", "no url"):
        fails(openai.BadRequestError, lambda url=url: hooks.create(url=url, event_types=EVENTS, name="x"), param="url")


def webhooks_unwrap(session: Session) -> None:
    """A real delivery to a receiver beside this process, where the server's settings let webhooks come here."""
    client, file = _account(session), session.earlier("file").id
    if not hasattr(client, "webhooks"):
        raise Lacking
    with _receiver() as (url, arrived):
        body: Any = {"url": url, "event_types": EVENTS, "name": "here"}
        try:
            made: Any = client.post("/webhook_endpoints", body=body, cast_to=object)
        except openai.BadRequestError as error:
            holds("a refusal that names the field", error.param == "url", error.param)
            raise Lacking from error
        job = client.fine_tuning.jobs.create(model=session.base, training_file=file)
        client.fine_tuning.jobs.cancel(job.id)
        payload, headers = arrived.get(timeout=DELIVERED_WITHIN_S)
        event: Any = client.webhooks.unwrap(payload, headers, secret=made["signing_secret"])
        same("event", (event.type, event.data.id, event.object), ("fine_tuning.job.cancelled", job.id, "event"))
        wrong = "whsec_" + "A" * 43 + "="
        verify = client.webhooks.verify_signature
        fails(openai.InvalidWebhookSignatureError, lambda: verify(payload, headers, secret=wrong))
        client.delete(f"/webhook_endpoints/{made['id']}", cast_to=object)


def webhooks_foreign(session: Session) -> None:
    hooks = _hooks(session, owner=f"{session.owner}-other")
    same("ids", [endpoint.id for endpoint in hooks.list()], [])
    for id in (session.earlier("hook").id, "no-such-hook"):
        fails(openai.NotFoundError, lambda id=id: hooks.retrieve(id))


def webhooks_delete(session: Session) -> None:
    hooks, hook = _hooks(session), session.earlier("hook")
    holds("deleted", hooks.delete(hook.id).deleted)
    fails(openai.NotFoundError, lambda: hooks.retrieve(hook.id))


def keys_of_model(session: Session) -> None:
    """Made without a body; it calls that model and finds nothing else."""
    made: Any = _account(session).post(f"/tuneloom/models/{SUFFIX}/keys", cast_to=object)
    same("what it is for", (made["name"], made["models"], made["scopes"]), (SUFFIX, [SUFFIX], ["inference"]))
    client = session.client_with(made["secret"])
    names = {model.id for model in client.models.list()}
    holds("only that model is listed", SUFFIX in names and session.base not in names, sorted(names))
    answer = client.chat.completions.create(model=SUFFIX, messages=user("hello"), max_tokens=1)
    same("model", answer.model, SUFFIX)
    chat = client.chat.completions.create
    fails(openai.NotFoundError, lambda: chat(model=session.base, messages=user("hello")), code="model_not_found")


def keys_first(session: Session) -> None:
    """A job that brings its model's first key, shown this once."""
    client, file = _account(session), session.earlier("file").id
    job = client.fine_tuning.jobs.create(
        model=session.base, training_file=file, extra_body={"tuneloom": {"first_key": True}}
    )
    ours: Any = (job.model_extra or {})["tuneloom"]
    holds("secret", ours["key"]["secret"].startswith("sk-"))
    same("models", ours["key"]["models"], [ours["name"]])
    again: Any = (client.fine_tuning.jobs.retrieve(job.id).model_extra or {})["tuneloom"]
    holds("it is not shown again", "key" not in again)
    client.fine_tuning.jobs.cancel(job.id)


def keys_rotate(session: Session) -> None:
    """The old secret works on for the overlap; without one it ends."""
    client = _account(session)
    made: Any = client.post("/tuneloom/keys", body={"scopes": ["inference"]}, cast_to=object)
    path = f"/tuneloom/keys/{made['id']}/rotate"
    second: Any = client.post(path, body={"overlap": "1h"}, cast_to=object)
    for secret in (made["secret"], second["secret"]):
        holds("models", session.client_with(secret).models.list().data)
    client.post(path, body={}, cast_to=object)
    old = session.client_with(made["secret"]).models.list
    wait_for("the old secret's end", lambda: _is_refused(old), 5.0, every_s=0.2)


def admin_keys(session: Session) -> None:
    keys = _admin(session).admin_api_keys
    made = keys.create(name="conformance")
    holds("value", made.value.startswith("sk-"))
    holds("it is an admin's", session.client_with(made.value).get("/tuneloom/bases", cast_to=object))
    holds("it is listed", made.id in [key.id for key in keys.list()])
    same("name", keys.retrieve(made.id).name, "conformance")
    holds("deleted", keys.delete(made.id).deleted)
    fails(openai.NotFoundError, lambda: keys.retrieve(made.id))


def admin_audit_logs(session: Session) -> None:
    logs = _admin(session).audit_logs
    entries = list(logs.list(event_types=["api_key.created"], effective_at={"gte": session.began}, limit=2))
    holds("keys of this run, over more pages than one", len(entries) > 2, len(entries))
    same("types", {entry.type for entry in entries}, {"api_key.created"})
    first = entries[0]
    holds("actor and time", first.actor is not None and first.effective_at >= session.began, first)
    times = [entry.effective_at for entry in entries]
    same("newest first", times, sorted(times, reverse=True))
    one = logs.list(resource_ids=[first.to_dict()["api_key.created"]["id"]])  # type: ignore[index]
    holds("found by what it was done to", first.id in [entry.id for entry in one])


def admin_usage(session: Session) -> None:
    usage = _admin(session).usage
    session.ask()

    def counted() -> Any:
        page = usage.completions(start_time=session.began, project_ids=[session.owner], group_by=["model"])
        results = [result for bucket in page.data for result in bucket.results or []]
        return next((result for result in results if result.model == session.base), None)  # type: ignore[union-attr]

    result = wait_for("the use of this run", counted, USAGE_WITHIN_S)
    holds("tokens", result.input_tokens > 0 and result.output_tokens > 0, result)
    holds("requests", result.num_model_requests > 0, result)


def admin_costs(session: Session) -> None:
    page = _admin(session).usage.costs(start_time=session.began, group_by=["line_item"])
    same("object", page.object, "page")
    holds("a bucket", page.data and page.data[0].start_time <= session.began < page.data[0].end_time, page)


def admin_refused(session: Session) -> None:
    """Others may read neither the log nor usage of all."""
    for path in ("audit_logs", "admin_api_keys", "usage/completions?start_time=1", "costs?start_time=1"):
        call = lambda path=path: session.client.get(f"/organization/{path}", cast_to=object)  # noqa: E731
        fails(openai.PermissionDeniedError, call, code="insufficient_permissions")


def _account(session: Session, owner: str | None = None) -> openai.OpenAI:
    """A client that may look after what the owner has."""
    name = f"account of {owner or session.owner}"
    if name not in session.made:
        scopes = ("inference", "training", "account")
        session.made[name] = session.client_with(session.mint(owner or session.owner, *scopes)["secret"])
    return session.made[name]


def _hooks(session: Session, owner: str | None = None) -> Any:
    hooks = getattr(_account(session, owner), "webhooks", None)
    if not hasattr(hooks, "create"):
        raise Lacking
    return hooks


def _admin(session: Session) -> Any:
    if not hasattr(session.admin, "admin"):
        raise Lacking
    more: Any = {"admin_api_key": session.admin.api_key}
    return session.admin.with_options(**more).admin.organization


def _is_refused(call: Any) -> bool:
    try:
        call()
    except openai.AuthenticationError:
        return True
    return False


@contextmanager
def _receiver() -> Iterator[tuple[str, "queue.Queue[tuple[str, dict[str, str]]]"]]:
    """The URL of a receiver on loopback, and what has come to it."""
    arrived: queue.Queue[tuple[str, dict[str, str]]] = queue.Queue()

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"])).decode()
            arrived.put((body, dict(self.headers)))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/{secrets.token_hex(4)}", arrived
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)
