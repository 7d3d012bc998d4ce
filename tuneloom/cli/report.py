"""The facts of `tuneloom status`, as plain data. It asks; it changes nothing."""

import os
import shutil
import time
from pathlib import Path
from typing import Any

import httpx

from tuneloom import bases, cluster, up
from tuneloom.cluster import ClusterState
from tuneloom.config import Settings
from tuneloom.domain import TERMINAL, Job, Progress

READY_TIMEOUT_S = 10.0
DISK_PARTS = {
    "database": ("tuneloom.db*",),
    "files and adapters": ("blobs",),
    "bases": ("bases",),
    "caches": ("cache", "demo"),
    "logs": ("run",),
}


def collect(settings: Settings) -> dict[str, Any]:
    """Everything that `status` shows. `problem` says why it does not run although it should."""
    state = cluster.read_state(settings.home)
    processes = cluster.processes(settings.home) if state else []
    report: dict[str, Any] = {
        "running": False,
        "problem": None,
        "home": str(settings.home),
        "api_url": None,
        "dashboard_url": None,
        "started_at": None,
        "processes": len(processes),
        "memory_mb": sum(_memory(process) for process in processes) // 10**6,
        "applications": {},
        "unused_settings": [],
    }
    if state is not None and (processes or state.is_up):
        report |= {"api_url": state.api_url, "dashboard_url": state.dashboard_url, "started_at": state.started_at}
        report |= {"unused_settings": list(up.unused_parts(settings, state))}
        report |= _live(settings, state)
    report["bases"] = _bases(settings, report["applications"])
    report["jobs"] = _jobs(settings)
    report["disk_mb"] = _disk(settings.home)
    return report


def _live(settings: Settings, state: ClusterState) -> dict[str, Any]:
    """Whether it runs, and its applications, by asking Ray."""
    if not cluster.is_whole(settings.home):
        return {"problem": "its processes have ended. `tuneloom up` starts it again"}
    try:
        applications = up.serve_details(settings, state)["applications"]
    except httpx.HTTPError as error:
        return {"problem": f"Ray's dashboard does not answer ({type(error).__name__}). Logs: {state.logs}"}
    shown = {name: up.describe(app) for name, app in sorted(applications.items())}
    try:
        ready = httpx.get(f"{state.api_url}/readyz", timeout=READY_TIMEOUT_S, trust_env=False)
        answer = ready.json()
        failing = answer.get("failing", [])
    except (httpx.HTTPError, ValueError) as error:
        return {"applications": shown, "problem": f"the API does not answer ({type(error).__name__})"}
    problem = f"no answer from: {', '.join(failing)}" if failing else answer.get("warning")
    if others := cluster.intruders(settings.home, state):
        problem = f"process {min(others)} listens on port {state.port} too and gets a share of the requests; end it"
    return {"applications": shown, "running": True, "problem": problem}


def _bases(settings: Settings, applications: dict[str, str]) -> list[dict[str, Any]]:
    present = bases.catalogue(settings.bases_dir)
    ids = [base.id for base in settings.bases]
    return [
        {
            "id": id,
            "size_mb": present[id].size_bytes // 10**6 if id in present else 0,
            "context_length": present[id].context_length if id in present else None,
            "state": _base_state(id, present, ids, applications),
        }
        for id in dict.fromkeys([*ids, *present])
    ]


def _base_state(id: str, present: dict[str, Any], served: list[str], applications: dict[str, str]) -> str:
    if id not in present:
        return "not in the catalogue"
    if id not in served:
        return "not in config.yaml"
    return applications.get(f"base-{bases.slug(id)}", "not running")


def _jobs(settings: Settings) -> list[dict[str, Any]]:
    """Jobs that have not ended, newest first; from the store, so that it also works while nothing runs."""
    from tuneloom.store import open_store

    if settings.documents.startswith("sqlite:") and not Path(settings.documents.removeprefix("sqlite:")).exists():
        return []
    store = open_store(settings)
    try:
        found = [
            stored.value for stored in store.records.jobs.query(order_by="created_at", descending=True, limit=1000)
        ]
        unfinished = [job for job in found if job.state not in TERMINAL]
        progress = {job.id: store.records.progress.find(job.id) for job in unfinished}
        return [_job(job, found.value if (found := progress[job.id]) else None) for job in unfinished]
    finally:
        store.close()


def _job(job: Job, progress: Progress | None) -> dict[str, Any]:
    steps = ""
    if progress and progress.total_steps:
        steps = f"step {progress.step} of {progress.total_steps}"
        if progress.estimated_finish:
            steps += f", about {max(0, progress.estimated_finish - time.time()):.0f} s left"
    elif progress:
        steps = progress.stage
    return {"id": job.id, "owner": job.owner, "base": job.spec.base, "state": job.state, "progress": steps}


Table = tuple[list[str], list[list[str]]]


def replica_rows(base: dict[str, Any]) -> Table:
    """What each replica of a base does, from `GET /v1/tuneloom/bases`."""
    header = ["replica", "serves", "on", "running", "waiting", "step", "tokens/s", "KV cache", "prefix hits"]
    return header, [_replica_row(replica) for replica in base["replicas"]]


def tier_rows(base: dict[str, Any]) -> Table:
    """Where the adapters of each replica are."""
    header = ["replica", "adapters in", "count", "used", "of", "hits", "misses", "hit rate", "evicted", "failed"]
    rows = [
        [
            replica["id"],
            name,
            str(tier["count"]),
            _megabytes(tier["size_bytes"]),
            _megabytes(tier["limit_bytes"]),
            str(tier["hits"]),
            str(tier["misses"]),
            _percent(tier["hit_rate"]),
            str(tier["evictions"]),
            str(tier["failures"]),
        ]
        for replica in base["replicas"]
        for name, tier in replica.get("tiers", {}).items()
    ]
    return header, rows


def adapter_rows(base: dict[str, Any]) -> Table:
    """The adapters that were used last, from `GET /v1/tuneloom/bases/{base}/adapters`."""
    header = ["replica", "adapter", "model", "tier", "size", "in use", "pinned", "unused for"]
    rows = [
        [
            each["replica"],
            each["sha256"][:12],
            ", ".join(f"{model['owner']}/{model['name']}" for model in each["models"]) or "-",
            each["tier"],
            _megabytes(each["bytes"]),
            str(each["in_use"]),
            "yes" if each["pinned"] else "no",
            f"{max(0, time.time() - each['last_used_at']):.0f} s",
        ]
        for each in base["adapters"]
    ]
    return header, rows


def pin_rows(base: dict[str, Any]) -> Table:
    rows = [[f"{pin['owner']}/{pin['model']}", pin["sha256"]] for pin in base["pins"]]
    return ["pinned on all replicas", "sha256"], rows


def _replica_row(replica: dict[str, Any]) -> list[str]:
    if replica["status"] != "ok":
        return [replica["id"], replica["error"]["message"], *[""] * 7]
    details = replica["details"]
    prefix = details.get("prefix_cache", {"hit_tokens": 0, "query_tokens": 0})
    return [
        replica["id"],
        ": ".join(filter(None, (details.get("mode", "-"), details.get("reason")))),
        f"{details.get('device', '?')} {details.get('dtype', '?')}",
        str(replica["running"]),
        f"{replica['waiting']} ({replica['waiting_tokens']:,} tokens)",
        f"{replica['step_ms']:.1f} ms",
        f"{replica['tokens_per_s']:.0f}",
        f"{replica['kv_tokens_used']:,} of {replica['kv_tokens_total']:,} tokens",
        _percent(prefix["hit_tokens"] / prefix["query_tokens"] if prefix["query_tokens"] else None),
    ]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"


def _megabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:,.1f} MB"


def _disk(home: Path) -> dict[str, int]:
    used = {
        name: sum(_size(path) for pattern in patterns for path in home.glob(pattern)) // 10**6
        for name, patterns in DISK_PARTS.items()
    }
    return used | {"free": shutil.disk_usage(home if home.exists() else home.parent).free // 10**6}


def _size(path: Path) -> int:
    if not path.is_dir():
        return _file_size(path)
    return sum(_file_size(Path(folder) / name) for folder, _, names in os.walk(path) for name in names)


def _file_size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except FileNotFoundError:
        return 0


def _memory(process: Any) -> int:
    import psutil

    try:
        return process.memory_info().rss
    except psutil.Error:
        return 0
