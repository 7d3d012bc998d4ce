"""Many threads and processes at one store."""

import itertools
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.store.contract.opened import Opened, ids
from tests.store.contract.processes import PROCESS_TIMEOUT_S, SPAWN, in_processes
from tuneloom.store import open_documents
from tuneloom.store.base import Create, Documents, Increment, Replace, StoreConflict


class OfWriters(Opened):
    # How long queries may show one document of a commit before the other.
    HALF_S = 0.0

    def sum_of(self, documents: Documents) -> int:
        deadline = time.monotonic() + self.HALF_S
        while total := sum(d.data["v"] for d in documents.query("things")):
            if time.monotonic() >= deadline:
                break
            time.sleep(0.02)
        return total

    def test_eight_writers_of_one_document_all_come_to_an_end(
        self, documents: Documents, capsys: pytest.CaptureFixture[str]
    ) -> None:
        documents.commit([Create("things", "a", {"v": 0, "n": 0})])
        barrier = threading.Barrier(8)

        def write(_: int) -> int:
            attempts = 0
            barrier.wait(timeout=PROCESS_TIMEOUT_S)
            for _ in range(10):
                documents.commit([Increment("things", "a", "n", 1)])
                for attempt in itertools.count():
                    attempts += 1
                    found = documents.find("things", "a")
                    assert found is not None
                    changed = {**found.data, "v": found.data["v"] + 1}
                    try:
                        documents.commit([Replace("things", "a", changed, found.rev)])
                        break
                    except StoreConflict:
                        time.sleep(random.uniform(0, 0.005 * 2 ** min(attempt, 6)))
            return attempts

        started = time.monotonic()
        with ThreadPoolExecutor(8) as pool:
            attempts = sum(pool.map(write, range(8)))
        took_s = time.monotonic() - started
        found = documents.find("things", "a")
        assert found is not None and found.data == {"v": 80, "n": 80}
        with capsys.disabled():
            print(
                f"\n{type(documents).__name__}, 8 writers of one document: {160 / took_s:.0f} commits/s, "
                f"{attempts} attempts for 80 replacements"
            )
        assert took_s < PROCESS_TIMEOUT_S

    def test_a_long_result_is_of_one_moment(self, documents: Documents) -> None:
        for start in (0, 350):
            documents.commit([Create("things", f"{start + i:04}", {"v": 0}) for i in range(350)])
        is_done = threading.Event()

        def move() -> None:
            while not is_done.is_set():
                documents.commit([Increment("things", "0000", "v", -1), Increment("things", "0699", "v", 1)])

        with ThreadPoolExecutor(1) as pool:
            mover = pool.submit(move)
            sums = {self.sum_of(documents) for _ in range(6)}
            is_done.set()
            mover.result(timeout=PROCESS_TIMEOUT_S)
        assert sums == {0}

    def test_a_forked_process_goes_on_while_threads_write(self, documents: Documents, documents_url: str) -> None:
        done = subprocess.run(
            [sys.executable, "-c", FORKS, documents_url], capture_output=True, text=True, timeout=120, cwd=Path.cwd()
        )
        assert done.returncode == 0, done.stderr
        found = documents.query("things")
        assert ids(found) == ["a", "child0", "child1", "child2", "child3", "child4"]
        assert found[0].data["v"] > 5000

    def test_increments_of_many_threads_all_count(self, documents: Documents) -> None:
        documents.commit([Create("things", "a", {"v": 0})])
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda _: documents.commit([Increment("things", "a", "v", 1)]), range(80)))
        found = documents.find("things", "a")
        assert found is not None and found.data["v"] == 80

    def test_increments_of_many_processes_all_count(self, documents: Documents, documents_url: str) -> None:
        documents.commit([Create("things", "a", {"v": 0})])
        in_processes(3, count_up, documents_url, 25)
        found = documents.find("things", "a")
        assert found is not None and found.data["v"] == 75

    def test_only_one_of_many_creates_wins(self, documents: Documents) -> None:
        def create(writer: int) -> bool:
            try:
                documents.commit([Create("things", "a", {"v": writer}), Create("things", f"mine{writer}", {})])
            except StoreConflict:
                return False
            return True

        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(create, range(16)))
        found = documents.find("things", "a")
        assert found is not None and won == [writer == found.data["v"] for writer in range(16)]
        assert len(documents.query("things")) == 2

    def test_no_update_by_revision_is_lost(self, documents: Documents) -> None:
        documents.commit([Create("things", "a", {"v": 0})])

        def add_one(_: int) -> None:
            while True:
                found = documents.find("things", "a")
                assert found is not None
                try:
                    documents.commit([Replace("things", "a", {"v": found.data["v"] + 1}, found.rev)])
                    return
                except StoreConflict:
                    continue

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(add_one, range(40)))
        found = documents.find("things", "a")
        assert found is not None and found.data["v"] == 40

    def test_nobody_sees_half_a_commit(self, documents: Documents) -> None:
        documents.commit([Create("things", "a", {"v": 0}), Create("things", "b", {"v": 0})])
        is_done = threading.Event()

        def move() -> None:
            for _ in range(60):
                documents.commit([Increment("things", "a", "v", -1), Increment("things", "b", "v", 1)])

        def watch() -> set[int]:
            sums = set()
            while not is_done.is_set():
                sums.add(self.sum_of(documents))
            return sums

        with ThreadPoolExecutor(4) as pool:
            watchers = [pool.submit(watch) for _ in range(2)]
            movers = [pool.submit(move) for _ in range(2)]
            for mover in movers:
                mover.result(timeout=PROCESS_TIMEOUT_S)
            is_done.set()
            assert [watcher.result(timeout=PROCESS_TIMEOUT_S) for watcher in watchers] == [{0}, {0}]

    @pytest.mark.parametrize("acknowledged", [1, 7, 30])
    def test_a_writer_killed_at_any_moment_leaves_whole_commits(self, documents_url: str, acknowledged: int) -> None:
        receiver, sender = SPAWN.Pipe(duplex=False)
        child = SPAWN.Process(target=write_pairs, args=(documents_url, sender))
        child.start()
        sender.close()
        last = -1
        while last < acknowledged:
            assert receiver.poll(PROCESS_TIMEOUT_S), "the writer is silent"
            last = receiver.recv()
        os.kill(child.pid or 0, signal.SIGKILL)
        child.join(PROCESS_TIMEOUT_S)
        while receiver.poll():
            try:
                last = receiver.recv()
            except EOFError:
                break
        documents = open_documents(documents_url)
        left, right = ids(documents.query("left")), ids(documents.query("right"))
        counter = documents.find("things", "counter")
        documents.close()
        assert left == right == [f"{i:06}" for i in range(len(left))]
        assert len(left) > last, "an acknowledged commit is lost"
        assert counter is not None and counter.data["v"] == len(left)


# In a process of its own: the one of the tests holds threads of other libraries, which need not outlive a fork.
FORKS = """
import os, sys, threading
from tuneloom.store import open_documents
from tuneloom.store.base import Create, Increment

documents = open_documents(sys.argv[1])
documents.commit([Create("things", "a", {"v": 0})])
is_done = threading.Event()

def write():
    while not is_done.is_set():
        documents.commit([Increment("things", "a", "v", 1)])

threads = [threading.Thread(target=write) for _ in range(2)]
for thread in threads:
    thread.start()
children = []
for i in range(5):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            documents.commit([Create("things", f"child{i}", {}), Increment("things", "a", "v", 1000)])
            code = 0
        finally:
            os._exit(code)
    children.append(child)
codes = [os.waitpid(child, 0)[1] for child in children]
is_done.set()
for thread in threads:
    thread.join(30)
assert codes == [0] * 5, codes
"""


def count_up(url: str, times: int) -> None:
    documents = open_documents(url)
    for _ in range(times):
        documents.commit([Increment("things", "a", "v", 1)])
    documents.close()


def write_pairs(url: str, sender: Any) -> None:
    documents = open_documents(url)
    documents.commit([Create("things", "counter", {"v": 0})])
    for i in itertools.count():
        documents.commit(
            [
                Create("left", f"{i:06}", {"text": "x" * 2000}),
                Increment("things", "counter", "v", 1),
                Create("right", f"{i:06}", {"text": "y" * 2000}),
            ]
        )
        sender.send(i)
