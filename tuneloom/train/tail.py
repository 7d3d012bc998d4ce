"""A job's events as lines of a log, as they come. Reads only."""

import time
from collections.abc import Callable

from tuneloom.domain import Event, event_id
from tuneloom.store.base import Range
from tuneloom.store.records import Records

# Of many quick steps one a second is printed; everything else always is.
STEP_EVERY_S = 1.0
PAGE = 200


class Tail:
    """Prints the events that come after it was made."""

    def __init__(self, records: Records, job_id: str, say: Callable[[str], None]) -> None:
        self._records = records
        self._job_id = job_id
        self._say = say
        # Ids sort by time; a little is read again, since clocks of writers and their commits are not in order.
        self._since_s = time.time()
        self._seen: set[str] = set()
        self._step_at = 0.0

    def print_new(self) -> None:
        bounds = Range(at_least=event_id(self._since_s - 10.0))
        events = self._records.events.query({"job_id": self._job_id}, bounds=bounds, limit=PAGE)
        new = [stored.value for stored in events if stored.value.id not in self._seen]
        for event in new:
            self._seen.add(event.id)
            if event.type != "metrics" or self._is_step_due(event):
                self._say(event.message)
        if new:
            self._since_s = max(self._since_s, new[-1].created_at)

    def _is_step_due(self, event: Event) -> bool:
        data = event.data or {}
        is_last = data.get("step") == data.get("total_steps")
        if not is_last and event.created_at - self._step_at < STEP_EVERY_S:
            return False
        self._step_at = event.created_at
        return True
