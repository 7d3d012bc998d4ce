"""The local Ray cluster of one home: its ports, its environment, its processes. Nothing of what runs on it.

Every process of the cluster carries `TUNELOOM_CLUSTER` and `TUNELOOM_HOME` in its environment, so that they are found
by what they are and not by what started them, and no process of another cluster ever is. `ray stop` would end every
cluster of the host and is never used.
"""

import contextlib
import math
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path

import psutil
from pydantic import BaseModel, ConfigDict, ValidationError

from tuneloom import ports
from tuneloom.config import Settings
from tuneloom.config.locks import alone
from tuneloom.errors import TuneloomError

Report = Callable[[str], None]

MARKER = "TUNELOOM_CLUSTER"
STATE_FILE = "cluster.json"
LOCK_FILE = "cluster.lock"
TOKEN_FILE = "ray-token"
START_TIMEOUT_S = 300
STOP_GRACE_S = 10.0
KILL_WAIT_S = 8.0
OBJECT_STORE_BYTES = 128 << 20
# A socket path has 104 bytes on macOS. Ray puts `/session_<time>_<pid>/sockets/plasma_store` behind its folder.
MAX_RAY_FOLDER = 39


class ClusterError(TuneloomError):
    """The local cluster did not do what was asked; the message tells where to look."""


class ClusterState(BaseModel):
    """What is remembered of a cluster from before its first process starts until `down`.

    After `down` the file stays, with `is_up` false: the next cluster takes the same API port if it is free.
    `settings`: a hash of each part of the settings that it runs with, by name; empty until they are deployed.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")
    id: str
    is_up: bool = True
    started_at: float
    host: str
    port: int
    gcs_address: str
    dashboard_port: int
    folder: Path
    session: int = 0
    settings: dict[str, str] = {}

    @property
    def api_url(self) -> str:
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self.host, self.host)
        return f"http://{host}:{self.port}"

    @property
    def dashboard_url(self) -> str:
        return f"http://127.0.0.1:{self.dashboard_port}"

    @property
    def logs(self) -> Path:
        return self.folder / "session_latest" / "logs"


def read_state(home: Path) -> ClusterState | None:
    try:
        return ClusterState.model_validate_json((home / STATE_FILE).read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


@contextlib.contextmanager
def exclusive(home: Path, wait_s: float = 2.0) -> Iterator[None]:
    """The right to start and stop the cluster of `home`; ends with the process that holds it.

    Raises:
        ClusterError: another process has it.
    """
    home.mkdir(parents=True, exist_ok=True)
    refusal = ClusterError(f"Another `tuneloom up` or `down` is at work on {home}. Wait for it to end, then try again.")
    with alone(home / LOCK_FILE, wait_s, refusal):
        yield


def start(settings: Settings, report: Report) -> ClusterState:
    """Start a Ray cluster of our own and return when its dashboard answers. The caller holds `exclusive`.

    Raises:
        ClusterError: Ray did not start; nothing is left running.
    """
    ensure_token(settings.home)
    previous = read_state(settings.home)
    for attempt in (1, 2):
        state = _plan(settings, previous)
        write_state(settings.home, state)
        try:
            return _start_ray(settings, state)
        except BaseException as error:
            stop(settings.home)
            if not isinstance(error, ClusterError) or attempt == 2:
                raise
            report("Ray did not start; trying once more with other ports")
    raise AssertionError("unreachable")


def stop(home: Path) -> int:
    """End every process of the cluster of `home` and return how many there were; data stays.

    They get SIGTERM first, so that a training run can save what it has, and are killed when their time is over.
    """
    state = read_state(home)
    found = processes(home)
    try:
        # The GCS outlives the others on SIGTERM for minutes, and it holds nothing.
        orderly = [process for process in found if "gcs_server" not in _command(process)]
        _signal(orderly, signal.SIGTERM)
        psutil.wait_procs(orderly, timeout=STOP_GRACE_S)
    finally:
        deadline = time.monotonic() + KILL_WAIT_S
        while (left := processes(home)) and time.monotonic() < deadline:
            _signal(left, signal.SIGKILL)
            psutil.wait_procs(left, timeout=0.5)
    if left:
        raise ClusterError(f"These processes do not end: {', '.join(str(process.pid) for process in left)}.")
    if state is not None:
        write_state(home, state.model_copy(update={"is_up": False, "session": 0}))
    return len(found)


def processes(home: Path) -> list[psutil.Process]:
    """The living processes of the cluster of `home`, oldest first; never the calling one."""
    state = read_state(home)
    own_home = os.path.realpath(home)
    marked, others = [], []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied, ProcessLookupError, PermissionError):
            if process.pid == os.getpid() or process.uids().real != os.getuid():
                continue
            if process.status() == psutil.STATUS_ZOMBIE:
                continue
            environment = process.environ()
            if MARKER in environment and os.path.realpath(environment.get("TUNELOOM_HOME", "")) == own_home:
                marked.append((process.create_time(), process.pid, process))
            elif MARKER not in environment and "ray" in _command(process):
                others.append((process.create_time(), process.pid, process))
    # Some of Ray's processes write their title over their environment. They are in a session of the cluster still.
    sessions = {_session(pid) for _, pid, _ in marked} | ({state.session} if state else set())
    sessions -= {0, os.getsid(0)}
    since = state.started_at if state else 0.0
    lost = [entry for entry in others if _session(entry[1]) in sessions and entry[0] > since - 5]
    return [process for _, _, process in sorted(marked + lost, key=lambda entry: entry[:2])]


def is_whole(home: Path) -> bool:
    """Whether the processes without which no cluster works are alive."""
    commands = [_command(process) for process in processes(home)]
    return all(any(part in command for command in commands) for part in ("gcs_server", "raylet/raylet", "dashboard.py"))


def ensure_token(home: Path) -> str:
    """The secret of the cluster's own interfaces; made on first use, readable by its user only."""
    path = home / TOKEN_FILE
    if not path.exists():
        write_private(path, secrets.token_hex(32))
    return path.read_text().strip()


def client_environment(home: Path, state: ClusterState) -> dict[str, str]:
    """What Ray's own tools need to reach the cluster: `ray job submit`, `ray status`, `ray.init()`."""
    return {
        "RAY_ADDRESS": state.gcs_address,
        "RAY_API_SERVER_ADDRESS": state.dashboard_url,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(home / TOKEN_FILE),
    }


def write_state(home: Path, state: ClusterState) -> None:
    write_private(home / STATE_FILE, state.model_dump_json(indent=2) + "\n")


def write_private(path: Path, text: str) -> None:
    """Write a file that only its user can read, all or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}-{secrets.token_hex(6)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def intruders(home: Path, state: ClusterState) -> set[int]:
    """Processes that listen on the API's port beside ours, and so get a share of its requests."""
    own = {process.pid for process in processes(home)}
    return ports.listeners(state.host, state.port) - own


def _plan(settings: Settings, previous: ClusterState | None) -> ClusterState:
    gateway = settings.gateway
    remembered = previous is not None and gateway.port != 0 and previous.host == gateway.host
    wanted = previous.port if previous and remembered and ports.is_free(previous.port, gateway.host) else gateway.port
    gcs_port, dashboard_port = ports.free_ports(2)
    return ClusterState(
        id=secrets.token_hex(8),
        started_at=time.time(),
        host=gateway.host,
        port=ports.claim(settings.home, gateway.host, wanted, _is_used_by),
        gcs_address=f"{_own_address()}:{gcs_port}",
        dashboard_port=dashboard_port,
        folder=_ray_folder(settings.home),
    )


def _is_used_by(home: Path, port: int) -> bool:
    """Whether the installation in `home` runs on `port`, or is about to."""
    if not home.is_dir():
        return False
    try:
        with exclusive(home, wait_s=0):
            state = read_state(home)
            return state is not None and state.is_up and state.port == port and bool(processes(home))
    except ClusterError:
        return True


def _start_ray(settings: Settings, state: ClusterState) -> ClusterState:
    host, _, gcs_port = state.gcs_address.rpartition(":")
    agent_port, client_port, dashboard_metrics_port, autoscaler_metrics_port = ports.free_ports(4)
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--disable-usage-stats"]
    command += ["--node-ip-address", host, "--port", gcs_port, "--temp-dir", str(state.folder)]
    command += ["--dashboard-host", "127.0.0.1", "--dashboard-port", str(state.dashboard_port)]
    command += ["--dashboard-agent-listen-port", str(agent_port), "--ray-client-server-port", str(client_port)]
    command += ["--num-cpus", str(num_cpus(settings)), "--object-store-memory", str(OBJECT_STORE_BYTES)]
    environment = _environment(settings, state) | {
        "DASHBOARD_METRIC_PORT": str(dashboard_metrics_port),
        "AUTOSCALER_METRIC_PORT": str(autoscaler_metrics_port),
    }
    log = settings.home / "run" / "ray-start.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=settings.home,
            start_new_session=True,
        )
        state = state.model_copy(update={"session": process.pid})
        write_state(settings.home, state)
        try:
            code = process.wait(START_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise ClusterError(f"Ray did not start within {START_TIMEOUT_S} s. Its log: {log}") from None
    if code != 0:
        tail = "\n".join(log.read_text(errors="replace").strip().splitlines()[-12:])
        raise ClusterError(f"Ray did not start (exit code {code}). The end of its log, {log}:\n{tail}")
    return state


def num_cpus(settings: Settings) -> int:
    """The CPUs that the cluster claims to have: enough for what is served and trained, whatever the machine has.

    Ray's CPUs are bookkeeping: with fewer than this a job would wait for ever for a place.
    """
    served = sum(base.num_cpus * base.most_replicas for base in settings.bases)
    trained = max(settings.train.num_cpus, 1) * settings.train.places_on(os.cpu_count() or 1)
    gateways = settings.gateway.replicas
    # Drafters that wait for a model of ours must leave its replica a place.
    drafting = settings.drafting.num_cpus * settings.drafting.max_tasks if settings.drafting.providers else 0
    return max(os.cpu_count() or 1, math.ceil(served + trained + gateways + drafting + 2))


def _environment(settings: Settings, state: ClusterState) -> dict[str, str]:
    """The environment of every process of the cluster. Ray settings of the caller's shell mean other clusters."""
    from tuneloom.serve import modes
    from tuneloom.serve.guard import PROXY_ENVIRONMENT
    from tuneloom.train.environment import WORKER_ENVIRONMENT

    home = settings.home
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "TUNELOOM_"))}
    return inherited | {
        **client_environment(home, state),
        **PROXY_ENVIRONMENT,
        **modes.environment(settings.gateway, _short_folder(home), ports.free_ports(modes.NUM_PORTS)),
        "no_grpc_proxy": _no_proxy(inherited, state),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
        # Ray starts its workers at 15, replicas too: any other work of the machine would then come before a request.
        "RAY_worker_niceness": "0",
        # Bases come in by `tuneloom bases`: nothing that runs asks a hub. Replicas of bases wait in a way of their own.
        **WORKER_ENVIRONMENT,
        MARKER: state.id,
        "TUNELOOM_HOME": str(home),
        "PYTHONUNBUFFERED": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
    }


def _no_proxy(inherited: Mapping[str, str], state: ClusterState) -> str:
    """What gRPC reaches without the proxy of the shell, if that names one: replicas call each other by it."""
    known = next((inherited[name] for name in ("no_grpc_proxy", "no_proxy", "NO_PROXY") if inherited.get(name)), None)
    own, _, _ = state.gcs_address.rpartition(":")
    return ",".join(filter(None, (known, own, "127.0.0.1", "localhost")))


def _ray_folder(home: Path) -> Path:
    """A folder for Ray's sessions and sockets. Ray opens it to everybody, so the one above it is ours alone."""
    run = home / "run"
    run.mkdir(parents=True, exist_ok=True)
    run.chmod(0o700)
    is_short = len(str(run / "ray").encode()) <= MAX_RAY_FOLDER
    folder = (run if is_short else _short_folder(home)) / "ray"
    for session in folder.glob("session_*"):
        if session.is_symlink() or not session.is_dir():
            session.unlink(missing_ok=True)
        elif session != max(folder.glob("session_2*"), default=None):
            shutil.rmtree(session, ignore_errors=True)
    return folder


def _short_folder(home: Path) -> Path:
    """A folder of this home with a short path, ours alone: sockets live there."""
    name = f"tuneloom-{os.getuid()}-{sha256(str(home).encode()).hexdigest()[:6]}"
    root = tempfile.gettempdir() if len(tempfile.gettempdir()) <= 12 else "/tmp"
    return _private_folder(Path(root) / name)


def _private_folder(path: Path) -> Path:
    path.mkdir(mode=0o700, exist_ok=True)
    status = path.lstat()
    if path.is_symlink() or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise ClusterError(f"{path} is not a folder of yours alone. Remove it, or set a shorter `TUNELOOM_HOME`.")
    return path


def _own_address() -> str:
    """The address that Ray gives to this machine: not the loopback one, but on macOS."""
    if sys.platform != "darwin":
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            # Connecting a datagram socket sends nothing; it only chooses the address. This one is for documentation.
            probe.connect(("198.51.100.1", 80))
            return probe.getsockname()[0]
    return "127.0.0.1"


def _command(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def _session(pid: int) -> int:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        return os.getsid(pid)
    return 0


def _signal(targets: list[psutil.Process], number: int) -> None:
    for process in targets:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)
