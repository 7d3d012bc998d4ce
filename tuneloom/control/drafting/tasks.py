"""Where drafters run. The seam `DrafterTasks`, and its implementation by Ray tasks. No records, no decisions."""

import contextlib
import logging
from typing import Any, Literal, Protocol

from tuneloom.config import Settings
from tuneloom.domain import Drafter

logger = logging.getLogger(__name__)


class DrafterTasks(Protocol):
    """Starts, watches and ends attempts of drafters by their handles. No call waits for one."""

    def launch(self, drafter: Drafter) -> None:
        """Start the current attempt; a no-op if its handle is known already."""
        ...

    def observe(self, handle: str) -> Literal["alive", "over", "unknown"]:
        """`unknown`: not started from here, so that only its heartbeat tells."""
        ...

    def stop(self, handle: str) -> None:
        """End an attempt by force, and forget it; a no-op if it is unknown or over."""
        ...


class RayTasks:
    """Each attempt is a Ray task in a process of its own. Those of a control that has died are ended by Ray."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings.model_dump(mode="json")
        self._num_cpus = settings.drafting.num_cpus
        self._running: dict[str, Any] = {}

    def launch(self, drafter: Drafter) -> None:
        import ray

        if drafter.handle in self._running:
            return
        task = ray.remote(run_task).options(num_cpus=self._num_cpus, max_retries=0, name=f"draft {drafter.handle}")
        self._running[drafter.handle] = task.remote(self._settings, drafter.id, drafter.attempt)

    def observe(self, handle: str) -> Literal["alive", "over", "unknown"]:
        import ray

        task = self._running.get(handle)
        if task is None:
            return "unknown"
        ready, _ = ray.wait([task], timeout=0)
        return "over" if ready else "alive"

    def stop(self, handle: str) -> None:
        import ray

        task = self._running.pop(handle, None)
        if task is not None:
            # It raises where the task is over.
            with contextlib.suppress(ray.exceptions.RayError, ValueError, TypeError):
                ray.cancel(task, force=True)


def run_task(settings: dict[str, Any], drafter_id: str, attempt: int) -> None:
    """One attempt of a drafter, in its own process."""
    from tuneloom.control.drafting.run import draft
    from tuneloom.store import open_store

    tree = Settings.model_validate(settings)
    store = open_store(tree)
    try:
        draft(store, tree.drafting, drafter_id, attempt)
    finally:
        store.close()
