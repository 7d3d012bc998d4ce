"""Google's Gemini by the package `google-genai`, with its structured output; by key, or through Vertex AI.

Vertex AI knows the machine by its Application Default Credentials: on GKE by the workload's identity.
"""

import logging
import time
from typing import Any

from google import genai
from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError, TransportError
from google.genai import errors, types

from tuneloom.config import DraftProviderSettings
from tuneloom.control.drafting.prompts import Prompt
from tuneloom.control.drafting.providers import Answer, ProviderFailure, count, refusal, seconds, silence

logger = logging.getLogger(__name__)

# Reasons to end that mean a whole text, or one that was cut off. All others withhold it.
_ENDS = {"STOP": "stop", "MAX_TOKENS": "length"}
MAX_SEED = 2**31 - 1


class Gemini:
    """A client retries only if it is told to: see `retry_options`."""

    def __init__(self, name: str, settings: DraftProviderSettings, model: str, key: str | None) -> None:
        if key is None and settings.project is None:
            raise ProviderFailure(
                "provider_key_missing",
                f"`drafting.providers.{name}`: Gemini needs a key (`api_key_env` or `api_key_file`), or a `project`.",
                is_final=True,
            )
        self._name, self._settings, self._model, self._key = name, settings, model, key
        # Not by the environment's variables: which project pays is the settings' to say.
        is_vertex = settings.project is not None
        self._client = genai.Client(
            vertexai=is_vertex,
            project=settings.project,
            location=settings.location if is_vertex else None,
            api_key=key,
            http_options=types.HttpOptions(
                base_url=settings.base_url,
                timeout=int(settings.timeout_s * 1000),
                retry_options=types.HttpRetryOptions(
                    attempts=settings.attempts,
                    initial_delay=settings.retry_delay_s,
                    max_delay=settings.retry_delay_s * 32,
                    jitter=settings.retry_delay_s / 2,
                ),
            ),
        )

    def answer(
        self, prompt: Prompt, *, schema: dict[str, Any], temperature: float, seed: int, max_tokens: int
    ) -> Answer:
        budget = self._settings.thinking_budget
        config = types.GenerateContentConfig(
            system_instruction=prompt.system,
            temperature=temperature,
            seed=seed % MAX_SEED,
            max_output_tokens=max_tokens,
            response_mime_type="application/json",
            response_json_schema=schema,
            thinking_config=None if budget is None else types.ThinkingConfig(thinking_budget=budget),
        )
        for attempt in range(1, self._settings.attempts + 1):
            try:
                return _read(
                    self._client.models.generate_content(model=self._model, contents=prompt.user, config=config)
                )
            except errors.APIError as error:
                said = f"{error.status}: {error.message}"
                raise refusal(self._name, error.code, said, self._key, retry_after_s=_retry_after_s(error)) from None
            except GoogleAuthError as error:
                raise self._unknown(error) from None
            except Exception as error:
                # The SDK lets errors of its HTTP client through, of one of two packages, and tries none of them again.
                if attempt == self._settings.attempts:
                    raise silence(self._name, self._settings.timeout_s, error) from None
            time.sleep(self._settings.retry_delay_s * 2 ** (attempt - 1))
        raise AssertionError("the last attempt returns or raises")

    def close(self) -> None:
        self._client.close()

    def _unknown(self, error: GoogleAuthError) -> ProviderFailure:
        """What it means that Vertex AI could not be told who calls."""
        if error.retryable or isinstance(error, TransportError):
            return silence(self._name, self._settings.timeout_s, error)
        where = f"`drafting.providers.{self._name}.project`"
        if isinstance(error, DefaultCredentialsError):
            told = "there are no Application Default Credentials where drafters run"
            return ProviderFailure("provider_key_missing", f"{where}: {told}.", is_final=True)
        logger.warning("Vertex AI's credentials were refused: %s: %s", self._name, error)
        told = "the Application Default Credentials were refused"
        return ProviderFailure("provider_key_refused", f"{where}: {told}. See the server's log.", is_final=True)


def _retry_after_s(error: errors.APIError) -> float:
    """What the provider asks for in the error's `RetryInfo`, which the SDK does not heed, or in a header."""
    try:
        details = error.details["error"].get("details") or ()
        told = next(str(each["retryDelay"]) for each in details if "retryDelay" in each)
        return max(0.0, float(told.removesuffix("s")))
    except (LookupError, TypeError, ValueError, AttributeError, StopIteration):
        headers = getattr(error.response, "headers", None) or {}
        return seconds(headers.get("retry-after"))


def _read(response: types.GenerateContentResponse) -> Answer:
    usage = response.usage_metadata
    given = None if usage is None else count(usage.prompt_token_count)
    total = None if usage is None else count(usage.total_token_count)
    counted = {
        "input_tokens": given,
        # What was thought is paid for as well, and is only in the total.
        "output_tokens": None if total is None else max(0, total - (given or 0)),
        "model_version": response.model_version,
    }
    if not response.candidates:
        return Answer("", "blocked" if response.prompt_feedback else "stop", **counted)
    first = response.candidates[0]
    parts = first.content.parts if first.content is not None and first.content.parts else []
    text = "".join(part.text for part in parts if part.text and not part.thought)
    reason = first.finish_reason.name if first.finish_reason is not None else "STOP"
    ended = _ENDS.get(reason, "blocked")
    return Answer(text, ended, **counted)  # type: ignore[arg-type]
