"""Any endpoint that speaks OpenAI's chat completions: OpenAI's own, vLLM, Ollama, or this installation."""

import random
import time
from collections.abc import Callable
from typing import Any

import httpx

from tuneloom.config import DraftProviderSettings
from tuneloom.control.drafting.prompts import Prompt
from tuneloom.control.drafting.providers import MAX_RETRY_AFTER_S, Answer, count, nonsense, refusal, seconds, silence

_ENDS = {"stop": "stop", "length": "length", "content_filter": "blocked"}


class OpenAICompatible:
    """Not every endpoint knows all fields. What one refuses by name is not sent to it again.

    The form of replies falls from a JSON schema to any JSON object to what the prompt alone asks for.
    """

    def __init__(
        self,
        name: str,
        settings: DraftProviderSettings,
        model: str,
        key: str | None,
        *,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        assert settings.base_url is not None, "checked by the settings"
        self._name, self._settings, self._model, self._key = name, settings, model, key
        self._forms = ["json_schema", "json_object", "none"]
        self._length_field = "max_tokens"
        self._sleep = sleep
        self._client = httpx.Client(
            base_url=settings.base_url.rstrip("/") + "/",
            headers={"authorization": f"Bearer {key}"} if key else {},
            timeout=settings.timeout_s,
            transport=transport,
        )

    def answer(
        self, prompt: Prompt, *, schema: dict[str, Any], temperature: float, seed: int, max_tokens: int
    ) -> Answer:
        while True:
            body = {
                "model": self._model,
                "messages": [
                    {"role": "system", "content": prompt.system},
                    {"role": "user", "content": prompt.user},
                ],
                "temperature": temperature,
                "seed": seed,
                self._length_field: max_tokens,
                **_form(self._forms[0], schema),
            }
            response = self._send(body)
            if response.is_success:
                return self._read(response)
            if not self._learns(response):
                wait_s = seconds(response.headers.get("retry-after"))
                raise refusal(self._name, response.status_code, _message(response), self._key, retry_after_s=wait_s)

    def close(self) -> None:
        self._client.close()

    def _learns(self, response: httpx.Response) -> bool:
        """Whether the refusal is of a field that can be done without, and then it will be."""
        if response.status_code not in (400, 422):
            return False
        said = response.text
        if self._length_field == "max_tokens" and "max_completion_tokens" in said:
            self._length_field = "max_completion_tokens"
            return True
        if len(self._forms) > 1 and any(word in said for word in ("response_format", "json_schema", "json_object")):
            del self._forms[0]
            return True
        return False

    def _send(self, body: dict[str, Any]) -> httpx.Response:
        """The answer of the last attempt."""
        for attempt in range(1, self._settings.attempts + 1):
            is_last = attempt == self._settings.attempts
            try:
                response = self._client.post("chat/completions", json=body)
            except httpx.TransportError as error:
                if is_last:
                    raise silence(self._name, self._settings.timeout_s, error) from None
                self._sleep(self._delay(attempt))
                continue
            status = response.status_code
            if is_last or not (status in (408, 409, 429) or status >= 500):
                break
            self._sleep(self._delay(attempt, response.headers.get("retry-after")))
        return response

    def _delay(self, attempt: int, retry_after: str | None = None) -> float:
        if wanted_s := seconds(retry_after):
            return min(wanted_s, MAX_RETRY_AFTER_S)
        longest = min(self._settings.retry_delay_s * 2 ** (attempt - 1), MAX_RETRY_AFTER_S)
        return longest * random.uniform(0.5, 1)

    def _read(self, response: httpx.Response) -> Answer:
        try:
            data = response.json()
            choice = data["choices"][0]
            message = choice["message"]
            usage = data.get("usage") or {}
            text = _text(message.get("content"))
            ended = _ENDS.get(choice.get("finish_reason") or "stop", "stop")
            if message.get("refusal") and not text:
                ended = "blocked"
            given, made = (count(usage.get(name)) for name in ("prompt_tokens", "completion_tokens"))
        except (ValueError, LookupError, TypeError, AttributeError):
            raise nonsense(self._name) from None
        return Answer(text, ended, given, made, str(data.get("model") or "") or None)  # type: ignore[arg-type]


def _form(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    if name == "json_schema":
        wanted = {"name": "rows", "strict": True, "schema": schema}
        return {"response_format": {"type": "json_schema", "json_schema": wanted}}
    return {"response_format": {"type": "json_object"}} if name == "json_object" else {}


def _text(content: Any) -> str:
    """The text of a message, also where it comes in parts, thoughts among them."""
    if isinstance(content, list):
        return "".join(part["text"] for part in content if part.get("type") == "text")
    return str(content or "")


def _message(response: httpx.Response) -> str:
    try:
        error = response.json()["error"]
        return str(error["message"]) if isinstance(error, dict) else str(error)
    except (ValueError, LookupError, TypeError):
        return response.text[:1000]
