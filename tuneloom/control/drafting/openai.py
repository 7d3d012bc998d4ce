"""Any endpoint that speaks OpenAI's chat completions, by the package `openai`: OpenAI's own, vLLM, Ollama, or ours."""

import random
import time
from typing import Any

import openai

from tuneloom.config import DraftProviderSettings
from tuneloom.control.drafting.prompts import Prompt
from tuneloom.control.drafting.providers import MAX_RETRY_AFTER_S, Answer, count, nonsense, refusal, seconds, silence

_ENDS = {"stop": "stop", "length": "length", "content_filter": "blocked"}


class OpenAICompatible:
    """Not every endpoint knows all fields. What one refuses by name is not sent to it again.

    The form of replies falls from a JSON schema to any JSON object to what the prompt alone asks for.
    """

    def __init__(self, name: str, settings: DraftProviderSettings, model: str, key: str | None) -> None:
        assert settings.base_url is not None, "checked by the settings"
        self._name, self._settings, self._model, self._key = name, settings, model, key
        self._forms = ["json_schema", "json_object", "none"]
        self._length_field = "max_tokens"
        # In each request, so that no variable of the environment says whose account it is.
        nothing = openai.Omit()
        self._headers: Any = {
            "Authorization": f"Bearer {key}" if key else nothing,
            "OpenAI-Organization": nothing,
            "OpenAI-Project": nothing,
        }
        self._client = openai.OpenAI(
            base_url=settings.base_url,
            api_key=key or "none",
            timeout=settings.timeout_s,
            # Its own pauses cannot be set.
            max_retries=0,
            # A key goes to the address of the settings and to no other.
            http_client=openai.DefaultHttpxClient(follow_redirects=False),
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
            try:
                return self._read(self._send(body))
            except openai.APIStatusError as error:
                if not self._learns(error):
                    wait_s = seconds(error.response.headers.get("retry-after"))
                    said = _message(error)
                    raise refusal(self._name, error.status_code, said, self._key, retry_after_s=wait_s) from None

    def close(self) -> None:
        self._client.close()

    def _learns(self, error: openai.APIStatusError) -> bool:
        """Whether the refusal is of a field that can be done without, and then it will be."""
        if error.status_code not in (400, 422):
            return False
        said = error.response.text
        if self._length_field == "max_tokens" and "max_completion_tokens" in said:
            self._length_field = "max_completion_tokens"
            return True
        if len(self._forms) > 1 and any(word in said for word in ("response_format", "json_schema", "json_object")):
            del self._forms[0]
            return True
        return False

    def _send(self, body: dict[str, Any]) -> Any:
        """The completion, by one of the attempts. Raises APIStatusError with what the last one was refused for."""
        for attempt in range(1, self._settings.attempts + 1):
            is_last, wanted = attempt == self._settings.attempts, None
            try:
                return self._client.chat.completions.create(**body, extra_headers=self._headers)
            except openai.APIConnectionError as error:
                if is_last:
                    is_late = isinstance(error, openai.APITimeoutError)
                    cause = error if is_late or not isinstance(error.__cause__, Exception) else error.__cause__
                    raise silence(self._name, self._settings.timeout_s, cause) from None
            except openai.APIStatusError as error:
                status = error.status_code
                if is_last or not (status in (408, 409, 429) or status >= 500):
                    raise
                wanted = error.response.headers.get("retry-after")
            except (ValueError, openai.APIResponseValidationError):
                raise nonsense(self._name) from None
            time.sleep(self._delay(attempt, wanted))
        raise AssertionError("the last attempt returns or raises")

    def _delay(self, attempt: int, retry_after: str | None = None) -> float:
        if wanted_s := seconds(retry_after):
            return min(wanted_s, MAX_RETRY_AFTER_S)
        longest = min(self._settings.retry_delay_s * 2 ** (attempt - 1), MAX_RETRY_AFTER_S)
        return longest * random.uniform(0.5, 1)

    def _read(self, completion: Any) -> Answer:
        """Nothing of it is checked by the client, and endpoints differ."""
        try:
            choice, usage = completion.choices[0], completion.usage
            text = _text(choice.message.content)
            ended = _ENDS.get(getattr(choice, "finish_reason", None) or "stop", "stop")
            if choice.message.refusal and not text:
                ended = "blocked"
            given, made = (count(getattr(usage, name, None)) for name in ("prompt_tokens", "completion_tokens"))
            model = str(getattr(completion, "model", None) or "") or None
        except (LookupError, TypeError, AttributeError):
            raise nonsense(self._name) from None
        return Answer(text, ended, given, made, model)  # type: ignore[arg-type]


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


def _message(error: openai.APIStatusError) -> str:
    # The client has taken the body out of its `error`.
    said = error.body.get("message") if isinstance(error.body, dict) else error.body
    return str(said) if said else error.response.text[:1000]
