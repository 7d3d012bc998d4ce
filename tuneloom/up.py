"""From nothing to an answered request: bases, cluster, applications, first key. What `tuneloom up` does.

Each step is safe to repeat, so that a second `up` after an interrupted one takes over where it is.
"""

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import httpx

from tuneloom import bases, cluster
from tuneloom.cluster import ClusterError, ClusterState, Report
from tuneloom.config import DEFAULT_BASE, Settings, check_production, read_pepper
from tuneloom.domain import ALL_SCOPES, LOCAL_OWNER
from tuneloom.errors import InvalidRequest

KEY_FILE = "admin-key"
READY_TIMEOUT_S = 600.0
DEPLOY_TIMEOUT_S = 300.0
PROBE_TIMEOUT_S = 60.0
POLL_S = 0.25
REPEAT_LINE_S = 10.0
# Parts of the settings that a cluster takes at its start, some of it or all.
FIXED_PARTS = ("gateway", "train")


@dataclass(frozen=True)
class Outcome:
    """`new_key`: the admin key if this call has made it. `unused`: see `unused_parts`."""

    state: ClusterState
    was_running: bool
    new_key: str | None
    unused: tuple[str, ...]


def up(settings: Settings, report: Report, timeout_s: float = READY_TIMEOUT_S) -> Outcome:
    """Bring everything up and return when every base has answered a request.

    Raises:
        ClusterError: it did not come up; a cluster that was started for it is ended. The message says where to look.
        InvalidRequest: the environment points at emulators, and this is production.
    """
    check_production(settings, os.environ)
    home = settings.home
    with cluster.exclusive(home):
        running = cluster.read_state(home)
        if running and running.is_up and cluster.is_whole(home) and _answers(settings, running):
            return Outcome(running, True, None, unused_parts(settings, running))
        prepare_bases(settings, report)
        state, is_new = _own_cluster(settings, report)
        try:
            key, is_new_key = ensure_admin_key(settings)
            _deploy(settings, state, report)
            state = _remember(settings, state, is_new=is_new)
            _await_answers(settings, state, key, report, time.monotonic() + timeout_s)
            _check_alone(settings, state)
        except BaseException:
            # One that ran before may be training; ending it is for `down`.
            if is_new:
                report("stopping what was started")
                cluster.stop(home)
            raise
    return Outcome(state, False, key if is_new_key else None, unused_parts(settings, state))


def unused_parts(settings: Settings, state: ClusterState) -> tuple[str, ...]:
    """Names in `config.yaml` of what has changed since the cluster took its settings, so that it does not use it."""
    if not state.settings:
        return ()
    wanted = _hashes(settings)
    return tuple(name for name in sorted(wanted) if wanted[name] != state.settings.get(name))


def prepare_bases(settings: Settings, report: Report) -> None:
    """See that every base of the settings is in the catalogue; the default one is fetched."""
    present = bases.catalogue(settings.bases_dir)
    for base in settings.bases:
        if base.id in present:
            continue
        if base.id != DEFAULT_BASE:
            raise InvalidRequest(
                f"`config.yaml` names the base `{base.id}`, which is not in the catalogue. "
                f"Add it: `tuneloom bases add FOLDER --id {base.id}`."
            )
        bases.fetch_default(settings.bases_dir, report)


def ensure_admin_key(settings: Settings) -> tuple[str, bool]:
    """The admin key in the home folder, and whether it was made just now."""
    from tuneloom.control import keys
    from tuneloom.store import open_store
    from tuneloom.store.keys import find_secret

    path = settings.home / KEY_FILE
    pepper = read_pepper(settings)
    store = open_store(settings)
    try:
        if path.exists():
            secret = path.read_text().strip()
            found = find_secret(store.records, pepper.hashes(secret))
            if found and found.works(time.time()) and "admin" in found.key.scopes:
                return secret, False
        minted = keys.mint(store.records, pepper, owner=LOCAL_OWNER, name="admin", scopes=ALL_SCOPES)
        cluster.write_private(path, minted.secret + "\n")
        return minted.secret, True
    finally:
        store.close()


def read_admin_key(settings: Settings) -> str:
    try:
        return (settings.home / KEY_FILE).read_text().strip()
    except FileNotFoundError as error:
        raise InvalidRequest(f"There is no admin key in {settings.home}. `tuneloom up` makes one.") from error


def serve_details(settings: Settings, state: ClusterState) -> dict[str, Any]:
    """What Serve says of its applications.

    Raises:
        httpx.HTTPError: the dashboard does not answer.
    """
    with _dashboard(settings, state) as client:
        return client.get("/api/serve/applications/").raise_for_status().json()


def _own_cluster(settings: Settings, report: Report) -> tuple[ClusterState, bool]:
    """The cluster of this home, and whether it is new: the one that runs if it is whole, else another."""
    state = cluster.read_state(settings.home)
    if state and state.is_up and cluster.is_whole(settings.home):
        report("the cluster of this home runs; bringing its applications up")
        return state, False
    if cluster.processes(settings.home):
        report("ending what is left of an earlier cluster")
        cluster.stop(settings.home)
    report("starting a Ray cluster")
    return cluster.start(settings, report), True


def _deploy(settings: Settings, state: ClusterState, report: Report) -> None:
    """Hand the applications to Serve. Those that run already as described are not touched."""
    from tuneloom.serve.app import schema

    report("deploying the applications")
    gateway = settings.gateway.model_copy(update={"port": state.port})
    config = schema(settings.model_copy(update={"gateway": gateway}))
    deadline = time.monotonic() + DEPLOY_TIMEOUT_S
    while True:
        try:
            with _dashboard(settings, state, DEPLOY_TIMEOUT_S) as client:
                answer = client.put("/api/serve/applications/", json=config)
        except httpx.TransportError as error:
            if time.monotonic() > deadline:
                raise ClusterError(f"Ray's dashboard does not answer ({error}). Logs: {state.logs}") from error
            time.sleep(POLL_S)
            continue
        if answer.status_code == 200:
            return
        raise ClusterError(f"Serve refused the applications: {answer.text[-2000:]}")


def _remember(settings: Settings, state: ClusterState, *, is_new: bool) -> ClusterState:
    """Note what settings are deployed; those that a running cluster has taken at its start stay noted as they were."""
    noted = _hashes(settings)
    if not is_new:
        noted |= {name: state.settings[name] for name in FIXED_PARTS if name in state.settings}
    state = state.model_copy(update={"settings": noted})
    cluster.write_state(settings.home, state)
    return state


def _hashes(settings: Settings) -> dict[str, str]:
    parts = settings.model_dump(mode="json", exclude={"home"})
    return {name: sha256(json.dumps(part, sort_keys=True).encode()).hexdigest()[:16] for name, part in parts.items()}


def _await_answers(settings: Settings, state: ClusterState, key: str, report: Report, deadline: float) -> None:
    """Return when each base has answered a chat request; tell what is waited for."""
    say = _once_in(REPEAT_LINE_S, report)
    # A base that may have no replica starts when somebody asks it.
    waiting = [base.id for base in settings.bases if base.fewest_replicas]
    while True:
        if time.monotonic() > deadline:
            raise ClusterError(f"No answer in time from: {', '.join(waiting)}. Logs: {state.logs}")
        problem = _check_applications(settings, state, say)
        if problem is None and not waiting and _lives(state):
            return
        if problem is None and waiting:
            problem = _probe(state, key, waiting[0], timeout_s=PROBE_TIMEOUT_S)
            if problem is None:
                report(f"{waiting.pop(0)} answers")
                continue
            say(f"waiting for {waiting[0]}: {problem}")
        time.sleep(POLL_S)


def _check_applications(settings: Settings, state: ClusterState, say: Report) -> str | None:
    """None when every application runs, else what is missing.

    Raises:
        ClusterError: Serve has given one up, or the cluster has died.
    """
    try:
        applications = serve_details(settings, state)["applications"]
    except httpx.HTTPError:
        if not cluster.is_whole(settings.home):
            raise ClusterError(f"The Ray cluster has died. Logs: {state.logs}") from None
        say("waiting for Ray's dashboard")
        return "the dashboard"
    failed = {name: app for name, app in applications.items() if app["status"] == "DEPLOY_FAILED"}
    for name, app in failed.items():
        raise ClusterError(f"The application `{name}` did not start. Logs: {state.logs}\n{_complaints(app)}")
    missing = [name for name, app in sorted(applications.items()) if app["status"] != "RUNNING"]
    for app in applications.values():
        if complaints := _complaints(app):
            say(complaints)
    if missing or not applications:
        say(f"waiting for {', '.join(missing) or 'the applications'}")
        return "the applications"
    return None


def _check_alone(settings: Settings, state: ClusterState) -> None:
    """Raises ClusterError if another program has come to listen on the API's port too; both would get half."""
    if others := cluster.intruders(settings.home, state):
        listed = ", ".join(str(pid) for pid in sorted(others))
        raise ClusterError(
            f"Process {listed} of another program has taken port {state.port} at the same moment. "
            "Run `tuneloom up` again."
        )


def describe(app: dict[str, Any]) -> str:
    """An application's state in few words: `deploying, 0 of 1 replicas ready`."""
    deployments = app.get("deployments", {}).values()
    wanted = sum(deployment.get("target_num_replicas") or 0 for deployment in deployments)
    ready = sum(replica["state"] == "RUNNING" for deployment in deployments for replica in deployment["replicas"])
    return f"{app['status'].lower()}, {ready} of {wanted} replicas ready"


def _complaints(app: dict[str, Any]) -> str:
    """What Serve says of an application and its deployments that are in trouble; the end of it has the cause."""
    troubled = {"UNHEALTHY", "DEPLOY_FAILED"}
    messages = [app["message"]] if app["status"] in troubled else []
    for deployment in app.get("deployments", {}).values():
        text = deployment["message"]
        if deployment["status"] in troubled or "Traceback" in text or "failed" in text:
            messages.append(text)
    return "\n".join(dict.fromkeys(message.strip()[-1500:] for message in messages if message))


def _answers(settings: Settings, state: ClusterState) -> bool:
    """Whether every base answers now."""
    try:
        key = read_admin_key(settings)
    except InvalidRequest:
        return False
    steady = [base.id for base in settings.bases if base.fewest_replicas]
    return _lives(state) and all(_probe(state, key, base, timeout_s=PROBE_TIMEOUT_S) is None for base in steady)


def _lives(state: ClusterState) -> bool:
    """Whether the API answers at all, which starts no base."""
    try:
        return httpx.get(f"{state.api_url}/healthz", timeout=PROBE_TIMEOUT_S, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def _probe(state: ClusterState, key: str, base_id: str, *, timeout_s: float) -> str | None:
    """Ask a base for one token, as a user would; None if it answers, else why not."""
    request = {"model": base_id, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
    try:
        answer = httpx.post(
            f"{state.api_url}/v1/chat/completions",
            json=request,
            headers={"Authorization": f"Bearer {key}"},
            timeout=httpx.Timeout(timeout_s, connect=5.0),
            trust_env=False,
        )
    except httpx.TransportError as error:
        return f"no answer yet ({type(error).__name__})"
    return None if answer.status_code == 200 else f"HTTP {answer.status_code} {answer.text[:200].strip()}"


def _dashboard(settings: Settings, state: ClusterState, timeout_s: float = 15.0) -> httpx.Client:
    token = cluster.ensure_token(settings.home)
    headers = {"Authorization": f"Bearer {token}"}
    return httpx.Client(base_url=state.dashboard_url, headers=headers, timeout=timeout_s, trust_env=False)


def _once_in(interval_s: float, report: Report) -> Callable[[str], None]:
    """`report` without repetition: the same line again only after `interval_s`."""
    said: dict[str, float] = {}

    def say(line: str) -> None:
        if time.monotonic() - said.get(line, -interval_s) >= interval_s:
            said[line] = time.monotonic()
            report(line)

    return say
