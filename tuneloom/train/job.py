"""The driver of an attempt: a Ray Train run of one worker, watched from here. The training itself is `attempt`.

The worker writes to the store by itself. The driver keeps the heartbeat until the worker has begun, prints the job's
events as they come, and has the last word only where the worker could not have it.
"""

import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tuneloom.config import Settings, TrainSettings, load
from tuneloom.domain import Job, JobError, Progress
from tuneloom.errors import TuneloomError
from tuneloom.store import Store
from tuneloom.train.environment import WORKER_ENVIRONMENT
from tuneloom.train.failure import describe, is_out_of_memory, worker_lost
from tuneloom.train.folders import run_folder, stop_file
from tuneloom.train.progress import HEARTBEAT_S, FenceLost, Voice
from tuneloom.train.tail import Tail

if TYPE_CHECKING:
    from tuneloom.train.team import Team

logger = logging.getLogger(__name__)

MAX_WORKER_DEATHS = 2
# How long the worker may take to save and leave. After SIGTERM, `ray job stop` kills in three seconds; control asks by
# SIGINT and waits longer.
STOP_WAIT_S = {signal.SIGTERM: 2.5, signal.SIGINT: 25.0}
STARTING = "starting"
NOTICE_POLL_S = 1.0

EXIT_OK, EXIT_FAILED, EXIT_FENCED, EXIT_STOPPED = 0, 1, 3, 143


class _Told(BaseException):
    """A signal asks this process to end; `wait_s` is the time that is left."""

    def __init__(self, wait_s: float) -> None:
        super().__init__()
        self.wait_s = wait_s


def drive(settings: Settings, store: Store, job_id: str, attempt: int, say: Callable[[str], None]) -> int:
    """Run an attempt on the Ray cluster around this process and return the exit code. `say` prints one line."""
    voice = Voice(store.records, job_id, attempt)
    try:
        voice.say(stage=STARTING)
        tail = Tail(store.records, job_id, say)
        stop = stop_file(settings, job_id, attempt)
        stop.unlink(missing_ok=True)
        run = _Run(settings, job_id, attempt, resources_of(settings.train, store.records.jobs.get(job_id).value))
        _listen()
        try:
            run.start()
            _watch(run, voice, tail, settings.train.start_timeout_s)
        except _Told as told:
            stop.parent.mkdir(parents=True, exist_ok=True)
            stop.touch()
            run.join(told.wait_s)
            tail.print_new()
            say("Stopped before the end; the next attempt goes on from the last checkpoint.")
            return EXIT_STOPPED
        tail.print_new()
        return _last_word(settings, voice, run, tail, say)
    except FenceLost as error:
        say(f"Stopped: {error}.")
        return EXIT_FENCED


class _Run:
    """The call of Ray Train in a thread: in the main thread it would take the signals for itself."""

    def __init__(self, settings: Settings, job_id: str, attempt: int, resources: dict[str, float]) -> None:
        self._resources = resources
        self.error: BaseException | None = None
        self._settings = settings
        self._config = {"home": str(settings.home), "job_id": job_id, "attempt": attempt}
        self._name = f"{job_id}-a{attempt}"
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._fit, name="ray-train", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def join(self, timeout_s: float) -> bool:
        """Whether the run is over."""
        # Not by `Thread.join`: Python 3.11 takes a thread for ended when a signal's handler raises in there.
        return self._is_over.wait(timeout_s)

    def _fit(self) -> None:
        try:
            fit(self._settings, self._name, self._config, self._resources)
        except Exception as error:
            self.error = error
        finally:
            self._is_over.set()


def fit(settings: Settings, name: str, config: dict[str, Any], resources: dict[str, float]) -> None:
    """Run `worker` with such resources by Ray Train, which starts it again if its process dies."""
    # The print patch writes 1,200 lines of bytecode a run (ray 2.60); both are read where the run begins.
    os.environ["RAY_TRAIN_ENABLE_PRINT_PATCH"] = "0"
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    # How soon the worker is told that its node is about to be taken away.
    os.environ.setdefault("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")
    from ray.train import FailureConfig, RunConfig, ScalingConfig

    from tuneloom.train.trainer import LeanTrainer

    storage = settings.home / "runs" / "ray"
    trainer = LeanTrainer(
        worker,
        train_loop_config=config,
        scaling_config=ScalingConfig(
            num_workers=settings.train.workers, use_gpu="GPU" in resources, resources_per_worker=resources
        ),
        # The states of a run are ours (`checkpoints`): Ray Train's own snapshot is overwritten in place, and one that a
        # crash has cut off makes a run of the same name unusable. So each attempt has a name of its own.
        run_config=RunConfig(
            name=name,
            storage_path=str(storage),
            # A node that is taken away says nothing against the run.
            failure_config=FailureConfig(max_failures=MAX_WORKER_DEATHS, max_preemption_failures=-1),
            worker_runtime_env=_runtime_env(),
        ),
    )
    try:
        trainer.fit()
    finally:
        shutil.rmtree(storage / name, ignore_errors=True)


def resources_of(train: TrainSettings, job: Job) -> dict[str, float]:
    """What Ray keeps for the worker of `job` on one node, and looks for a node that has it.

    Of several nodes it keeps the memory that was estimated, within what the largest has. A single machine needs no
    such bookkeeping: there the queue looks at what is really free.
    """
    import ray

    resources: dict[str, float] = {"CPU": train.num_cpus}
    if train.num_gpus:
        return {**resources, "GPU": train.num_gpus}
    memory = [node["Resources"].get("memory", 0.0) for node in ray.nodes() if node["Alive"]]
    if len(memory) > 1 and job.estimate is not None:
        resources["memory"] = min(float(job.estimate.memory_bytes), max(memory))
    return resources


def _runtime_env() -> dict[str, Any]:
    """What the worker's process lacks of its environment.

    With nothing of its own it may be one of the processes that Ray has begun to start with the driver.
    """
    missing = {name: value for name, value in WORKER_ENVIRONMENT.items() if name not in os.environ}
    return {"env_vars": missing} if missing else {}


def worker(config: dict[str, Any]) -> str:
    """What runs in the worker process. It steps back so that requests served beside it keep their latency."""
    # Here, since the driver does without all that an attempt imports.
    from tuneloom.train.attempt import run_attempt
    from tuneloom.train.follow import follow
    from tuneloom.train.libraries import import_libraries

    settings = load(config["home"])
    # Seconds of imports, before it steps back: Ray starts processes beside it now, and would hold it up.
    import_libraries(settings.train.threads)
    step_back(settings.train)
    team = _team()
    try:
        if team.leads:
            return run_attempt(settings, config["job_id"], config["attempt"], _notice(), team)
        follow(settings, config["job_id"], team)
        return "followed"
    finally:
        team.leave()


def _team() -> "Team":
    """The workers of this run; each finds the others through Ray Train."""
    import ray.train
    from ray.train.collective import broadcast_from_rank_zero

    from tuneloom.train.team import Team

    context = ray.train.get_context()
    host = ray.util.get_node_ip_address()
    return Team.meet(context.get_world_rank(), context.get_world_size(), host, broadcast_from_rank_zero)


def step_back(train: TrainSettings) -> None:
    """Lower the priority of this thread, and of all that it starts from here on."""
    os.nice(max(0, train.niceness - os.nice(0)))
    # Only Linux has these classes.
    policy = {"batch": "SCHED_BATCH", "idle": "SCHED_IDLE"}.get(train.scheduling, "")
    if hasattr(os, policy or "-"):
        os.sched_setscheduler(0, getattr(os, policy), os.sched_param(0))


def _notice() -> threading.Event:
    """It is set once Ray says that the worker's node is about to be taken away.

    In a thread of its own: the call asks another process, which may be on a node that is gone.
    """
    import ray.train

    notice = threading.Event()

    def ask() -> None:
        while not notice.is_set():
            try:
                if ray.train.get_preemption_info() is not None:
                    notice.set()
            except Exception:
                # The process that is asked may be gone, or not be there yet; the run goes on without.
                logger.warning("nobody tells whether this node will be taken away", exc_info=True)
            time.sleep(NOTICE_POLL_S)

    threading.Thread(target=ask, name="notice", daemon=True).start()
    return notice


def _listen() -> None:
    """Turn SIGTERM and SIGINT into `_Told`. Ray's own handlers end the process at once; ours come after `ray.init`."""

    def told(number: int, frame: object) -> None:
        raise _Told(STOP_WAIT_S[signal.Signals(number)])

    for number in STOP_WAIT_S:
        signal.signal(number, told)


def _watch(run: _Run, voice: Voice, tail: Tail, start_timeout_s: float) -> None:
    """Until the run is over: print events, and keep the heartbeat as long as no worker does."""
    begun_at = beat_at = time.monotonic()
    while not run.join(0.25):
        tail.print_new()
        now = time.monotonic()
        if now - beat_at >= HEARTBEAT_S and now - begun_at < start_timeout_s:
            beat_at = now
            if voice.last_word().stage == STARTING:
                voice.heartbeat()


def _last_word(settings: Settings, voice: Voice, run: _Run, tail: Tail, say: Callable[[str], None]) -> int:
    # Control may have registered what the worker published, and closed the attempt, before this process looks.
    progress = voice.last_word()
    if progress.outcome is None:
        error = run.error
        failure = describe_end(error, settings)
        if error is not None:
            logger.error("the run broke: %s", error)
        voice.say(stage="failed", outcome="failed", error=failure)
        shutil.rmtree(run_folder(settings, progress.id), ignore_errors=True)
        progress = voice.progress()
    return report(progress, say)


def describe_end(error: BaseException | None, settings: Settings) -> JobError:
    """Why a run of Ray Train has ended without the last word of its leading worker."""
    if error is not None and type(error).__name__ != "WorkerGroupError":
        return describe(error, settings.home)
    # Those that follow have no voice; Ray hands on what they raised.
    raised = [getattr(each, "_base_exc", each) for each in getattr(error, "worker_failures", {}).values()]
    told = next((each for each in raised if isinstance(each, TuneloomError) or is_out_of_memory(each)), None)
    return worker_lost(MAX_WORKER_DEATHS + 1) if told is None else describe(told, settings.home)


def report(progress: Progress, say: Callable[[str], None]) -> int:
    """Print how the run has ended; the exit code for it."""
    if progress.outcome == "failed":
        assert progress.error is not None, "a failure has a reason"
        say(f"Failed ({progress.error.code}): {progress.error.message}")
        return EXIT_FAILED
    say(
        {
            "published": f"Trained {progress.total_steps} steps, {progress.trained_tokens:,} tokens; handed over.",
            "paused": f"Paused at step {progress.step}.",
            "cancelled": f"Cancelled at step {progress.step}.",
        }[progress.outcome or "paused"]
    )
    return EXIT_OK
