"""What the calls of one run share: clients, an owner of their own, what earlier calls made. Needs `openai` alone."""

import json
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import openai

E = TypeVar("E", bound=Exception)

TIMEOUT_S = 120.0
QUESTION = "Which colour has the sky?"
WORDS = ("rain", "sun", "fox", "dog", "cafe", "green", "blue", "left", "right", "weather", "yes", "no")


class Unmet(Exception):
    """What the server did is not what an `openai` user may expect."""


class Lacking(Exception):
    """The client has no such call, or the settings of the server do not allow what it needs."""


@dataclass
class Session:
    """One owner on a running server. Calls run in order and find here what earlier ones made."""

    base_url: str
    key: str
    owner: str
    client: openai.OpenAI
    admin: openai.OpenAI
    base: str
    context_length: int
    token_id: int
    token: str
    other_id: int
    other: str
    began: int
    made: dict[str, Any] = field(default_factory=dict)

    def earlier(self, name: str) -> Any:
        """What an earlier call has left under `name`."""
        if name not in self.made:
            raise Unmet(f"an earlier call did not leave `{name}`")
        return self.made[name]

    def mint(self, owner: str, *scopes: str) -> Any:
        """A new key of `owner`, as the admin API shows it."""
        body = {"name": "conformance", "owner": owner, "scopes": list(scopes)}
        return self.admin.post("/tuneloom/keys", body=body, cast_to=object)

    def client_with(self, key: str, *, base_url: str | None = None) -> openai.OpenAI:
        return openai.OpenAI(base_url=base_url or self.base_url, api_key=key, timeout=TIMEOUT_S, max_retries=0)

    def ask(self, text: str = QUESTION, *, model: str | None = None, **options: Any) -> Any:
        """A short greedy answer."""
        options = {"temperature": 0, "max_completion_tokens": 8, **options}
        return self.client.chat.completions.create(model=model or self.base, messages=user(text), **options)

    @property
    def always(self) -> dict[str, int]:
        """A `logit_bias` with which `token` is the only thing that is ever said."""
        return {str(self.token_id): 100}

    @property
    def either(self) -> dict[str, int]:
        """A `logit_bias` with which nothing but `token` and `other` is said."""
        return {str(self.token_id): 100, str(self.other_id): 100}


def open_session(base_url: str, api_key: str, base: str | None = None) -> Session:
    """A session of a new owner. `api_key` is an admin's; `base` is the first one that is served unless given."""
    began = int(time.time())
    admin = openai.OpenAI(base_url=base_url, api_key=api_key, timeout=TIMEOUT_S, max_retries=2)
    served = [model for model in admin.models.list() if model.owned_by == "tuneloom"]
    chosen = next((model for model in served if model.id == (base or more(model, "root"))), None)
    if chosen is None:
        raise Unmet(f"the server has no base `{base}`; it has {[model.id for model in served]}")
    owner = f"conformance-{secrets.token_hex(4)}"
    body = {"name": "conformance", "owner": owner, "scopes": ["inference", "training"]}
    key: Any = admin.post("/tuneloom/keys", body=body, cast_to=object)
    client = openai.OpenAI(base_url=base_url, api_key=key["secret"], timeout=TIMEOUT_S, max_retries=2)
    first, second = _letters(client, chosen.id)
    length = more(chosen, "max_model_len")
    return Session(base_url, key["secret"], owner, client, admin, chosen.id, length, *first, *second, began)


def _letters(client: openai.OpenAI, model: str) -> list[tuple[int, str]]:
    """Two tokens of the model's vocabulary that are one letter each, found by letting the server echo token ids."""
    ids = list(range(3, 120))
    twice = [[id, id] for id in ids]
    answer = client.completions.create(model=model, prompt=twice, echo=True, max_tokens=1, temperature=0)
    found = [(id, choice.text[:1]) for id, choice in zip(ids, answer.choices, strict=True) if _is_letter(choice.text)]
    if len(found) < 2:
        raise Unmet(f"no two tokens of {ids[0]}-{ids[-1]} are letters")
    return found[:2]


def _is_letter(echoed: str) -> bool:
    letter = echoed[:1]
    return letter.isascii() and letter.isalpha() and echoed.startswith(letter * 2)


def clean_up(session: Session) -> None:
    """Remove what the run has made; what is left stays with its owner, whom nobody else sees."""
    quiet = session.client.with_options(max_retries=0)
    for job in quiet.fine_tuning.jobs.list(limit=100):
        if job.status not in ("succeeded", "failed", "cancelled"):
            quiet.fine_tuning.jobs.cancel(job.id)
    for file in quiet.files.list():
        quiet.files.delete(file.id)
    for key in session.admin.get(f"/tuneloom/keys?owner={session.owner}", cast_to=object)["data"]:  # type: ignore[index]
        session.admin.delete(f"/tuneloom/keys/{key['id']}", cast_to=object)


def user(text: Any) -> Any:
    return [{"role": "user", "content": text}]


def rows(count: int, answer: str = "serious") -> bytes:
    """Training rows that even a tiny model learns something from."""
    lines = []
    for i in range(count):
        word = WORDS[i % len(WORDS)]
        messages = [*user(f"{word} {i}"), {"role": "assistant", "content": f"{answer} {word}"}]
        lines.append(json.dumps({"messages": messages}))
    return ("\n".join(lines) + "\n").encode()


def more(thing: Any, name: str) -> Any:
    """A field that is ours beyond OpenAI's."""
    return (thing.model_extra or {}).get(name)


def same(what: str, actual: Any, expected: Any) -> None:
    if actual != expected:
        raise Unmet(f"{what}: got {actual!r}, expected {expected!r}")


def holds(what: str, is_so: Any, seen: Any = None) -> None:
    """`is_so` or not at all; `seen` is what to show then."""
    if not is_so:
        raise Unmet(f"{what}: got {seen!r}")


def is_a(thing: Any, kind: type) -> None:
    holds(f"an object of the type {kind.__name__}", isinstance(thing, kind), type(thing).__name__)


def fails(kind: type[E], call: Callable[[], Any], **expected: Any) -> E:
    """The error that `call` raises; its attributes are as `expected`, or it is not the right one."""
    try:
        result = call()
    except kind as error:
        for name, value in expected.items():
            same(f"{kind.__name__}.{name}", getattr(error, name), value)
        return error
    raise Unmet(f"no {kind.__name__}; it answered {result!r}")


def wait_for(what: str, check: Callable[[], Any], timeout_s: float, every_s: float = 0.5) -> Any:
    """The first true value of `check`."""
    deadline = time.monotonic() + timeout_s
    while not (value := check()):
        if time.monotonic() > deadline:
            raise Unmet(f"{what}: not within {timeout_s:.0f} s")
        time.sleep(every_s)
    return value
