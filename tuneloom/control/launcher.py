"""Where attempts run. The seam `Launcher`, and its implementation on Ray's Jobs API. No records, no decisions.

A handle is the job's `submission_id`, known before the launch, so that every call can be repeated by anybody.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from tuneloom.domain import Job, model_name
from tuneloom.errors import TuneloomError

ENTRYPOINT = "exec python -m tuneloom.train"
STOP_WAIT_S = 30
REQUEST_TIMEOUT_S = 15.0

_ALIVE = frozenset({"PENDING", "RUNNING"})
_FINISHED = frozenset({"SUCCEEDED", "STOPPED"})


class LauncherUnavailable(TuneloomError):
    """The launcher does not answer: nothing is known about its attempts."""

    status = 503
    code = "launcher_unavailable"


@dataclass(frozen=True)
class Observation:
    """What the launcher knows of a handle. `unknown`: it never had it, or has forgotten it; nothing of it runs."""

    state: Literal["alive", "finished", "failed", "unknown"]
    message: str = ""

    @property
    def is_alive(self) -> bool:
        return self.state == "alive"


@dataclass(frozen=True)
class Room:
    """What a cluster has for attempts. `cores` are those of all its nodes, `node_cores` those of the largest.

    Memory is what the one host has free. Of several nodes it is the most that Ray has left on one of them; it
    `keeps_memory` for attempts then, all that was estimated of them, from their start.
    """

    free_cpus: float
    free_gpus: float
    cores: int
    node_cores: int
    free_memory_bytes: int | None = None
    keeps_memory: bool = False


class Launcher(Protocol):
    """Starts, watches and ends attempts. Every call blocks for seconds at most and raises LauncherUnavailable."""

    def launch(self, job: Job) -> None:
        """Start the current attempt of `job`; a no-op if its handle is known already."""
        ...

    def observe(self, submission_id: str) -> Observation: ...

    def stop(self, submission_id: str) -> None:
        """Ask an attempt to end, and end it by force soon after; a no-op if it is unknown or over."""
        ...

    def room(self) -> Room:
        """What is free at this moment."""
        ...


class RayJobsLauncher:
    """Each attempt is a Ray job, seen in the dashboard and in `ray job list`.

    `connect` makes a client (see `ray_jobs_client`); it is called again after a failure, since the dashboard may have
    moved. `measure` tells what the cluster has free. Nothing that a user wrote reaches a shell: the entrypoint is
    constant and ids travel in the environment.
    """

    def __init__(self, connect: Callable[[], Any], home: Path, measure: Callable[[], Room]) -> None:
        self._connect = connect
        self._home = home
        self._measure = measure
        self._client: Any = None

    def launch(self, job: Job) -> None:
        if self.observe(job.submission_id).state != "unknown":
            return
        try:
            self._call(
                "submit_job",
                entrypoint=ENTRYPOINT,
                submission_id=job.submission_id,
                runtime_env={"env_vars": self._environment(job)},
                metadata=_labels(job),
                # The driver only waits for its workers; the workers ask for what they need.
                entrypoint_num_cpus=0,
            )
        except _Refused as refusal:
            # Another control may have submitted it between the look and the call: then it is there.
            if self.observe(job.submission_id).state == "unknown":
                raise LauncherUnavailable(f"Ray refused attempt `{job.submission_id}`: {refusal}") from refusal

    def observe(self, submission_id: str) -> Observation:
        try:
            info = self._call("get_job_info", submission_id)
        except _Refused as refusal:
            if refusal.is_unknown:
                return Observation("unknown")
            raise LauncherUnavailable(f"Ray did not tell about `{submission_id}`: {refusal}") from refusal
        status = str(getattr(info.status, "value", info.status))
        message = info.message or ""
        if status in _ALIVE:
            return Observation("alive", message)
        return Observation("finished" if status in _FINISHED else "failed", message)

    def stop(self, submission_id: str) -> None:
        try:
            self._call("stop_job", submission_id)
        except _Refused as refusal:
            if not refusal.is_unknown:
                raise LauncherUnavailable(f"Ray did not stop `{submission_id}`: {refusal}") from refusal

    def room(self) -> Room:
        try:
            return self._measure()
        except Exception as error:
            # Ray's GCS client raises errors of many kinds; with any of them, nothing is known.
            raise LauncherUnavailable(f"Ray does not tell what is free: {error}") from error

    def _environment(self, job: Job) -> dict[str, str]:
        return {
            "TUNELOOM_HOME": str(self._home),
            "TUNELOOM_JOB": job.id,
            "TUNELOOM_ATTEMPT": str(job.attempt),
            # `python` of the entrypoint is the one that runs tuneloom here. Ray expands the variable on the node.
            "PATH": f"{Path(sys.executable).parent}:${{PATH}}",
            # Ray Train ends a run in order on SIGINT only; the default is SIGTERM, then SIGKILL after 3 s.
            "RAY_JOB_STOP_SIGNAL": "SIGINT",
            "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S),
        }

    def _call(self, method: str, *args: Any, **options: Any) -> Any:
        """Call the client. A refusal by the server is `_Refused`; trouble on the way there is LauncherUnavailable."""
        try:
            if self._client is None:
                self._client = self._connect()
            return getattr(self._client, method)(*args, **options)
        except RuntimeError as error:
            # The client raises a bare RuntimeError for each answer but 200, with status and text in the message.
            if "status code" in str(error):
                raise _Refused(str(error)) from error
            self._client = None
            raise LauncherUnavailable(f"Ray's job server is not ready: {error}") from error
        except (OSError, ValueError) as error:
            # ConnectionError and requests' own errors (timeouts too) are OSErrors.
            self._client = None
            raise LauncherUnavailable(f"Ray's job server does not answer: {error}") from error


class _Refused(Exception):
    @property
    def is_unknown(self) -> bool:
        return "status code 404" in str(self)


def ray_jobs_client(address: str, timeout_s: float = REQUEST_TIMEOUT_S) -> Any:
    """A Ray JobSubmissionClient for `address` (a cluster's `host:port` or a dashboard's URL) whose calls end in time.

    It authenticates as Ray is set up to (`RAY_AUTH_MODE`, `RAY_AUTH_TOKEN_PATH`).
    """
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    class TimedClient(JobSubmissionClient):
        # ray 2.60 sets no timeout on its requests and has no option for one; look for `timeout` in `SubmissionClient`.
        def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
            try:
                return super()._do_request(method, endpoint, **{"timeout": timeout_s, **options})
            except AuthenticationError as error:
                raise PermissionError(str(error)) from error

    # ray 2.60 lets RAY_API_SERVER_ADDRESS and RAY_ADDRESS override the argument, and another cluster on this host
    # may be named there. The first wins over the second, so naming ours there is what makes the argument count.
    os.environ["RAY_API_SERVER_ADDRESS"] = address
    return TimedClient(address)


def ray_room() -> Room:
    """What the Ray cluster around this process has."""
    import ray
    from ray._private.state import available_resources_per_node

    free = ray.available_resources()
    nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    gives = {"free_cpus": free.get("CPU", 0.0), "free_gpus": free.get("GPU", 0.0)}
    if len(nodes) > 1:
        left = [int(node.get("memory", 0)) for node in available_resources_per_node().values()]
        return Room(
            **gives, cores=sum(nodes), node_cores=max(nodes), free_memory_bytes=max(left, default=0), keeps_memory=True
        )
    # A local cluster claims more CPUs than its machine has, so that nothing waits for bookkeeping.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Room(**gives, cores=cores, node_cores=cores, free_memory_bytes=_free_memory())


def _free_memory(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Free memory of this machine, or of the control group that holds it; None where nobody tells."""
    try:
        lines = dict(line.split(":", 1) for line in (proc / "meminfo").read_text().splitlines() if ":" in line)
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    try:
        limit, used = (int((cgroup / name).read_text()) for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return free
    # Pages of files count as used, and go as soon as somebody needs them.
    return min(free, max(0, limit - used + int(stat.get("inactive_file", 0))))


def _labels(job: Job) -> dict[str, str]:
    """What the dashboard shows beside the job."""
    name = model_name(job.spec, job.id)
    return {
        "name": f"train {name}",
        "job": job.id,
        "attempt": str(job.attempt),
        "model": name,
        "base": job.spec.base,
        "owner": job.owner,
    }
