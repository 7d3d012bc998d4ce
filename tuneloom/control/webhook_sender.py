"""One delivery: signed, sent, and what came of it. Knows no store."""

import http.client
import random
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime
from importlib.metadata import version

from tuneloom.config import WebhookSettings
from tuneloom.control import outbound
from tuneloom.control.outbound import Answer, NotAllowed
from tuneloom.control.webhook_secrets import signature
from tuneloom.domain import WebhookDelivery, WebhookTry

# From the end of one try to the next; Standard Webhooks' schedule. After the last one the delivery is dead.
PAUSES_S = (5.0, 300.0, 1800.0, 7200.0, 18_000.0, 36_000.0, 50_400.0, 72_000.0, 86_400.0)
JITTER = 0.1
MAX_RETRY_AFTER_S = 86_400.0
GONE = 410
_BUSY = frozenset({429, 502, 503, 504})
_MAX_ERROR = 200


@dataclass(frozen=True)
class Outcome:
    """What came of a try. `retry_after_s` is what the receiver asked for."""

    tried: WebhookTry
    retry_after_s: float = 0.0

    @property
    def is_success(self) -> bool:
        return self.tried.error is None

    @property
    def is_gone(self) -> bool:
        return self.tried.status == GONE


class Sender:
    """Thread-safe. `tls`, `resolve` and `clock` (Unix seconds) are for tests."""

    def __init__(
        self,
        settings: WebhookSettings,
        *,
        tls: ssl.SSLContext | None = None,
        resolve: outbound.Resolve = outbound.resolve,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._settings = settings
        self._tls = tls or ssl.create_default_context()
        self._resolve = resolve
        self._clock = clock
        self._agent = f"tuneloom/{version('tuneloom')}"

    def send(self, url: str, delivery: WebhookDelivery, secrets: Sequence[str]) -> Outcome:
        """One try. Whatever a receiver does comes back as an Outcome."""
        at, started = self._clock(), time.monotonic()

        def tried(status: int | None, error: str | None, response: str = "") -> WebhookTry:
            seconds = round(time.monotonic() - started, 3)
            return WebhookTry(at=at, seconds=seconds, status=status, error=error, response=response)

        try:
            answer = self._post(url, delivery, secrets, int(at))
        except NotAllowed as error:
            return Outcome(tried(None, error.message))
        except TimeoutError:
            return Outcome(tried(None, f"No answer within {self._settings.timeout_s:g} s."))
        except ssl.SSLCertVerificationError as error:
            return Outcome(tried(None, f"The certificate does not hold: {error.verify_message[:_MAX_ERROR]}."))
        except (OSError, http.client.HTTPException) as error:
            return Outcome(tried(None, f"The connection failed: {_say(error)}."))
        return Outcome(tried(answer.status, _fault(answer.status), answer.text), _retry_after_s(answer, at))

    def _post(self, url: str, delivery: WebhookDelivery, secrets: Sequence[str], timestamp: int) -> Answer:
        allow_private = self._settings.allow_private
        parts = outbound.check_url(url, allow_private=allow_private)
        addresses = outbound.pick_addresses(parts, allow_private=allow_private, resolve=self._resolve)
        body = delivery.body.encode()
        headers = {
            "content-type": "application/json",
            "user-agent": self._agent,
            "webhook-id": delivery.id,
            "webhook-timestamp": str(timestamp),
            "webhook-signature": " ".join(signature(secret, delivery.id, timestamp, body) for secret in secrets),
        }
        return outbound.post(parts, addresses, body, headers, timeout_s=self._settings.timeout_s, tls=self._tls)


def pause_s(attempts: int, retry_after_s: float = 0.0, draw: Callable[[], float] = random.random) -> float | None:
    """Seconds until the next try after so many; None if there is none. `draw` gives 0 to 1."""
    if attempts > len(PAUSES_S):
        return None
    pause = PAUSES_S[attempts - 1] * (1 + JITTER * (2 * draw() - 1))
    return max(pause, retry_after_s)


def _fault(status: int) -> str | None:
    """Why an answer of this status is no success; None if it is one."""
    if 200 <= status < 300:
        return None
    if 300 <= status < 400:
        return f"The receiver answered {status}; redirects are not followed. Give the endpoint its final URL."
    return f"The receiver answered {status}."


def _retry_after_s(answer: Answer, now: float) -> float:
    """What `Retry-After` asks for, in seconds or as a date, up to a day; 0 if nothing."""
    text = answer.headers.get("retry-after", "").strip()
    if answer.status not in _BUSY or not text:
        return 0.0
    if text.isascii() and text.isdecimal():
        return min(float(text[:10]), MAX_RETRY_AFTER_S)
    try:
        date = parsedate_to_datetime(text)
        wanted = (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp() - now
    except (ValueError, OverflowError):
        return 0.0
    return min(max(wanted, 0.0), MAX_RETRY_AFTER_S)


def _say(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return (text or type(error).__name__)[:_MAX_ERROR].rstrip(".")
