from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.control.conftest import add_job
from tests.control.fakes import ROOM
from tuneloom.config import TrainSettings
from tuneloom.control.launcher import Room
from tuneloom.control.line import Load, Running, decide, line, places
from tuneloom.control.queue import WINDOW_S, is_waiting, read_ended, read_load
from tuneloom.domain import Estimate, Job, JobSpec, Progress, Usage

NOW = 1_800_000_000.0
IDLE = Load([], {}, {})
ONE_THREAD = TrainSettings(threads=1)


def job(owner: str, at: float = 0.0, **fields: object) -> Job:
    """A queued job, created `at` seconds before or after NOW."""
    spec = JobSpec(base="b", training_file="file-1", seed=1)
    known = {"state": "queued", "requested_model": "b", "created_at": NOW + at, "spec": spec, "owner": owner}
    return Job.model_validate({"id": f"{owner}{at:g}", **known, **fields})


def estimated(seconds: float = 60.0, memory_bytes: int = 0) -> Estimate:
    return Estimate(
        tokens=1,
        steps=1,
        seconds=seconds,
        seconds_low=seconds,
        seconds_high=seconds,
        memory_bytes=memory_bytes,
        based_on="a test",
    )


def runs(*owners: str, **fields: object) -> Load:
    running = [
        Running(job(owner, -100, state="running", attempt=1, attempt_open=True, attempt_started_at=NOW - 100, **fields))
        for owner in owners
    ]
    return Load(running, {}, {owner: NOW for owner in owners})


def ids(jobs: list[Job]) -> list[str]:
    return [each.id for each in jobs]


def reasons(order: list[Job], load: Load, train: TrainSettings, room: Room | None = ROOM) -> list[str | None]:
    return [reason for _, reason in decide(order, load, train, room)]


def test_owners_take_turns_and_each_ones_oldest_job_is_first():
    many = [job("ada", -90 + i) for i in range(3)]
    assert ids(line([*many, job("bob", -10), job("eve", -5)], IDLE, NOW)) == [
        "ada-90",
        "bob-10",
        "eve-5",
        "ada-89",
        "ada-88",
    ]


def test_who_has_a_running_job_comes_after_those_who_have_none():
    assert ids(line([job("ada", -50), job("bob", -1)], runs("ada"), NOW)) == ["bob-1", "ada-50"]


def test_who_has_used_less_of_the_day_comes_first():
    load = Load([], {"ada": 3600.0, "bob": 60.0}, {"ada": NOW, "bob": NOW})
    assert ids(line([job("ada", -50), job("bob", -1)], load, NOW)) == ["bob-1", "ada-50"]


def test_waiting_makes_up_for_use():
    load = Load([], {"ada": 3600.0}, {"ada": NOW - 4000})
    assert ids(line([job("ada", -4000), job("bob", -1)], load, NOW)) == ["ada-4000", "bob-1"]


def test_a_job_that_lost_its_attempt_goes_on_before_others():
    assert ids(line([job("bob", -90), job("ada", -1, losses=1, attempt=1)], IDLE, NOW)) == ["ada-1", "bob-90"]


def test_the_limits_are_told_to_those_they_hold_up():
    order = [job("ada", -3), job("bob", -2), job("eve", -1)]
    assert reasons(order, runs("ada"), TrainSettings(max_running=2)) == [
        "a free place: 1 job of yours runs, the limit is 1",
        None,
        "a free place: 2 jobs run, the limit is 2",
    ]


def test_jobs_run_side_by_side_while_there_are_cores():
    order = [job("bob", -2), job("eve", -1)]
    assert reasons(order, runs("ada"), ONE_THREAD) == [None, "free cores: it needs 1, 2 jobs run"]
    assert reasons(order, runs("ada"), TrainSettings()) == ["free cores: it needs 2, 1 job runs", "its turn"]


def test_jobs_run_side_by_side_while_there_are_gpus_and_what_starts_counts_already():
    order = [job("bob", -2), job("eve", -1)]
    train = TrainSettings(num_gpus=1)
    two = Room(free_cpus=9, free_gpus=2, cores=8, node_cores=4)
    assert reasons(order, runs("ada"), train, two) == [None, None]
    starting = Load([Running(job("ada"), is_begun=False)], {}, {})
    assert reasons(order, starting, train, two) == [None, "a free GPU: it needs 1"]


def test_a_job_that_does_not_fit_beside_the_others_holds_up_smaller_ones_behind_it():
    order = [job("bob", -2, estimate=estimated(memory_bytes=7 << 30)), job("eve", -1, estimate=estimated())]
    load = runs("ada", estimate=estimated(memory_bytes=2 << 30))
    assert reasons(order, load, ONE_THREAD) == [
        "free memory: it needs 7.5 GB, more than is left beside 1 job",
        "its turn",
    ]
    held = Load([Running(load.running[0].job, memory_bytes=2 << 30)], {}, {})
    assert reasons(order, held, ONE_THREAD) == [None, "free cores: it needs 1, 2 jobs run"]


def test_what_ray_keeps_for_a_running_job_on_several_nodes_is_not_counted_twice():
    order = [job("bob", -2, estimate=estimated(memory_bytes=5 << 30))]
    load = runs("ada", estimate=estimated(memory_bytes=4 << 30))
    room = Room(free_cpus=8, free_gpus=0, cores=8, node_cores=4, free_memory_bytes=6 << 30, keeps_memory=True)
    assert reasons(order, load, ONE_THREAD, room) == [None]
    starting = Load([Running(load.running[0].job, is_begun=False)], {}, {})
    assert reasons(order, starting, ONE_THREAD, room) == [
        "free memory: it needs 5.4 GB, more than is left beside 1 job"
    ]


def test_with_nothing_running_the_first_job_starts_whatever_is_free():
    nothing = Room(free_cpus=0, free_gpus=0, cores=0, node_cores=0, free_memory_bytes=0)
    order = [job("ada", estimate=estimated(memory_bytes=1 << 40)), job("bob")]
    for room in (nothing, None):
        assert reasons(order, IDLE, TrainSettings(num_gpus=1), room)[0] is None
    assert reasons(order, IDLE, TrainSettings(), None) == [None]


def test_a_number_of_places_is_taken_at_its_word():
    nothing = Room(free_cpus=0, free_gpus=0, cores=0, node_cores=0)
    assert reasons([job("bob")], runs("ada"), TrainSettings(max_running=3, num_gpus=1), nothing) == [None]


def test_places_in_line_tell_when_a_job_may_start_and_end():
    order = [job(name, estimate=estimated(60)) for name in ("bob", "eve")]
    found = places(order, runs("ada", estimated_finish=NOW + 30), TrainSettings(), NOW)
    assert [(found[each.id].position, found[each.id].starts_at, found[each.id].ends_at) for each in order] == [
        (1, NOW + 30, NOW + 90),
        (2, NOW + 90, NOW + 150),
    ]


def test_a_job_without_estimate_leaves_those_behind_it_without_times():
    order = [job("bob"), job("eve", estimate=estimated(60))]
    found = places(order, runs("ada", estimate=estimated(150)), TrainSettings(), NOW)
    assert (found["bob0"].starts_at, found["bob0"].ends_at) == (NOW + 50, None)
    assert (found["eve0"].position, found["eve0"].starts_at) == (2, None)


def test_places_respect_the_limit_of_an_owner():
    order = [job("ada", i, estimate=estimated(60)) for i in range(2)]
    found = places(order, runs("ada", estimated_finish=NOW + 30), TrainSettings(max_running=4), NOW)
    assert [found[each.id].starts_at for each in order] == [NOW + 30, NOW + 90]


def test_the_load_is_what_the_records_tell(store):
    usage = Usage(tokens=1, steps=1, seconds=40.0, memory_bytes=1)
    ended = {"state": "succeeded", "attempt": 1, "usage": usage}
    add_job(store, owner="ada", suffix="a", at=NOW - 900, finished_at=NOW - 500, **ended)
    add_job(store, owner="ada", suffix="b", at=NOW - 9e5, finished_at=NOW - WINDOW_S - 1, **ended)
    add_job(store, owner="bob", suffix="c", at=NOW - 900, state="paused", attempt=1, usage=usage)
    add_job(store, owner="eve", suffix="d", at=NOW - 900, state="cancelled", finished_at=NOW - 5)
    open_job = add_job(
        store, owner="kim", suffix="e", at=NOW - 90, state="running", attempt=1, attempt_open=True,
        attempt_started_at=NOW - 70,
    )  # fmt: skip
    progress = {"id": open_job.id, "owner": "kim", "attempt": 1, "heartbeat_at": NOW, "memory_bytes": 7}
    record = Progress.model_validate({**progress, "stage": "training"})
    store.records.commit(store.records.progress.create(record))
    load = read_load(store.records, NOW, [open_job], read_ended(store.records, NOW))
    assert load.used_s == {"ada": 40.0, "bob": 40.0, "eve": 0.0, "kim": 70.0}
    assert load.served_at["ada"] == NOW - 500 and load.served_at["kim"] == NOW and "eve" not in load.served_at
    assert [(r.job.id, r.is_begun, r.memory_bytes) for r in load.running] == [(open_job.id, True, 7)]


class Cluster:
    """Runs the line on a clock of its own: jobs take what they take, and every decision is checked."""

    def __init__(self, train: TrainSettings, room: Room) -> None:
        self.train = train
        self.room = room
        self.now = NOW
        self.waiting: dict[str, Job] = {}
        self.running: dict[str, tuple[Job, float]] = {}
        self.ended: list[Job] = []
        self.waited: dict[str, float] = {}
        self.durations: dict[str, float] = {}

    def add(self, owner: str, duration_s: float, memory_bytes: int) -> None:
        id = f"{owner}-{len(self.durations)}"
        estimate = estimated(duration_s, memory_bytes)
        self.waiting[id] = job(owner, self.now - NOW + len(self.durations) * 1e-6, id=id, estimate=estimate)
        self.durations[id] = duration_s

    def load(self) -> Load:
        used, served = Counter(), {}
        for each in self.ended:
            if each.finished_at >= self.now - WINDOW_S:
                used[each.owner] += self.durations[each.id]
                served[each.owner] = max(served.get(each.owner, 0.0), each.finished_at)
        for each, end in self.running.values():
            used[each.owner] += self.now - (end - self.durations[each.id])
            served[each.owner] = self.now
        return Load([Running(each) for each, _ in self.running.values()], used, served)

    def free(self) -> Room:
        held = sum(each.estimate.memory_bytes for each, _ in self.running.values())
        return Room(**{**vars(self.room), "free_memory_bytes": self.room.free_memory_bytes - held})

    def tick(self, seconds: float) -> None:
        self.now += seconds
        for id, (each, end) in list(self.running.items()):
            if end <= self.now:
                del self.running[id]
                self.ended.append(each.model_copy(update={"finished_at": end}))
        load = self.load()
        # What is begun holds its memory in `free`.
        load = Load([Running(r.job, memory_bytes=r.job.estimate.memory_bytes) for r in load.running], *vars_of(load))
        for each, reason in decide(line(self.waiting.values(), load, self.now), load, self.train, self.free()):
            if reason is None:
                del self.waiting[each.id]
                self.running[each.id] = (each, self.now + self.durations[each.id])
                self.waited[each.id] = self.now - each.created_at
        self.check()

    def check(self) -> None:
        running = [each for each, _ in self.running.values()]
        assert max(Counter(each.owner for each in running).values(), default=0) <= self.train.max_running_per_owner
        assert len(running) <= (self.train.max_running or self.room.cores // self.train.threads)
        if len(running) > 1:
            assert sum(each.estimate.memory_bytes for each in running) <= self.room.free_memory_bytes
        assert running or not self.waiting, "a free cluster leaves nobody waiting"


def vars_of(load: Load) -> tuple[dict, dict]:
    return load.used_s, load.served_at


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    max_running=st.sampled_from([None, 1, 2, 3]),
    per_owner=st.integers(1, 3),
)
def test_limits_hold_and_every_job_runs_whatever_comes(data, max_running, per_owner):
    train = TrainSettings(max_running=max_running, max_running_per_owner=per_owner, threads=1)
    room = Room(free_cpus=99, free_gpus=0, cores=4, node_cores=4, free_memory_bytes=10 << 30)
    cluster = Cluster(train, room)
    for _ in range(data.draw(st.integers(1, 25))):
        for _ in range(data.draw(st.integers(0, 3))):
            owner = data.draw(st.sampled_from(["ada", "bob", "eve"]))
            cluster.add(owner, data.draw(st.floats(1, 3000)), data.draw(st.integers(0, 9)) << 30)
        cluster.tick(data.draw(st.floats(1, 500)))
    for _ in range(len(cluster.waiting) + len(cluster.running) + 1):
        cluster.tick(3000)
    assert not cluster.waiting


@settings(max_examples=25, deadline=None)
@given(
    flood_s=st.floats(200, 900),
    newcomers=st.booleans(),
    used_s=st.floats(0, 5000),
    memory_gib=st.integers(0, 9),
)
def test_nobody_starves_behind_owners_who_never_stop(flood_s, newcomers, used_s, memory_gib):
    """Others always have jobs waiting, old owners or ever new ones; ada's one big job still has its turn in time."""
    cluster = Cluster(TrainSettings(max_running=1), Room(9, 0, 4, 4, free_memory_bytes=10 << 30))
    cluster.add("ada", used_s, 0)
    cluster.tick(1)
    cluster.tick(used_s)
    cluster.add("ada", 100, memory_gib << 30)
    mine = list(cluster.durations)[-1]
    rounds = 0
    while mine not in cluster.waited:
        for i in range(2):
            cluster.add(f"new{rounds}-{i}" if newcomers else f"old{i}", flood_s, 1 << 30)
        cluster.tick(flood_s)
        rounds += 1
        # Two jobs come in the time of one: those that came while ada's use was not yet made up for go first.
        assert rounds * flood_s <= 2 * used_s + 4 * flood_s


@pytest.mark.parametrize("count", [200])
def test_of_two_owners_a_late_one_waits_for_one_job_and_not_for_all_of_the_other(count):
    cluster = Cluster(TrainSettings(max_running=1), Room(9, 0, 4, 4, free_memory_bytes=1 << 30))
    for _ in range(count):
        cluster.add("ada", 60, 0)
    cluster.tick(1)
    cluster.add("bob", 60, 0)
    cluster.tick(60)
    assert list(cluster.running) == [f"bob-{count}"]


def test_only_queued_jobs_without_an_attempt_wait():
    assert is_waiting(job("ada"))
    assert not is_waiting(job("ada", attempt_open=True)) and not is_waiting(job("ada", state="paused"))
