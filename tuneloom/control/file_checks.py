"""Carries out the file checks that the API has noted, and writes down what they found. No HTTP."""

import logging
import time
from collections.abc import Callable

from tuneloom.control.check import Checker, CheckReport
from tuneloom.domain import FileCheck
from tuneloom.store.base import StoreConflict
from tuneloom.store.records import Records, Stored

logger = logging.getLogger(__name__)

MAX_STEPPED = 50
# Codes of errors that say nothing of the files.
FAILURES = ("file_check_failed", "file_check_timeout")


class FileChecks:
    """Call `tick` again and again from one thread. Several of them on one store do the work twice, and no harm."""

    def __init__(self, records: Records, checker: Checker, clock: Callable[[], float] = time.time) -> None:
        self._records = records
        self._checker = checker
        self._clock = clock
        self._checking: set[str] = set()

    def tick(self) -> None:
        """One step for the oldest that are not done."""
        table = self._records.file_checks
        pending = table.query({"status": "running"}, order_by="created_at", limit=MAX_STEPPED)
        for gone in self._checking - {stored.value.id for stored in pending}:
            self._checker.forget(gone)
            self._checking.discard(gone)
        for stored in pending:
            self._checking.add(stored.value.id)
            if (report := self._checker.check(stored.value.id)) is not None:
                self._finish(stored, report)

    def _finish(self, stored: Stored[FileCheck], report: CheckReport) -> None:
        self._checking.discard(stored.value.id)
        found = report.model_dump(mode="json")
        done = stored.value.model_copy(update={"status": "completed", "finished_at": self._clock(), "report": found})
        try:
            self._records.commit(self._records.file_checks.replace(stored, done))
        except StoreConflict:
            logger.info("another control was first: %s", stored.value.id)
