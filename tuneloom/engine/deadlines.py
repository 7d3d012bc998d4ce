"""When sequences are looked at because of the time, and what one is told that took too long."""

import heapq
from collections.abc import Mapping

from tuneloom.engine.sequence import Sequence
from tuneloom.errors import Overloaded


class Alarms:
    """Times at which sequences are looked at, by id. An id that is gone costs nothing but its entry for a while."""

    def __init__(self) -> None:
        self._times: list[tuple[float, str]] = []

    def set(self, at: float, id: str) -> None:
        heapq.heappush(self._times, (at, id))

    def due(self, now: float, alive: Mapping[str, object]) -> list[str]:
        """Ids whose time has come, each once."""
        found: dict[str, None] = {}
        while self._times and self._times[0][0] <= now:
            found[heapq.heappop(self._times)[1]] = None
        # Ids that ended long before their time are swept out.
        if len(self._times) > 4 * len(alive) + 1024:
            self._times = [entry for entry in self._times if entry[1] in alive]
            heapq.heapify(self._times)
        return list(found)


def too_late(sequence: Sequence) -> Overloaded:
    limit = f"{sequence.request.deadline_s:g} s"
    if sequence.output_ids:
        message = f"The request took longer than its limit of {limit}. Ask for fewer tokens, or retry."
    else:
        message = f"The request was not begun within its limit of {limit}: too many others run. Retry in a moment."
    return Overloaded(message, code="deadline_exceeded", retry_after_s=1.0)
