"""The seam to a language model that writes rows, and its errors. Which one it is, the settings say."""

import os
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from tuneloom.config import DraftProviderSettings
from tuneloom.control.drafting.prompts import Prompt
from tuneloom.domain import JobError

MAX_MESSAGE = 300
MAX_RETRY_AFTER_S = 60.0


class ProviderFailure(Exception):
    """A call that gave nothing. `is_final`: the next one would give nothing either.

    `retry_after_s` is what the provider asked for, up to a minute.
    """

    def __init__(self, code: str, message: str, *, is_final: bool, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.error = JobError(code=code, message=message)
        self.is_final = is_final
        self.retry_after_s = min(retry_after_s, MAX_RETRY_AFTER_S)


@dataclass(frozen=True)
class Answer:
    """`ended`: by itself, cut off at its longest, or withheld by the provider's rules. Tokens are what the provider
    counted, None where it did not.
    """

    text: str
    ended: Literal["stop", "length", "blocked"]
    input_tokens: int | None
    output_tokens: int | None
    model_version: str | None = None


class Provider(Protocol):
    def answer(
        self, prompt: Prompt, *, schema: dict[str, Any], temperature: float, seed: int, max_tokens: int
    ) -> Answer:
        """One call, with the attempts and the time that the settings allow.

        Raises:
            ProviderFailure: it was refused, or nothing came.
        """
        ...

    def close(self) -> None: ...


def open_provider(name: str, settings: DraftProviderSettings, model: str) -> Provider:
    """Raises ProviderFailure if its key cannot be read."""
    key = _read_key(name, settings)
    if settings.kind == "gemini":
        from tuneloom.control.drafting.gemini import Gemini

        return Gemini(name, settings, model, key)
    from tuneloom.control.drafting.openai import OpenAICompatible

    return OpenAICompatible(name, settings, model, key)


def refusal(name: str, status: int, message: str, key: str | None, *, retry_after_s: float = 0.0) -> ProviderFailure:
    """What an HTTP status of a provider means. Its message may repeat the key, which is then taken out."""
    said = " ".join(message.split())
    if key:
        said = said.replace(key, "***")
    if len(said) > MAX_MESSAGE:
        said = said[:MAX_MESSAGE] + "..."
    told = f"The provider `{name}` answered {status}: {said}"
    if status in (401, 403):
        return ProviderFailure("provider_key_refused", told, is_final=True)
    if status == 429 or status == 408 or status >= 500:
        return ProviderFailure("provider_unavailable", told, is_final=False, retry_after_s=retry_after_s)
    return ProviderFailure("provider_refused", told, is_final=True)


def seconds(text: str | None) -> float:
    """What `Retry-After` says in seconds; 0 for nothing, and for a date."""
    return float(text[:6]) if text is not None and text.isascii() and text.isdecimal() else 0.0


def silence(name: str, timeout_s: float, error: Exception) -> ProviderFailure:
    """No answer, or none that was whole."""
    kind = type(error).__name__
    missed = f"no answer within {timeout_s:g} s" if "Timeout" in kind else "no whole answer"
    return ProviderFailure("provider_unavailable", f"The provider `{name}` gave {missed}: {kind}.", is_final=False)


def nonsense(name: str) -> ProviderFailure:
    """An answer that is none. It may have been cut on its way, and come whole the next time."""
    told = f"The provider `{name}` answered 200, and this is no chat completion; is `base_url` right?"
    return ProviderFailure("provider_refused", told, is_final=False)


def count(value: object) -> int | None:
    """A number of tokens, if it can be one: a budget is not to grow by it."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _read_key(name: str, settings: DraftProviderSettings) -> str | None:
    where = f"drafting.providers.{name}"
    key: str | None = None
    if settings.api_key_env is not None:
        key = os.environ.get(settings.api_key_env, "").strip()
        where, source = f"{where}.api_key_env", f"the variable `{settings.api_key_env}` is not set"
    elif settings.api_key_file is not None:
        where, source = f"{where}.api_key_file", f"{settings.api_key_file} cannot be read, or is empty"
        try:
            key = settings.api_key_file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            key = ""
    if key == "":
        raise ProviderFailure("provider_key_missing", f"`{where}`: {source} where drafters run.", is_final=True)
    return key
