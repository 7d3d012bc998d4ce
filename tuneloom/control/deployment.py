"""The process that carries jobs on: a thread that reconciles, again and again.

`ControlLoop` knows no Ray; `Control` is what Serve runs in a replica, with the launcher of this cluster.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from tuneloom.config import Settings, check_production
from tuneloom.control.check import FILE_CHECK_VARIABLE, ProcessChecker
from tuneloom.control.drafting.reconcile import Drafts
from tuneloom.control.drafting.tasks import RayTasks
from tuneloom.control.file_checks import FileChecks
from tuneloom.control.launcher import RayJobsLauncher, ray_jobs_client, ray_room
from tuneloom.control.reconcile import Reconciler
from tuneloom.control.sweep import sweep, sweep_usage
from tuneloom.control.webhook_dispatcher import Dispatcher
from tuneloom.control.webhook_secrets import open_vault
from tuneloom.control.webhook_sender import Sender
from tuneloom.errors import TuneloomError
from tuneloom.store import open_store
from tuneloom.store.records import Records

logger = logging.getLogger(__name__)

SWEEP_INTERVAL_S = 60.0
# A tick may wait for the launcher some times over, each time up to its own limit.
STUCK_AFTER_S = 180.0
STOP_TIMEOUT_S = 8.0
# For deliveries that are under way at the end; one that is cut off is sent again.
DRAIN_TIMEOUT_S = 3.0


class Ticker(Protocol):
    def tick(self) -> None: ...


class ControlLoop:
    """Ticks every `tick_s`, and at once after `poke`, in a thread of its own; sweeps now and then."""

    def __init__(
        self,
        tickers: Sequence[Ticker],
        sweep: Callable[[], None],
        tick_s: float,
        *,
        sweep_interval_s: float = SWEEP_INTERVAL_S,
        stuck_after_s: float = STUCK_AFTER_S,
        name: str = "reconcile",
    ) -> None:
        self._tickers = tickers
        self._sweep = sweep
        self._tick_s = tick_s
        self._sweep_interval_s = sweep_interval_s
        self._stuck_after_s = stuck_after_s
        self._wake = threading.Event()
        self._stopping = False
        self._ticked_at = time.monotonic()
        self._swept_at = float("-inf")
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._ticked_at = time.monotonic()
        self._thread.start()

    def poke(self) -> None:
        self._wake.set()

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """End after the tick that is under way; the records hold all there is to remember."""
        self._stopping = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def check_health(self) -> None:
        """Raise TuneloomError if the loop has died or one tick hangs."""
        if not self._thread.is_alive():
            raise TuneloomError(f"The {self._thread.name} loop has ended.")
        silent_s = time.monotonic() - self._ticked_at
        if silent_s > self._stuck_after_s:
            raise TuneloomError(f"The {self._thread.name} loop has been stuck for {silent_s:.0f} s.")

    def _run(self) -> None:
        while not self._stopping:
            # Cleared before the work: a poke during it is not lost.
            self._wake.clear()
            for ticker in self._tickers:
                self._guard(ticker.tick, "tick")
            if time.monotonic() - self._swept_at > self._sweep_interval_s:
                self._swept_at = time.monotonic()
                self._guard(self._sweep, "sweep")
            self._ticked_at = time.monotonic()
            self._wake.wait(self._tick_s)

    def _guard(self, work: Callable[[], None], name: str) -> None:
        """The loop outlives what goes wrong in it: the store may be away for a while."""
        try:
            work()
        except Exception:
            logger.exception("%s failed", name)


def outbox_loop(records: Records, settings: Settings) -> tuple[ControlLoop, Dispatcher]:
    """What sends webhooks, in a thread of its own: no receiver and no backlog delays a job."""
    vault, sender = (lambda: open_vault(settings)), Sender(settings.webhooks)
    webhooks = Dispatcher(records, settings.webhooks, vault, sender, wake=lambda: loop.poke())
    loop = ControlLoop([webhooks], webhooks.sweep, settings.webhooks.poll_s, name="outbox")
    return loop, webhooks


class Control:
    """One replica reconciles all jobs of an installation. A second one, during an update, does no harm."""

    def __init__(self, settings: dict[str, Any]) -> None:
        import ray

        tree = Settings.model_validate(settings)
        check_production(tree, os.environ)
        cluster = ray.get_runtime_context().gcs_address
        self._store = open_store(tree)
        self._checker = ProcessChecker(tree.home, tree.control.check_timeout_s)
        launcher = RayJobsLauncher(lambda: ray_jobs_client(cluster), tree.home, ray_room)
        reconciler = Reconciler(self._store, launcher, self._checker, tree.train)
        self._file_checker = ProcessChecker(tree.home, tree.control.check_timeout_s, variable=FILE_CHECK_VARIABLE)
        file_checks = FileChecks(self._store.records, self._file_checker)
        self._drafts = Drafts(self._store, RayTasks(tree), tree.drafting)
        self._loop = ControlLoop(
            [reconciler, file_checks, self._drafts],
            lambda: sweep(self._store, audit_days=tree.audit.keep_days, draft_days=tree.drafting.keep_days),
            tree.control.tick_s,
        )
        self._outbox, self._webhooks = outbox_loop(self._store.records, tree)

        # In a thread of its own: jobs do not wait for a busy hour to be folded.
        self._usage = ControlLoop([], lambda: sweep_usage(self._store, tree.usage), SWEEP_INTERVAL_S, name="usage")
        self._usage.start()
        self._outbox.start()
        self._loop.start()

    def poke(self) -> None:
        self._loop.poke()
        self._outbox.poke()

    def check_health(self) -> None:
        self._loop.check_health()
        self._outbox.check_health()
        self._usage.check_health()

    def __del__(self) -> None:
        # Serve calls this when the replica goes; after a failed start there is nothing to end.
        if "_loop" in self.__dict__:
            self._outbox.stop()
            self._usage.stop()
            self._loop.stop()
            self._webhooks.drain(DRAIN_TIMEOUT_S)
            self._checker.close()
            self._file_checker.close()
            self._drafts.close()
            self._store.close()
