"""Calls that must fail, each with the client's own class of error and a body that names what is wrong."""

import time
from collections.abc import Callable
from typing import Any

import openai

from tests.conformance.session import QUESTION, Session, fails, holds, same, user, wait_for

REVOKED_WITHIN_S = 5.0


def error_unknown_field(session: Session) -> None:
    _bad_chat(session, "unknown_parameter", "nonsense", extra_body={"nonsense": 1})


def error_unsupported_field(session: Session) -> None:
    prediction: Any = {"type": "content", "content": "blue"}
    _bad_chat(session, "unsupported_parameter", "prediction", prediction=prediction)


def error_missing_field(session: Session) -> None:
    fails(
        openai.BadRequestError,
        lambda: session.client.post("/chat/completions", body={"model": session.base}, cast_to=object),
        code="missing_required_parameter",
        param="messages",
    )


def error_invalid_value(session: Session) -> None:
    _bad_chat(session, "invalid_value", "temperature", temperature=3)


def error_invalid_type(session: Session) -> None:
    _bad_chat(session, "invalid_type", "temperature", temperature="hot")


def error_in_message(session: Session) -> None:
    messages: Any = [*user(QUESTION), {"role": "alien", "content": "hello"}]
    _bad_chat(session, "invalid_value", "messages[1].role", messages=messages)


def error_before_stream(session: Session) -> None:
    _bad_chat(session, "invalid_value", "top_p", top_p=2, stream=True)


def error_context_length(session: Session) -> None:
    words = "word " * (session.context_length + 100)
    error = _bad_chat(session, "context_length_exceeded", "messages", messages=user(words))
    holds("the message says the limit", str(session.context_length) in error.message.replace(",", ""), error.message)


def error_wrong_key(session: Session) -> None:
    key = "sk-" + "wrong" * 8
    error = fails(openai.AuthenticationError, session.client_with(key).models.list, code="invalid_api_key", param=None)
    holds("the message masks the key", key not in error.message and "sk-wro" in error.message, error.message)


def error_no_key(session: Session) -> None:
    nobody = session.client_with("none")
    omitted: Any = {"Authorization": openai.Omit()}
    error = fails(openai.AuthenticationError, lambda: nobody.models.list(extra_headers=omitted), code=None)
    holds("the message says how to send one", "Authorization" in error.message, error.message)


def error_revoked_key(session: Session) -> None:
    key = session.mint(session.owner, "inference")
    client = session.client_with(key["secret"])
    holds("it works at first", client.models.list().data)
    session.admin.delete(f"/tuneloom/keys/{key['id']}", cast_to=object)
    started = time.monotonic()

    def refused() -> bool:
        try:
            client.models.list()
        except openai.AuthenticationError:
            return True
        return False

    wait_for("the key to be refused", refused, REVOKED_WITHIN_S, every_s=0.2)
    holds("in time", time.monotonic() - started < REVOKED_WITHIN_S)


def error_scope_training(session: Session) -> None:
    client = session.client_with(session.mint(session.owner, "inference")["secret"])
    _forbidden(lambda: client.files.create(file=("a.jsonl", b"{}"), purpose="fine-tune"), "training")
    _forbidden(lambda: client.fine_tuning.jobs.list(), "training")
    holds("it may still see models", client.models.list().data)


def error_scope_inference(session: Session) -> None:
    client = session.client_with(session.mint(session.owner, "training")["secret"])
    _forbidden(lambda: client.chat.completions.create(model=session.base, messages=user(QUESTION)), "inference")
    _forbidden(lambda: client.completions.create(model=session.base, prompt=QUESTION), "inference")


def error_scope_admin(session: Session) -> None:
    _forbidden(lambda: session.client.post("/tuneloom/keys", body={"name": "mine"}, cast_to=object), "account")
    _forbidden(lambda: session.client.get("/tuneloom/bases", cast_to=object), "admin")


def error_unknown_model(session: Session) -> None:
    for name in ("no-such-model", "ft:no:such:model:12345678", "no-such-model@v1", "../../etc/passwd"):
        error = fails(
            openai.NotFoundError, lambda name=name: session.ask(model=name), code="model_not_found", param="model"
        )
        same("message", error.body["message"], f"The model `{name}` does not exist or you do not have access to it.")  # type: ignore[index]


def error_unknown_file(session: Session) -> None:
    error = fails(openai.NotFoundError, lambda: session.client.files.retrieve("file-none"), param="id", code=None)
    holds("message", "No such File object: file-none" in error.message, error.message)


def error_unknown_upload(session: Session) -> None:
    uploads = session.client.uploads
    fails(openai.NotFoundError, lambda: uploads.cancel("upload_none"), param="id")
    fails(openai.NotFoundError, lambda: uploads.parts.create("upload_none", data=b"x"), param="id")


def error_unknown_job(session: Session) -> None:
    jobs, id = session.client.fine_tuning.jobs, "ftjob-none"
    for call in (
        jobs.retrieve,
        jobs.cancel,
        jobs.pause,
        jobs.resume,
        jobs.list_events,
        jobs.checkpoints.list,
    ):
        error = fails(openai.NotFoundError, lambda call=call: call(id), code="fine_tune_not_found")
        holds("message", id in error.message, error.message)


def error_foreign(session: Session) -> None:
    stranger = session.client_with(session.mint(f"{session.owner}-2", "inference", "training")["secret"])
    file, job = session.earlier("file").id, session.earlier("job").id
    fails(openai.NotFoundError, lambda: stranger.files.retrieve(file), param="id")
    fails(openai.NotFoundError, lambda: stranger.files.delete(file), param="id")
    fails(openai.NotFoundError, lambda: stranger.fine_tuning.jobs.retrieve(job), code="fine_tune_not_found")
    create = stranger.fine_tuning.jobs.create
    fails(openai.BadRequestError, lambda: create(model=session.base, training_file=file), param="training_file")
    same("the stranger's lists", (list(stranger.files.list()), list(stranger.fine_tuning.jobs.list())), ([], []))


def error_too_large(session: Session) -> None:
    once = session.client.with_options(max_retries=0)
    huge = user("x" * (34 << 20))
    fails(
        openai.APIStatusError, lambda: once.chat.completions.create(model=session.base, messages=huge), status_code=413
    )


def error_request_id(session: Session) -> None:
    error = _bad_chat(session, "invalid_value", "n", n=0)
    holds("request_id", (error.request_id or "").startswith("req_"), error.request_id)
    same("status_code and type", (error.status_code, error.type), (400, "invalid_request_error"))


def _bad_chat(session: Session, code: str, param: str, **options: Any) -> openai.BadRequestError:
    options = {"model": session.base, "messages": user(QUESTION), **options}
    return fails(
        openai.BadRequestError, lambda: session.client.chat.completions.create(**options), code=code, param=param
    )


def _forbidden(call: Callable[[], Any], scope: str) -> None:
    error = fails(openai.PermissionDeniedError, call, code="insufficient_permissions")
    holds("the message names the scope", f"`{scope}`" in error.message, error.message)
