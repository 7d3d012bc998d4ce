"""Whoever dies at whatever line: rows that were kept stay, none comes twice, and each draft ends once."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Literal

import pytest

from tests.control.drafting.conftest import DRAFTS, Desk, Open, Threads
from tests.control.drafting.model import Ask, Reply, Rows, in_turn
from tuneloom.control.drafting.ledger import Ledger
from tuneloom.control.drafting.reconcile import Drafts
from tuneloom.control.drafting.run import draft
from tuneloom.domain import DraftCounts, Drafter
from tuneloom.store import Store
from tuneloom.store.base import Documents
from tuneloom.store.records import Records

QUICK = {"heartbeat_s": 0.1, "heartbeat_timeout_s": 1.5}


class Dying:
    """Documents of a process that dies at its commit number `at`, before it is made or before its answer comes."""

    def __init__(self, documents: Documents, at: int, moment: Literal["before", "after"]) -> None:
        self._documents, self._at, self._moment, self._commits = documents, at, moment, 0
        self._lock = threading.Lock()
        self.is_dead = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._documents, name)

    def commit(self, writes: Any) -> Any:
        with self._lock:
            self._commits += 1
            is_last = self._commits == self._at
            self.is_dead |= is_last
        if self.is_dead and not (is_last and self._moment == "after"):
            raise SystemExit
        answer = self._documents.commit(writes)
        if is_last:
            raise SystemExit
        return answer


def dying(store: Store, at: int, moment: Literal["before", "after"]) -> Store:
    return Store(Records(Dying(store.records.documents, at, moment)), store.blobs)


def check_whole(desk: Desk, made: dict[str, Any], rows: int) -> None:
    assert made["status"] == "succeeded" and made["rows"] == rows, made
    texts = [json.dumps(row) for row in desk.rows(made["file_id"])]
    assert len(texts) == len(set(texts)) == rows
    counts = made["counts"]
    assert counts["kept"] + sum(counts["dropped"].values()) == counts["received"]
    assert len(desk.api.get("/v1/files").json()["data"]) == 1
    assert len(desk.store.records.usage_parts.query()) == 1
    assert desk.store.blobs.list("drafts") == [] and desk.store.records.drafters.query() == []


class DyingThreads(Threads):
    """The first attempt of each drafter dies at one of its commits."""

    def __init__(self, desk: Desk, at: int, moment: Literal["before", "after"]) -> None:
        super().__init__(desk.store, desk.settings)
        self._at, self._moment = at, moment

    def launch(self, drafter: Drafter) -> None:
        self.launched.append(drafter.handle)
        store = dying(self._store, self._at, self._moment) if drafter.attempt == 1 else self._store
        arguments = (store, self._settings, drafter.id, drafter.attempt)
        self._threads[drafter.handle] = threading.Thread(target=_run, args=arguments, daemon=True)
        self._threads[drafter.handle].start()


def _run(*arguments: Any) -> None:
    with contextlib.suppress(SystemExit):
        draft(*arguments)


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("at", [1, 2, 3, 4, 7])
def test_a_drafter_that_dies_at_a_commit_goes_on_where_it_was(open_desk: Open, at: int, moment: Any):
    # No heartbeat among its commits: reserve, add, reserve, add ..., end.
    desk = open_desk(heartbeat_s=60)
    desk.control._tasks = DyingThreads(desk, at, moment)
    made = desk.made(rows=30)
    check_whole(desk, made, 30)
    has_ended = (at, moment) == (7, "after")
    assert made["drafters"][0]["losses"] == (0 if has_ended else 1)
    # What was kept was not asked for again, but for the reply that was lost with its process.
    lost_reply = moment == "before" and at in (2, 4)
    assert len(desk.server.asks) == 3 + lost_reply


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("at", range(1, 6))
def test_a_control_that_dies_at_a_commit_is_replaced_by_another(open_desk: Open, at: int, moment: Any):
    desk = open_desk(**QUICK)
    id = desk.create(rows=20, drafters=2)["id"]
    first = Drafts(dying(desk.store, at, moment), desk.tasks, desk.settings)
    with pytest.raises(SystemExit):
        for _ in range(1000):
            first.tick()
            time.sleep(0.01)
    first.close()
    # What it had started is another's now.
    desk.tasks.forget()
    made = desk.run(id)
    check_whole(desk, made, 20)


def test_a_new_control_adopts_drafters_that_live(open_desk: Open):
    rows = Rows()

    def slow(ask: Ask) -> Reply:
        time.sleep(0.3)
        return rows(ask)

    desk = open_desk(slow, **QUICK)
    id = desk.create(rows=100, drafters=2)["id"]
    desk.until(lambda: desk.get(id)["rows"] > 0)
    desk.tasks.forget()
    desk.control = Drafts(desk.store, desk.tasks, desk.settings)
    made = desk.run(id)
    check_whole(desk, made, 100)
    assert len(desk.tasks.launched) == 2


def test_a_silent_drafter_is_replaced_and_its_late_rows_do_not_count(open_desk: Open):
    rows, is_replaced = Rows(), threading.Event()

    def late(ask: Ask) -> Reply:
        is_replaced.wait(20)
        return rows(ask)

    desk = open_desk(in_turn(rows, late, rows), heartbeat_s=60, heartbeat_timeout_s=30)
    id = desk.create(rows=30)["id"]
    desk.until(lambda: len(desk.server.asks) == 2)
    later = [0.0]
    desk.control._clock = lambda: time.time() + later[0]
    later[0] = 31
    desk.until(lambda: len(desk.tasks.launched) == 2)
    later[0] = 0
    is_replaced.set()
    zombies = [
        thread for thread in threading.enumerate() if thread.name.startswith("Thread-") and "draft" in thread.name
    ]
    made = desk.run(id)
    for zombie in zombies:
        zombie.join(5)
    check_whole(desk, made, 30)
    assert made["drafters"][0]["losses"] == 1


def test_a_drafter_that_waits_for_room_is_not_lost(open_desk: Open):
    desk = open_desk(heartbeat_timeout_s=30)
    go = threading.Event()

    class Queue(Threads):
        def launch(self, drafter: Drafter) -> None:
            self.launched.append(drafter.handle)

            def later() -> None:
                go.wait(30)
                draft(self._store, self._settings, drafter.id, drafter.attempt)

            self._threads[drafter.handle] = threading.Thread(target=later, daemon=True)
            self._threads[drafter.handle].start()

    desk.control._tasks = queue = Queue(desk.store, desk.settings)
    id = desk.create(rows=10)["id"]
    desk.until(lambda: len(queue.launched) == 1)
    desk.control._clock = lambda: time.time() + 100
    for _ in range(5):
        desk.control.tick()
    desk.control._clock = time.time
    go.set()
    check_whole(desk, desk.run(id), 10)
    assert len(queue.launched) == 1


def test_a_launch_that_died_with_its_control_is_made_again(open_desk: Open):
    desk = open_desk(heartbeat_timeout_s=30)

    class Nothing(Threads):
        def launch(self, drafter: Drafter) -> None:
            self.launched.append(drafter.handle)

    first = Drafts(desk.store, Nothing(desk.store, desk.settings), desk.settings)
    id = desk.create(rows=10)["id"]
    first.tick()
    first.tick()
    first.close()
    desk.control.tick()
    assert desk.tasks.launched == []
    desk.control._clock = lambda: time.time() + 31
    desk.control.tick()
    desk.control._clock = time.time
    made = desk.run(id)
    check_whole(desk, made, 10)
    assert made["drafters"][0]["losses"] == 1


def test_rows_that_the_store_has_lost_are_counted_and_do_not_hold_up_the_end(open_desk: Open):
    gate = threading.Event()
    rows = Rows()

    def model(ask: Ask) -> Reply:
        if ask.number == 2:
            gate.wait(30)
        return rows(ask)

    desk = open_desk(model)
    id = desk.create(rows=20, seed_rows=[{"instruction": "a", "output": "b"}])["id"]
    desk.until(lambda: desk.get(id)["rows"] == 10)
    for blob in desk.store.blobs.list(f"drafts/{id}"):
        desk.store.blobs.delete(blob.key)
    gate.set()
    made = desk.run(id)
    assert made["status"] == "succeeded" and made["rows"] == 10, made
    assert made["counts"]["dropped"] == {"unreadable": 10} and made["partial"]
    assert made["counts"]["received"] == made["counts"]["kept"] + 10


def test_a_drafter_that_is_always_lost_fails_in_the_end(open_desk: Open):
    desk = open_desk(max_losses=2)

    class Dead(Threads):
        def launch(self, drafter: Drafter) -> None:
            self.launched.append(drafter.handle)
            self._threads[drafter.handle] = threading.Thread(target=lambda: None)
            self._threads[drafter.handle].start()

    desk.control._tasks = dead = Dead(desk.store, desk.settings)
    made = desk.made(rows=10)
    assert made["status"] == "failed" and made["error"]["code"] == "drafter_lost" and len(dead.launched) == 3


def test_what_a_lost_call_may_have_taken_counts_against_the_budget(open_desk: Open):
    desk = open_desk(heartbeat_s=60)
    desk.control._tasks = DyingThreads(desk, 2, "before")
    made = desk.made(rows=50, max_tokens=20_000)
    # The lost call reserved its prompt and the longest reply; the whole stays within the budget.
    assert made["counts"]["output_tokens"] >= 8192
    assert made["counts"]["input_tokens"] + made["counts"]["output_tokens"] <= 20_000


def test_a_fenced_ledger_writes_nothing(open_desk: Open):
    desk = open_desk()
    id = desk.create(rows=10)["id"]
    desk.control._tasks = type("Nowhere", (), {"launch": lambda *_: None, "stop": lambda *_: None})()
    desk.control.tick()
    desk.control.tick()
    ledger = Ledger(desk.store, f"{id}-d0", 1)
    desk.api.post(f"{DRAFTS}/{id}/cancel")
    desk.control.tick()
    with pytest.raises(Exception, match="d0"):
        ledger.add([{"text": "late"}], DraftCounts(calls=1), None)
    made = desk.run(id)
    assert made["status"] == "cancelled" and made["rows"] == 0 and made["file_id"] is None


RUN = "import json, sys; from tuneloom.control.drafting.tasks import run_task; run_task(*json.load(sys.stdin))"


class Processes:
    """Each attempt in a process of its own, as Ray has it, so that it can be killed."""

    def __init__(self, desk: Desk) -> None:
        self._settings = desk.api.settings.model_dump(mode="json")
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def launch(self, drafter: Drafter) -> None:
        process = subprocess.Popen([sys.executable, "-c", RUN], stdin=subprocess.PIPE)
        self.running[drafter.handle] = process
        assert process.stdin is not None
        process.stdin.write(json.dumps([self._settings, drafter.id, drafter.attempt]).encode())
        process.stdin.close()

    def observe(self, handle: str) -> Literal["alive", "over", "unknown"]:
        process = self.running.get(handle)
        return "unknown" if process is None else "alive" if process.poll() is None else "over"

    def stop(self, handle: str) -> None:
        process = self.running.pop(handle, None)
        if process is not None:
            process.kill()
            process.wait(10)


def test_a_killed_process_is_started_again_without_doubling(open_desk: Open, tmp_path: Path):
    rows, waits, is_dead = Rows(), threading.Event(), threading.Event()

    def model(ask: Ask) -> Reply:
        if ask.number == 2:
            waits.set()
            is_dead.wait(20)
        return rows(ask)

    desk = open_desk(model)
    desk.control._tasks = processes = Processes(desk)
    id = desk.create(rows=40)["id"]
    desk.until(waits.is_set, 60)
    (process,) = processes.running.values()
    os.kill(process.pid, signal.SIGKILL)
    is_dead.set()
    made = desk.run(id, 90)
    check_whole(desk, made, 40)
    assert made["drafters"][0]["losses"] == 1
    assert len(desk.server.asks) == 5
