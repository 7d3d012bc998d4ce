"""The client of OpenAI against endpoints that speak its protocol each in their own way."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.control.drafting.model import Ask, Reply
from tests.control.drafting.openai_server import OpenAIServer
from tuneloom.config import DraftProviderSettings
from tuneloom.control.drafting.openai import OpenAICompatible
from tuneloom.control.drafting.prompts import Prompt
from tuneloom.control.drafting.providers import Answer, ProviderFailure


class Verbatim(OpenAIServer):
    """Answers with the JSON that the model says, and nothing of its own."""

    def read(self, number: int, path: str, headers: dict[str, str], body: dict[str, Any]) -> Ask:
        return Ask(number, path, headers, body, {}, 0.0, 0, False)

    def write(self, ask: Ask, reply: Reply) -> dict[str, Any]:
        return json.loads(reply.text)


Says = Callable[..., tuple[Answer, dict[str, str]]]


@pytest.fixture
def says() -> Iterator[Says]:
    """What is made of an answer, and the headers that were sent for it."""
    with Verbatim(lambda ask: Reply("{}")) as server:

        def ask(data: Any, *, key: str | None = "k", **reply: Any) -> tuple[Answer, dict[str, str]]:
            server.model = lambda ask: Reply(json.dumps(data), **reply)
            given = {"kind": "openai", "base_url": server.url, "models": ["m"], "retry_delay_s": 0.01, "attempts": 1}
            provider = OpenAICompatible("test", DraftProviderSettings.model_validate(given), "m", key)
            try:
                answer = provider.answer(Prompt("s", "u"), schema={}, temperature=0.5, seed=1, max_tokens=9)
            finally:
                provider.close()
            return answer, server.asks[-1].headers

        yield ask


def completion(content: Any = "hi", **choice: Any) -> dict[str, Any]:
    return {
        "choices": [{"index": 0, "message": {"role": "assistant", "content": content, **choice.pop("message", {})}}]
    }


def test_whose_account_it_is_the_settings_say_and_no_variable(says: Says, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ORG_ID", "PROJECT_ID", "API_KEY", "ADMIN_KEY"):
        monkeypatch.setenv(f"OPENAI_{name}", "of-the-environment")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "Authorization: of-the-environment")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/v1")
    _, headers = says(completion())
    assert headers["user-agent"].startswith("OpenAI/") and headers["authorization"] == "Bearer k"
    _, without = says(completion(), key=None)
    assert "authorization" not in without
    assert "of-the-environment" not in {*headers.values(), *without.values()}


@pytest.mark.parametrize(
    ("data", "text", "ended", "tokens"),
    [
        ({"choices": [{"message": {"content": "bare"}}]}, "bare", "stop", (None, None)),
        (completion([{"type": "thinking", "x": 1}, {"type": "text", "text": "a"}]), "a", "stop", (None, None)),
        (completion(None), "", "stop", (None, None)),
        (completion(None, message={"refusal": "no"}), "", "blocked", (None, None)),
        ({**completion(), "usage": None}, "hi", "stop", (None, None)),
        ({**completion(), "usage": {"prompt_tokens": "5", "completion_tokens": -3}}, "hi", "stop", (None, None)),
        ({**completion(), "usage": {"prompt_tokens": 5, "completion_tokens": 3}}, "hi", "stop", (5, 3)),
    ],
)
def test_what_an_endpoint_leaves_out_is_done_without(
    says: Says, data: Any, text: str, ended: str, tokens: tuple[int | None, int | None]
) -> None:
    answer, _ = says(data)
    assert (answer.text, answer.ended, (answer.input_tokens, answer.output_tokens)) == (text, ended, tokens)


@pytest.mark.parametrize("data", [{}, [], None, "x", {"choices": []}, {"choices": [None]}, {"choices": [{}]}])
def test_what_is_no_completion_is_said_to_be_none(says: Says, data: Any) -> None:
    with pytest.raises(ProviderFailure, match="is `base_url` right"):
        says(data)


def test_a_redirect_gets_no_key(says: Says) -> None:
    with pytest.raises(ProviderFailure, match="answered 302") as caught:
        says(completion(), status=302, headers={"location": "/elsewhere"})
    assert caught.value.is_final
