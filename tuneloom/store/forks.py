"""A gate that keeps `fork` and calls of a C library apart. Knows nothing of what the library is."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

WAIT_S = 15.0


class ForkGate:
    """Lets any number of threads work, and lets none work while the process forks.

    A fork waits up to `WAIT_S` for the work that is running, and newcomers wait for the fork. Then the child calls
    `restart`, before anything else in it can come through the gate; its argument says whether all work had ended. Make
    one per module, for the life of the process.
    """

    def __init__(self, restart: Callable[[bool], None]) -> None:
        self._restart = restart
        self._is_quiet = True
        self._open()
        os.register_at_fork(before=self._shut, after_in_parent=self._release, after_in_child=self._begin_child)

    @contextmanager
    def working(self) -> Iterator[None]:
        depth = getattr(self._local, "depth", 0)
        with self._changed:
            if depth == 0:
                # Without this, threads that work without a pause would keep a fork waiting for ever.
                self._changed.wait_for(lambda: not self._is_shut, timeout=WAIT_S)
            self._num_working += 1
        self._local.depth = depth + 1
        try:
            yield
        finally:
            self._local.depth = depth
            with self._changed:
                self._num_working -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Nobody works inside this block."""
        self._shut()
        try:
            yield
        finally:
            self._release()

    def _open(self) -> None:
        # Its lock is reentrant: a signal handler may come through the gate while its thread is at it.
        self._changed = threading.Condition()
        self._num_working = 0
        self._is_shut = False
        self._local = threading.local()

    def _shut(self) -> None:
        self._changed.acquire()
        self._is_shut = True
        self._is_quiet = self._changed.wait_for(lambda: self._num_working == 0, timeout=WAIT_S)

    def _release(self) -> None:
        self._is_shut = False
        self._changed.notify_all()
        self._changed.release()

    def _begin_child(self) -> None:
        self._open()
        self._restart(self._is_quiet)
