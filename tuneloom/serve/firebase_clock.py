"""Google's time. Tokens carry it, so a machine whose own clock is wrong by minutes must not judge them by its own."""

import logging
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime

import httpx

logger = logging.getLogger(__name__)

# An answer that took longer tells the time too roughly; a difference above the most is rather a cache's than a clock's.
MAX_ROUND_TRIP_S = 2.0
MAX_CORRECTION_S = 600.0
WARN_S = 30.0
# `Date` is cut to whole seconds.
HALF_SECOND = 0.5


class GoogleClock:
    """Unix time, corrected by the `Date` of Google's answers as long as that is plausible."""

    def __init__(self, now: Callable[[], float] = time.time) -> None:
        self.now = now
        self.ahead_s = 0.0
        self._warned_s = 0.0

    def __call__(self) -> float:
        return self.now() - (self.ahead_s if self.is_usable else 0.0)

    def learn(self, answer: httpx.Response, sent_at: float) -> None:
        """Take the time from an answer to a request that went out at `sent_at`, by this machine's clock."""
        received_at = self.now()
        try:
            date = parsedate_to_datetime(answer.headers["date"]).timestamp() + HALF_SECOND
            age = answer.headers.get("age", "0")
            date += float(age) if age.isascii() and age.isdecimal() and len(age) < 8 else 0.0
        except (KeyError, ValueError, TypeError, OverflowError):
            return
        if not 0 <= received_at - sent_at <= MAX_ROUND_TRIP_S:
            return
        self.ahead_s = (sent_at + received_at) / 2 - date
        if abs(self.ahead_s - self._warned_s) > WARN_S:
            self._warned_s = self.ahead_s
            if warning := self.warning():
                logger.warning("%s", warning)

    def warning(self) -> str | None:
        """What the operator should know of this machine's clock, once it is known to be wrong."""
        if abs(self.ahead_s) <= WARN_S:
            return None
        outcome = "sign-in allows for it" if self.is_usable else "sign-in fails"
        return f"{self.describe()}: {outcome}. Set the clock of this machine (NTP)."

    @property
    def is_usable(self) -> bool:
        """Whether the correction is small enough to be one."""
        return abs(self.ahead_s) <= MAX_CORRECTION_S

    def describe(self) -> str:
        """How far this machine's clock is from Google's, as a clause."""
        where = "ahead of" if self.ahead_s > 0 else "behind"
        return f"the server's clock is {abs(self.ahead_s):.0f} s {where} Google's"
