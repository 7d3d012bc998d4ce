"""Each part as a process of the test run, on a free port of loopback, ended with the block that started it."""

import contextlib
import ctypes
import os
import random
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.parts import install
from tuneloom import ports

HOST = "127.0.0.1"
# Of a busy machine: Firebase's emulator takes 14 s of one that has nothing else to do.
START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 5.0
AUTH_PROJECT = "demo-tuneloom"
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Server:
    """A part that runs. `address` is host and port."""

    address: str
    process: subprocess.Popen[bytes]

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def pause(self) -> None:
        """Let it hang: it takes connections and answers nothing."""
        os.killpg(self.process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.killpg(self.process.pid, signal.SIGCONT)


@contextlib.contextmanager
def firestore(rules: Path | None = None, port: int | None = None) -> Iterator[Server]:
    port = port or free_port()
    command = [
        *(install.java(), "-Xmx512m", "-Duser.language=en", "-cp", str(install.firestore_jar())),
        *("com.google.cloud.datastore.emulator.firestore.CloudFirestore", "start"),
        *(f"--host={HOST}", f"--port={port}"),
        *([f"--rules={rules}"] if rules else []),
    ]
    with running(command, port) as server:
        _warm_up(server)
        yield server


def _warm_up(server: Server) -> None:
    """On a busy machine the first commit takes longer than any caller waits: a Java program has to get going."""
    path = "projects/demo-warm-up/databases/(default)/documents"
    write = {"update": {"name": f"{path}/warm/up", "fields": {}}}
    headers = {"Authorization": "Bearer owner"}
    for method, body in (
        ("commit", {"writes": [write]}),
        ("runQuery", {"structuredQuery": {"from": [{"collectionId": "warm"}]}}),
    ):
        url = f"http://{server.address}/v1/{path}:{method}"
        httpx.post(url, json=body, headers=headers, timeout=START_TIMEOUT_S, trust_env=False).raise_for_status()


@contextlib.contextmanager
def gcs(port: int | None = None, folder: Path | None = None) -> Iterator[Server]:
    """Objects live in memory, or in `folder` if a test ends the server and starts it again."""
    port = port or free_port()
    url = f"http://{HOST}:{port}"
    kept = ["-backend", "memory"] if folder is None else ["-backend", "filesystem", "-filesystem-root", str(folder)]
    command = [
        *(str(install.gcs_server()), "-scheme", "http", "-host", HOST, "-port", str(port)),
        *(*kept, "-log-level", "warn", "-external-url", url, "-public-host", f"{HOST}:{port}"),
    ]
    with running(command, port) as server:
        yield server


@contextlib.contextmanager
def redis(port: int | None = None) -> Iterator[Server]:
    port = port or free_port()
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(install.redis_server(), "--bind", HOST, "--port", str(port), "--dir", folder),
            *("--save", "", "--appendonly", "no", "--maxmemory", "64mb", "--maxmemory-policy", "noeviction"),
        ]
        with running(command, port) as server:
            yield server


@contextlib.contextmanager
def firebase_auth(project: str = AUTH_PROJECT) -> Iterator[Server]:
    port = free_port()
    folder = install.auth_emulator()
    with running([install.node(), str(folder / "auth.cjs"), project, HOST, str(port)], port, cwd=folder) as server:
        yield server


@contextlib.contextmanager
def running(command: list[str], port: int, *, cwd: Path | None = None) -> Iterator[Server]:
    """A process that listens on `port`. It dies with this one, however this one dies."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
        try:
            _await_port(process, port, log.fileno())
            yield Server(f"{HOST}:{port}", process)
        finally:
            _stop(process)


def free_port() -> int:
    """One that no outgoing connection takes before it is bound, and no test that has set the same seed."""
    return next(port for port in random.SystemRandom().sample(ports.RANGE, 500) if ports.is_free(port, HOST))


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _await_port(process: subprocess.Popen[bytes], port: int, log: int) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        with contextlib.suppress(OSError), socket.create_connection((HOST, port), timeout=1):
            return
        if process.poll() is not None or time.monotonic() > deadline:
            said = os.pread(log, 2000, 0).decode(errors="replace")
            raise RuntimeError(f"{process.args} does not listen on port {port}: {said}")
        time.sleep(0.05)


def _stop(process: subprocess.Popen[bytes]) -> None:
    for sent, wait_s in ((signal.SIGCONT, 0.0), (signal.SIGTERM, STOP_TIMEOUT_S), (signal.SIGKILL, STOP_TIMEOUT_S)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sent)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(wait_s)
            return
