"""Which adapters may get new sequences, when some load and slots are fewer than adapters. Knows hashes and counts only.

An adapter that was not ready is not asked again before there is news. One that found no slot for a while makes others
give one up: some of those in use get no new sequences until theirs have ended, and no third one takes the slot.
"""

from collections import Counter

# An adapter that found no slot for this long makes others give one up.
_STARVATION_S = 2.0
# At most this share of the adapters in use is emptied at once, and at least one.
_LARGEST_SHARE = 4
# Without news, those that were not ready are asked again after so many plans.
_ASK_AGAIN_PLANS = 16


class AdapterTurns:
    """Asked for each waiting sequence that uses an adapter; `key` None is the base, which is always ready."""

    def __init__(self) -> None:
        self._running = Counter[str]()
        self._waiting = Counter[str]()
        self._not_ready = set[str]()
        self._starved: dict[str, float] = {}
        self._overdue = set[str]()
        self._draining = set[str]()
        self._plans_without_news = 0

    def begin(self, now: float) -> None:
        """A plan begins."""
        self._plans_without_news += 1
        # With nothing in use there is nothing to give up.
        starved = self._starved.items() if self._running else ()
        self._overdue = {key for key, since in starved if now - since >= _STARVATION_S}
        self._draining = {key for key in self._draining if self._running[key]} if self._overdue else set()
        in_use = [key for key in self._running if key not in self._draining]
        wanted = min(len(self._overdue), max(1, len(self._running) // _LARGEST_SHARE)) - len(self._draining)
        if wanted > 0:
            self._draining.update(sorted(in_use, key=lambda key: self._running[key])[:wanted])

    def may_try(self, key: str | None) -> bool:
        if key is None:
            return True
        if key in self._not_ready or key in self._draining:
            return False
        return not self._overdue or key in self._overdue or key in self._running

    def is_time_to_ask(self) -> bool:
        return self._plans_without_news >= _ASK_AGAIN_PLANS

    def ask_again(self) -> None:
        self._not_ready.clear()
        self._plans_without_news = 0

    def not_ready(self, key: str | None, now: float, *, is_loaded: bool) -> None:
        """An attempt failed; `is_loaded`: for want of a slot only."""
        if key is None:
            return
        self._not_ready.add(key)
        if is_loaded:
            self._starved.setdefault(key, now)

    def entered(self, key: str | None) -> None:
        """A sequence waits."""
        if key is not None:
            self._waiting[key] += 1

    def gone(self, key: str | None) -> None:
        """A sequence waits no longer."""
        if key is not None and _decrease(self._waiting, key):
            self._starved.pop(key, None)

    def started(self, key: str | None) -> None:
        """A sequence runs, so its adapter has a slot."""
        if key is not None:
            self._running[key] += 1
            self._starved.pop(key, None)
            self._overdue.discard(key)

    def ended(self, key: str | None) -> None:
        """A sequence runs no longer."""
        if key is not None:
            _decrease(self._running, key)


def _decrease(counter: Counter[str], key: str) -> bool:
    """Count one less; True if none is left, and the key with it."""
    counter[key] -= 1
    if counter[key]:
        return False
    del counter[key]
    return True
