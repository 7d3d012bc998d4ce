"""Documents that fail, hang or are slow when they are told to."""

import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from tuneloom.errors import Overloaded
from tuneloom.store.base import Document, Documents, Scalar, Write

HANG_S = 20.0


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Outage:
    """A seam over real documents: `error` is raised by every call, `delay_s` slept first, `hangs` waits for `end`."""

    def __init__(self, documents: Documents) -> None:
        self._documents = documents
        self._end = threading.Event()
        self.error: Exception | None = None
        self.delay_s = 0.0
        self.hangs = False
        self.calls = 0

    def fail(self, error: Exception | None = None) -> None:
        self.error = error or Overloaded("The document store does not answer.", retry_after_s=1.0)

    def end(self) -> None:
        self.error, self.delay_s, self.hangs = None, 0.0, False
        self._end.set()

    def find(self, collection: str, id: str) -> Document | None:
        self._suffer()
        return self._documents.find(collection, id)

    def query(self, collection: str, where: Mapping[str, Scalar] | None = None, **options: Any) -> list[Document]:
        self._suffer()
        return self._documents.query(collection, where, **options)

    def commit(self, writes: Sequence[Write]) -> dict[tuple[str, str], str]:
        self._suffer()
        return self._documents.commit(writes)

    def close(self) -> None:
        self._end.set()
        self._documents.close()

    def _suffer(self) -> None:
        self.calls += 1
        if self.hangs:
            self._end.wait(HANG_S)
        time.sleep(self.delay_s)
        if self.error is not None:
            raise self.error
