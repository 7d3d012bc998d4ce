"""Calls of `models`, and of the model that the finished job has made."""

from urllib.parse import quote

import openai
from openai.types import Model, ModelDeleted

from tests.conformance.calls_jobs import SUFFIX
from tests.conformance.session import QUESTION, Session, fails, holds, is_a, more, same, user

PINNED = f"{SUFFIX}@v1"


def models_list(session: Session) -> None:
    page = session.client.models.list()
    same("object", page.object, "list")
    by_id = {model.id: model for model in page}
    for name in (session.base, *_names(session)):
        holds(f"`{name}` is listed", name in by_id, sorted(by_id))
    tuned = by_id[SUFFIX]
    is_a(tuned, Model)
    same("object and owned_by", (tuned.object, tuned.owned_by), ("model", session.owner))
    holds("created in seconds", isinstance(tuned.created, int) and tuned.created > 1_700_000_000, tuned.created)
    same("root or parent", more(tuned, "parent"), session.base)


def models_retrieve_base(session: Session) -> None:
    model = session.client.models.retrieve(session.base)
    is_a(model, Model)
    same("model", (model.id, model.object), (session.base, "model"))
    same("max_model_len", more(model, "max_model_len"), session.context_length)


def models_retrieve_tuned(session: Session) -> None:
    for name in (*_names(session), session.earlier("checkpoint").fine_tuned_model_checkpoint):
        model = session.client.models.retrieve(name)
        same("model", (model.id, model.object, model.owned_by), (name, "model", session.owner))


def models_retrieve_unknown(session: Session) -> None:
    retrieve = session.client.models.retrieve
    for name in ("no-such-model", "no/such/model", f"{SUFFIX}@v99"):
        fails(openai.NotFoundError, lambda name=name: retrieve(name), code="model_not_found")


def models_chat_tuned(session: Session) -> None:
    answers = [session.ask(model=name) for name in _names(session)]
    same("models", [answer.model for answer in answers], _names(session))
    same("different answers", len({answer.choices[0].message.content for answer in answers}), 1)
    same("different weights", len({answer.system_fingerprint for answer in answers}), 1)
    holds("not those of the base", answers[0].system_fingerprint != session.ask().system_fingerprint)


def models_chat_checkpoint(session: Session) -> None:
    name = session.earlier("checkpoint").fine_tuned_model_checkpoint
    answer = session.ask(model=name)
    same("model", answer.model, name)
    holds("content", isinstance(answer.choices[0].message.content, str))
    holds("not the base", answer.system_fingerprint != session.ask().system_fingerprint)


def models_chat_in_url(session: Session) -> None:
    for name in (SUFFIX, session.earlier("finished").fine_tuned_model):
        client = session.client_with(session.key, base_url=f"{session.base_url}/{quote(name)}")
        answer = client.chat.completions.create(
            model=name, messages=user(QUESTION), temperature=0, max_completion_tokens=8
        )
        same("text", answer.choices[0].message.content, session.ask(model=name).choices[0].message.content)
        same("models", [model.id for model in client.models.list()], [name])


def models_foreign(session: Session) -> None:
    stranger = session.client_with(session.mint(f"{session.owner}-2", "inference", "training")["secret"])
    chat, missing = stranger.chat.completions.create, {"code": "model_not_found", "param": "model"}
    for name in _names(session):
        fails(openai.NotFoundError, lambda name=name: chat(model=name, messages=user(QUESTION)), **missing)
        fails(openai.NotFoundError, lambda name=name: stranger.models.retrieve(name), **missing)
        fails(openai.NotFoundError, lambda name=name: stranger.models.delete(name), **missing)
    holds("not in the list", not {model.id for model in stranger.models.list()} & set(_names(session)))


def models_delete_base(session: Session) -> None:
    fails(openai.PermissionDeniedError, lambda: session.client.models.delete(session.base), status_code=403)
    same("it still answers", session.ask().model, session.base)


def models_delete(session: Session) -> None:
    name = session.earlier("finished").fine_tuned_model
    deleted = session.client.models.delete(SUFFIX)
    is_a(deleted, ModelDeleted)
    same("answer", (deleted.id, deleted.object, deleted.deleted), (SUFFIX, "model", True))
    for gone in (SUFFIX, PINNED, name):
        fails(openai.NotFoundError, lambda gone=gone: session.ask(model=gone), code="model_not_found")
    left = {model.id for model in session.client.models.list()} & {SUFFIX, PINNED, name}
    same("what is left in the list", left, set())


def models_delete_again(session: Session) -> None:
    fails(openai.NotFoundError, lambda: session.client.models.delete(SUFFIX), code="model_not_found")


def _names(session: Session) -> list[str]:
    return [SUFFIX, PINNED, session.earlier("finished").fine_tuned_model]
