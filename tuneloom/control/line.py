"""Which waiting job starts next, and what the others wait for. Pure: no records, no cluster.

Owners take turns: first the one with the fewest running jobs, then the one who has used the least of the last day, less
what they have waited since; of one owner the oldest job. So each hour of waiting makes up for an hour of use, and
nobody waits for ever behind owners who come later. Jobs that lost their attempt go before all others.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from tuneloom.config import TrainSettings
from tuneloom.control.launcher import Room
from tuneloom.domain import Job

ITS_TURN = "its turn"


@dataclass(frozen=True)
class Running:
    """An open attempt: whether the cluster counts its share as used, and the most memory that it has held."""

    job: Job
    is_begun: bool = True
    memory_bytes: int = 0


@dataclass(frozen=True)
class Load:
    """What runs, the seconds that each owner has used within the last day, and when they last had a running job."""

    running: Sequence[Running]
    used_s: Mapping[str, float]
    served_at: Mapping[str, float]

    def num_running(self) -> Counter[str]:
        return Counter(running.job.owner for running in self.running)


@dataclass(frozen=True)
class Place:
    """Where a queued job stands, from 1, and when it may start and end; None where a job before it has no estimate."""

    position: int
    starts_at: float | None
    ends_at: float | None


def line(waiting: Iterable[Job], load: Load, now: float) -> list[Job]:
    """All waiting jobs in the order in which they start."""
    oldest = sorted(waiting, key=lambda job: (job.created_at, job.id))
    order = [job for job in oldest if job.losses]
    running = load.num_running() + Counter(job.owner for job in order)
    queues: dict[str, list[Job]] = defaultdict(list)
    for job in reversed(oldest):
        if not job.losses:
            queues[job.owner].append(job)
    debt = {owner: _debt_s(owner, jobs[-1], load, now) for owner, jobs in queues.items()}
    while queues:
        owner = min(queues, key=lambda o: (running[o], debt[o], queues[o][-1].created_at, queues[o][-1].id))
        order.append(queues[owner].pop())
        running[owner] += 1
        if not queues[owner]:
            del queues[owner]
    return order


def decide(
    order: Sequence[Job], load: Load, settings: TrainSettings, room: Room | None
) -> Iterator[tuple[Job, str | None]]:
    """Each job of the line with what it waits for; None: it starts now.

    While nothing runs the first job starts, whatever is free: a cluster may grow only once it is asked. With `room`
    None, nothing is said of the others. A job that does not fit beside those that run holds up the line,
    or smaller ones could keep it waiting for ever.
    """
    running, mine = list(load.running), load.num_running()
    is_blocked = False
    for job in order:
        if running and room is None:
            return
        reason = _limit(job, mine, len(running), settings)
        if reason is None:
            reason = ITS_TURN if is_blocked else _lack(job, running, settings, room)
            is_blocked = reason is not None
        if reason is None:
            running.append(Running(job, is_begun=False))
            mine[job.owner] += 1
        yield job, reason


def places(order: Sequence[Job], load: Load, settings: TrainSettings, now: float) -> dict[str, Place]:
    """Where each job of the line stands, and when it may start if all take what was estimated."""
    ends: list[tuple[float | None, str]] = [(_ends_at(running.job, now), running.job.owner) for running in load.running]
    num_places = settings.max_running or max(1, len(ends))
    mine = load.num_running()
    left, found, at = list(order), {}, now
    positions = {job.id: position for position, job in enumerate(order, 1)}
    while left:
        able = next((job for job in left if mine[job.owner] < settings.max_running_per_owner), None)
        if able is not None and len(ends) < num_places:
            ends_at = None if able.estimate is None else at + able.estimate.seconds
            found[able.id] = Place(positions[able.id], at, ends_at)
            ends.append((ends_at, able.owner))
            mine[able.owner] += 1
            left.remove(able)
            continue
        if any(end is None for end, _ in ends):
            break
        next_end, owner = min((end, owner) for end, owner in ends if end is not None)
        ends.remove((next_end, owner))
        mine[owner] -= 1
        at = max(at, next_end)
    return {job.id: found.get(job.id) or Place(positions[job.id], None, None) for job in order}


def _debt_s(owner: str, oldest: Job, load: Load, now: float) -> float:
    waiting_since = max(load.served_at.get(owner, 0.0), oldest.created_at)
    return load.used_s.get(owner, 0.0) - max(0.0, now - waiting_since)


def _ends_at(job: Job, now: float) -> float | None:
    if job.estimated_finish is not None:
        return max(now, job.estimated_finish)
    if job.estimate is None:
        return None
    return max(now, (job.attempt_started_at or now) + job.estimate.seconds)


def _limit(job: Job, mine: Counter[str], num_running: int, settings: TrainSettings) -> str | None:
    if mine[job.owner] >= settings.max_running_per_owner:
        return f"a free place: {_jobs(mine[job.owner], ' of yours')}, the limit is {settings.max_running_per_owner}"
    if settings.max_running is not None and num_running >= settings.max_running:
        return f"a free place: {_jobs(num_running)}, the limit is {settings.max_running}"
    return None


def _lack(job: Job, running: Sequence[Running], settings: TrainSettings, room: Room | None) -> str | None:
    """What the cluster has not for `job` beside those that run."""
    if not running:
        return None
    assert room is not None, "the cluster was asked, as something runs"
    if settings.max_running is None and (reason := _lack_of_devices(running, settings, room)):
        return reason
    if settings.num_gpus or room.free_memory_bytes is None or job.estimate is None:
        return None
    # On one machine all workers of a job are; of several, each looks for a node that has room for it.
    workers = 1 if room.keeps_memory else settings.workers
    growing = sum(_growing(one, room) for one in running) * workers
    needed = job.estimate.memory_bytes * workers
    if needed > room.free_memory_bytes - growing:
        return (
            f"free memory: it needs {needed / 1e9:.1f} GB, more than is left beside {_jobs(len(running), verb=False)}"
        )
    return None


def _growing(one: Running, room: Room) -> int:
    """Bytes of what is free that a worker of a running job may still take: up to what was estimated of it."""
    if one.job.estimate is None or (room.keeps_memory and one.is_begun):
        return 0
    return max(0, one.job.estimate.memory_bytes - one.memory_bytes)


def _lack_of_devices(running: Sequence[Running], settings: TrainSettings, room: Room) -> str | None:
    starting = sum(not r.is_begun for r in running)
    if settings.num_gpus:
        gpus = settings.num_gpus * settings.workers
        if room.free_gpus - starting * gpus < gpus:
            return f"a free GPU: it needs {gpus:g}"
    else:
        # Ray's CPUs are bookkeeping; steps on the same cores only take turns.
        needed = settings.cores_of(room.node_cores) * settings.workers
        left = room.cores - len(running) * needed
        if left < needed:
            return f"free cores: it needs {needed}, {_jobs(len(running))}"
    cpus = settings.num_cpus * settings.workers
    if room.free_cpus - starting * cpus < cpus:
        return f"free CPUs of the cluster: it needs {cpus:g}"
    return None


def _jobs(count: int, of: str = "", *, verb: bool = True) -> str:
    noun = "job" if count == 1 else "jobs"
    return f"{count} {noun}{of}" + ((" runs" if count == 1 else " run") if verb else "")
