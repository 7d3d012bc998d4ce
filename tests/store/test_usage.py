"""Every token counts once: writers, the roll-up and what is read, with a store that fails before and after commits."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tuneloom.config import Settings, UsageSettings
from tuneloom.domain import Amounts, UsagePart, Used, hour_of, hour_start
from tuneloom.errors import Overloaded
from tuneloom.store import open_documents, usage
from tuneloom.store.base import StoreConflict, Write
from tuneloom.store.records import Records
from tuneloom.store.usage_rollup import SETTLE_S, drop_old, roll_up
from tuneloom.store.usage_writer import FLUSH_S, OTHER, UsageWriter, final_part, record_draft

NOON = hour_start("2026-11-26T12")
HOUR = 3600.0
SECOND = Used(kind="inference", base="b/x", model="bot@v1", key_id="key_1")


on_both = pytest.mark.parametrize(
    "store", ["sqlite", pytest.param("firestore", marks=pytest.mark.cloud)], indirect=True
)


class Flaky:
    """Documents that fail on command: before a commit, after it, or with a commit that comes true later."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.faults: list[str] = []
        self.is_down = False
        self.late: list[Sequence[Write]] = []
        self.commits: list[int] = []
        self.before_commit: Callable[[], None] | None = None

    def find(self, *arguments: Any) -> Any:
        self._check()
        return self.inner.find(*arguments)

    def query(self, *arguments: Any, **options: Any) -> Any:
        self._check()
        return self.inner.query(*arguments, **options)

    def commit(self, writes: Sequence[Write]) -> Any:
        self._check()
        if self.before_commit:
            hook, self.before_commit = self.before_commit, None
            hook()
        self.land()
        self.commits.append(len(writes))
        fault = self.faults.pop(0) if self.faults else "ok"
        if fault == "late":
            self.late.append(writes)
        if fault in ("before", "late"):
            raise Overloaded("The store did not answer.")
        revs = self.inner.commit(writes)
        if fault == "after":
            raise Overloaded("The store did not answer.")
        return revs

    def land(self) -> None:
        for writes in self.late:
            with contextlib.suppress(StoreConflict):
                self.inner.commit(writes)
        self.late = []

    def close(self) -> None:
        self.inner.close()

    def _check(self) -> None:
        if self.is_down:
            raise Overloaded("The store is away.")


class Clock:
    def __init__(self, now: float = NOON) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def store(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Flaky]:
    is_local = getattr(request, "param", "sqlite") == "sqlite"
    url = f"sqlite:{tmp_path / 'usage.db'}" if is_local else request.getfixturevalue("firestore_url")
    flaky = Flaky(open_documents(url))
    yield flaky
    flaky.close()


@pytest.fixture
def records(store: Flaky) -> Records:
    return Records(store)


def tokens(count: int) -> Amounts:
    return Amounts(requests=1, input_tokens=count, cached_tokens=count // 2, output_tokens=1, device_us=7, cost_nano=3)


def total(records: Records, owner: str | None = None) -> Amounts:
    found = usage.read(records, "2000-01-01T00", "2100-01-01T00", owner)
    return sum((one.amounts for one in found), Amounts())


def used(number: int) -> Used:
    return Used(kind="inference", base="b/x", model=f"bot@v{number}", key_id=f"key_{number % 7}")


def test_what_was_added_is_read_at_once_and_the_same_after_the_roll_up(records: Records):
    clock = Clock()
    writers = [UsageWriter(records, clock) for _ in range(3)]
    for number in range(60):
        writers[number % 3].add(f"owner{number % 2}", used(number % 5), tokens(number))
    assert all(writer.flush() for writer in writers)
    before = usage.read(records, hour_of(NOON), hour_of(NOON))
    assert roll_up(records, NOON + HOUR + SETTLE_S - 1) == 0
    assert roll_up(records, NOON + HOUR + SETTLE_S) == 6
    assert records.usage_parts.query() == []
    after = usage.read(records, hour_of(NOON), hour_of(NOON))
    assert sorted(after, key=repr) == sorted(before, key=repr)
    assert len(after) == len(records.usage_rows.query()) == 10
    assert total(records).input_tokens == sum(range(60)) and total(records).requests == 60
    assert total(records, "owner1").input_tokens == sum(range(1, 60, 2))


def test_what_an_owner_spent_is_that_of_whole_days_before_and_after_the_roll_up(records: Records):
    clock = Clock()
    writer = UsageWriter(records, clock)
    for day in range(-40, 1):
        clock.now = NOON + day * 24 * HOUR
        writer.add("ada", SECOND, tokens(1000))
        writer.add("bob", SECOND, tokens(5))
    writer.flush()
    for _ in range(2):
        spent = usage.spent(records, "ada", NOON - 2 * 24 * HOUR)
        assert (spent.input_tokens, spent.cached_tokens, spent.output_tokens) == (3000, 1500, 3)
        assert spent.device_s == pytest.approx(21e-6) and spent.cost == pytest.approx(9e-9)
        assert usage.spent(records, "ada", NOON - 39 * 24 * HOUR).input_tokens == 40_000
        assert usage.spent(records, "ada", NOON + 24 * HOUR) == usage.Spent()
        roll_up(records, NOON + 2 * HOUR)
    assert usage.spent(records, "eve", 0.0) == usage.Spent()


def test_an_owner_with_many_keys_takes_few_documents(records: Records, store: Flaky):
    clock = Clock()
    writer = UsageWriter(records, clock)
    for number in range(1000):
        writer.add("ada", SECOND.model_copy(update={"key_id": f"key_{number}"}), tokens(1))
    assert writer.flush()
    assert len(records.usage_parts.query()) == 10
    assert usage.spent(records, "ada", NOON).input_tokens == 1000
    roll_up(records, NOON + 2 * HOUR)
    assert len(records.usage_rows.query()) == 1000
    assert (len(records.usage_months.query()), records.usage_parts.query()) == (1, [])
    assert max(store.commits) <= 400
    assert usage.spent(records, "ada", NOON).input_tokens == 1000


def test_a_busy_hour_of_thousands_is_written_in_few_commits(records: Records, store: Flaky):
    writer = UsageWriter(records, Clock())
    for number in range(3000):
        writer.add(f"owner{number}", used(number), tokens(number))
    assert writer.flush()
    assert store.commits == [400] * 7 + [200]
    assert total(records).input_tokens == sum(range(3000))
    # Only what is new is written again.
    writer.add("owner7", used(7), tokens(1))
    assert writer.flush() and store.commits[-1] == 1
    assert writer.flush() and len(store.commits) == 9


@on_both
@pytest.mark.parametrize("fault", ["before", "after", "late"])
def test_a_commit_without_an_answer_counts_once(records: Records, store: Flaky, fault: str):
    writer = UsageWriter(records, Clock())
    writer.add("ada", SECOND, tokens(10))
    store.faults = [fault]
    assert writer.flush()
    writer.add("ada", SECOND, tokens(100))
    store.faults = [fault, fault]
    writer.flush()
    assert writer.flush()
    store.land()
    assert total(records).input_tokens == 110


@on_both
@pytest.mark.parametrize("fault", ["ok", "before", "after", "late"])
def test_a_writer_that_comes_after_the_roll_up_loses_nothing(records: Records, store: Flaky, fault: str):
    clock = Clock(NOON + HOUR - 1)
    writer = UsageWriter(records, clock)
    writer.add("ada", SECOND, tokens(10))
    writer.add("ada", used(2), tokens(1))
    writer.flush()
    writer.add("ada", SECOND, tokens(100))
    store.faults = [fault] * 2
    if fault != "ok":
        writer.flush()
    store.faults = []
    store.land()
    clock.now = NOON + 3 * HOUR
    assert roll_up(records, clock.now) == 1
    assert writer.flush()
    assert total(records).input_tokens == 111
    roll_up(records, clock.now)
    assert total(records).input_tokens == 111
    assert [row.value.hour for row in records.usage_rows.query()] == [hour_of(NOON)] * 2
    assert usage.spent(records, "ada", NOON).input_tokens == 111


@pytest.mark.parametrize("fault", ["before", "after", "late"])
def test_a_roll_up_that_dies_at_a_commit_counts_once(records: Records, store: Flaky, fault: str):
    writer = UsageWriter(records, Clock())
    for number in range(1400):
        writer.add("ada" if number % 2 else "bob", used(number), tokens(number))
    writer.flush()
    for at in range(3):
        store.faults = ["ok"] * at + [fault]
        with pytest.raises(Overloaded):
            roll_up(records, NOON + 2 * HOUR, round_s=600)
        assert total(records).input_tokens == sum(range(1400))
    store.faults = []
    store.land()
    roll_up(records, NOON + 2 * HOUR, round_s=600)
    assert records.usage_parts.query() == []
    assert total(records).input_tokens == sum(range(1400))
    spent = [usage.spent(records, owner, NOON).input_tokens for owner in ("ada", "bob")]
    assert sum(spent) == sum(range(1400))


@on_both
def test_two_roll_ups_at_once_count_once(records: Records, store: Flaky):
    writer = UsageWriter(records, Clock())
    for number in range(50):
        writer.add(f"owner{number % 5}", used(number), tokens(number))
    writer.flush()
    store.before_commit = lambda: roll_up(records, NOON + 2 * HOUR) and None
    roll_up(records, NOON + 2 * HOUR)
    assert total(records).input_tokens == sum(range(50))


@on_both
def test_a_part_that_is_folded_while_one_reads_counts_once(records: Records, store: Flaky):
    writer = UsageWriter(records, Clock())
    writer.add("ada", SECOND, tokens(10))
    writer.flush()
    plain = store.inner.query

    def query(collection: str, *arguments: Any, **options: Any) -> Any:
        found = plain(collection, *arguments, **options)
        if collection == UsagePart.collection and found:
            store.inner.query = plain
            roll_up(records, NOON + 2 * HOUR)
        return found

    for ask in (lambda: total(records).input_tokens, lambda: usage.spent(records, "ada", NOON).input_tokens):
        store.inner.query = query
        assert ask() == 10
        store.inner.query = plain
        # The next one finds an open part again.
        writer.add("ada", SECOND, tokens(0))
        store.inner.commit([final_part("ada", f"job{random.random()}", NOON, SECOND, Amounts())])


def test_totals_wait_while_the_store_is_away(records: Records, store: Flaky):
    clock = Clock()
    writer = UsageWriter(records, clock)
    store.is_down = True
    for hour in range(5):
        clock.now = NOON + hour * HOUR
        writer.add("ada", SECOND, tokens(10))
        assert not writer.flush()
    store.is_down = False
    assert writer.flush()
    found = usage.read(records, hour_of(NOON), hour_of(NOON + 4 * HOUR))
    assert [(one.hour[-2:], one.amounts.input_tokens) for one in found] == [(f"{h}", 10) for h in range(12, 17)]


def test_memory_is_bounded_and_the_owners_totals_stay_right(records: Records, store: Flaky):
    clock = Clock()
    writer = UsageWriter(records, clock, max_lines=100)
    store.is_down = True
    for number in range(1000):
        writer.add("ada", SECOND.model_copy(update={"key_id": f"key_{number}"}), tokens(1))
        if number % 100 == 0:
            writer.flush()
    assert len(writer._places) == 101
    store.is_down = False
    assert writer.flush()
    found = usage.read(records, hour_of(NOON), hour_of(NOON))
    assert len(found) == 101 and total(records).requests == 1000
    assert [one.amounts.requests for one in found if one.used.model == OTHER] == [900]
    # What is written of past hours is forgotten.
    clock.now += HOUR
    assert writer.flush()
    assert not (writer._places or writer._parts or writer._open)


@on_both
def test_what_belongs_to_a_change_is_written_with_it_once(records: Records):
    write = record_draft("ada", "draft_1", NOON, model="gemini", input_tokens=9, output_tokens=4, cost=0.5)
    records.commit(write)
    with pytest.raises(StoreConflict):
        records.commit(write)
    roll_up(records, NOON + 2 * HOUR)
    (found,) = usage.read(records, hour_of(NOON), hour_of(NOON))
    assert found.used == Used(kind="drafting", base="gemini", model="gemini", job_id="draft_1")
    assert (found.amounts.input_tokens, found.amounts.output_tokens, found.amounts.cost) == (9, 4, 0.5)


def test_rows_and_folds_go_when_they_have_had_their_time_and_days_stay(records: Records):
    clock = Clock()
    writer = UsageWriter(records, clock)
    for day in range(10):
        clock.now = NOON + day * 24 * HOUR
        writer.add("ada", SECOND, tokens(10))
    writer.flush()
    roll_up(records, clock.now + 2 * HOUR)
    drop_old(records, clock.now, keep_s=5 * 24 * HOUR)
    assert [row.value.hour[8:10] for row in records.usage_rows.query()] == ["30", "01", "02", "03", "04", "05"]
    assert len(records.usage_folds.query()) == 4
    assert usage.spent(records, "ada", NOON).input_tokens == 100


ADD = st.tuples(st.just("add"), st.integers(0, 1), st.integers(0, 3), st.integers(1, 9))
FLUSH = st.tuples(st.just("flush"), st.integers(0, 1))
# A late writer is one that has something to write when its hour is folded.
FOLD = st.just(("fold",))
OPS = st.one_of(
    *[ADD] * 4,
    *[FLUSH] * 3,
    *[FOLD] * 2,
    st.tuples(st.just("faults"), st.lists(st.sampled_from(["ok", "before", "after", "late"]), max_size=4)),
    st.tuples(st.just("land")),
    st.tuples(st.just("down"), st.booleans()),
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ops=st.lists(OPS, max_size=60))
def test_the_sum_over_everything_is_what_was_recorded(tmp_path_factory: pytest.TempPathFactory, ops: list[Any]):
    store = Flaky(open_documents(f"sqlite:{tmp_path_factory.mktemp('usage') / 'usage.db'}"))
    records, clock = Records(store), Clock()
    writers = [UsageWriter(records, clock) for _ in range(2)]
    recorded: dict[str, Amounts] = {}
    for op, *values in ops:
        match op:
            case "add":
                owner = f"owner{values[1] % 2}"
                writers[values[0]].add(owner, used(values[1]), tokens(values[2]))
                recorded[owner] = recorded.get(owner, Amounts()) + tokens(values[2])
            case "flush":
                writers[values[0]].flush()
            case "fold":
                clock.now += HOUR + SETTLE_S
                with contextlib.suppress(Overloaded):
                    roll_up(records, clock())
            case "faults":
                store.faults = values[0]
            case "land":
                store.land()
            case "down":
                store.is_down = values[0]
    store.is_down, store.faults = False, []
    assert all(writer.flush() for writer in writers)
    store.land()
    everything = sum(recorded.values(), Amounts())
    for _ in range(2):
        assert total(records) == everything
        for owner, amounts in recorded.items():
            spent = usage.spent(records, owner, NOON)
            assert (spent.input_tokens, spent.output_tokens) == (amounts.input_tokens, amounts.output_tokens)
        clock.now += 2 * HOUR
        roll_up(records, clock())
    assert records.usage_parts.query() == []
    store.close()


def test_whichever_commit_fails_each_token_counts_once(tmp_path: Path):
    """Each commit of a story of two writers and the roll-up: lost before it, after it, or come true later."""

    def play(name: str, faults: list[str]) -> int:
        store = Flaky(open_documents(f"sqlite:{tmp_path / name}"))
        store.faults = faults
        records, clock = Records(store), Clock()
        writers = [UsageWriter(records, clock) for _ in range(2)]
        recorded = 0
        for wait in (0.0, 10.0, HOUR + SETTLE_S, 5.0, HOUR + SETTLE_S, HOUR + SETTLE_S):
            clock.now += wait
            with contextlib.suppress(Overloaded):
                roll_up(records, clock())
            for number, writer in enumerate(writers):
                writer.flush()
                for model in range(2):
                    recorded += 10**model
                    writer.add("ada", used(model), tokens(10**model))
                if number:
                    writer.flush()
        commits = len(store.commits)
        store.faults = []
        assert all(writer.flush() for writer in writers)
        store.land()
        roll_up(records, clock() + 2 * HOUR)
        assert records.usage_parts.query() == []
        assert total(records).input_tokens == usage.spent(records, "ada", NOON).input_tokens == recorded, faults
        store.close()
        return commits

    commits = play("plain", [])
    assert commits > 12
    for at in range(commits):
        for fault in ("before", "after", "late"):
            for times in (1, 2):
                play(f"{at}-{fault}-{times}", ["ok"] * at + [fault] * times)


RECORD_UNTIL_KILLED = """
import json, sys, time
from tuneloom.domain import Amounts, Used
from tuneloom.store import open_documents
from tuneloom.store.records import Records
from tuneloom.store.usage_writer import FLUSH_S, UsageWriter
writer = UsageWriter(Records(open_documents(sys.argv[1])))
used = Used(kind="inference", base="b", model="b", key_id="k")
flushed_at, count = time.time(), 0
while True:
    writer.add("ada", used, Amounts(requests=1, output_tokens=1))
    count += 1
    print(time.time(), count, flush=True)
    if time.time() - flushed_at >= FLUSH_S:
        flushed_at = time.time()
        assert writer.flush()
    time.sleep(0.01)
"""


def test_a_killed_process_loses_at_most_the_last_five_seconds(tmp_path: Path):
    url = f"sqlite:{tmp_path / 'usage.db'}"
    log = tmp_path / "log"
    with log.open("w") as out:
        process = subprocess.Popen([sys.executable, "-c", RECORD_UNTIL_KILLED, url], stdout=out)
        deadline = time.time() + 60
        while time.time() < deadline and log.read_text().count("\n") < 2:
            time.sleep(0.05)
        time.sleep(2 * FLUSH_S + random.random() * FLUSH_S)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    lines = [line.split() for line in log.read_text().splitlines() if line.endswith(tuple("0123456789"))]
    said = [(float(at), int(count)) for at, count in (line for line in lines if len(line) == 2)]
    found = total(Records(open_documents(url))).output_tokens
    older = max((count for at, count in said if at < said[-1][0] - 5.0), default=0)
    assert older > 100 and older <= found <= said[-1][1]


def test_prices_make_costs_and_must_be_of_a_base():
    priced = UsageSettings.model_validate(
        {"prices": {"b": {"input": 1.0, "cached": 0.25, "output": 4.0}}, "price_per_hour": 3.6}
    )
    million = 1_000_000
    amounts = Amounts(input_tokens=2 * million, cached_tokens=million, output_tokens=million, device_us=10 * million)
    assert priced.priced("b", amounts).cost == pytest.approx(1.0 + 0.25 + 4.0 + 0.01)
    assert priced.priced("other", amounts).cost == pytest.approx(0.01)
    assert UsageSettings(prices=priced.prices).priced("other", amounts).cost is None
    assert UsageSettings().priced("b", amounts) == amounts
    dear = UsageSettings.model_validate({"prices": {"b": {"input": 1.0, "output": 0}}})
    assert dear.priced("b", amounts).cost == pytest.approx(2.0)
    with pytest.raises(ValueError, match=r"usage\.prices"):
        Settings(home=Path("/x"), usage=dear)
