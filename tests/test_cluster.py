"""The local cluster: found by its mark, stopped whole, started beside others. On a real one: tests/e2e/test_up.py."""

import contextlib
import http.server
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
import yaml

from tuneloom import cluster, config, ports, up
from tuneloom.cluster import ClusterError, ClusterState
from tuneloom.config import BaseSettings, DraftingSettings, Settings
from tuneloom.control import audit, keys
from tuneloom.serve.guard import PROXY_ENVIRONMENT
from tuneloom.store import open_store

BASE = "tiny/llama"


@pytest.fixture
def spawn(tmp_path: Path) -> Iterator:
    """Start a process that says it belongs to a home's cluster; whatever is left is killed afterwards."""
    started: list[subprocess.Popen] = []

    def start(home: Path | None, code: str = "import time; time.sleep(60)") -> subprocess.Popen:
        environment = {**os.environ, "TUNELOOM_HOME": str(home)}
        if home is not None:
            environment[cluster.MARKER] = "c1"
        ready = f"print('ready', flush=True); {code}"
        process = subprocess.Popen(
            [sys.executable, "-c", ready], env=environment, stdout=subprocess.PIPE, start_new_session=True
        )
        assert process.stdout is not None
        process.stdout.readline()
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait(10)
        process.stdout.close()


def make_state(home: Path, **changes: object) -> ClusterState:
    fields = {
        "id": "c1",
        "started_at": time.time(),
        "host": "127.0.0.1",
        "port": 8000,
        "gcs_address": "127.0.0.1:1",
        "dashboard_port": 1,
        "folder": home / "run" / "ray",
    }
    state = ClusterState.model_validate({**fields, **changes})
    cluster.write_state(home, state)
    return state


def test_only_processes_with_the_mark_of_this_home_are_its_own(spawn, tmp_path: Path):
    home, other = tmp_path / "home", tmp_path / "other"
    mine, foreign, plain = spawn(home), spawn(other), spawn(None)

    assert [process.pid for process in cluster.processes(home)] == [mine.pid]
    assert cluster.stop(home) == 1
    assert mine.poll() is not None
    assert foreign.poll() is None and plain.poll() is None


def test_a_process_that_has_lost_its_parent_is_still_found(spawn, tmp_path: Path):
    parent = spawn(
        tmp_path,
        "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], "
        "stdout=subprocess.DEVNULL, start_new_session=True); time.sleep(60)",
    )
    deadline = time.monotonic() + 10
    while len(cluster.processes(tmp_path)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    parent.kill()
    parent.wait(5)

    (orphan,) = cluster.processes(tmp_path)
    assert cluster.stop(tmp_path) == 1
    assert not orphan.is_running()


def test_a_process_that_ignores_sigterm_is_killed(spawn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cluster, "STOP_GRACE_S", 0.5)
    stubborn = spawn(
        tmp_path,
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('set', flush=True); time.sleep(60)",
    )
    assert stubborn.stdout.readline() == b"set\n"
    cluster.stop(tmp_path)
    assert stubborn.poll() is not None


def test_a_stopped_cluster_is_remembered_as_stopped_and_keeps_its_port(tmp_path: Path):
    make_state(tmp_path, port=8123)
    cluster.stop(tmp_path)
    state = cluster.read_state(tmp_path)
    assert state is not None
    assert (state.is_up, state.port) == (False, 8123)
    assert not cluster.is_whole(tmp_path)


def test_a_damaged_state_file_counts_as_none(tmp_path: Path):
    (tmp_path / cluster.STATE_FILE).write_text("{half")
    assert cluster.read_state(tmp_path) is None
    assert cluster.processes(tmp_path) == []


def test_two_ups_at_once_are_kept_apart_and_a_dead_one_holds_nothing(tmp_path: Path):
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import pathlib, sys, time; from tuneloom import cluster\n"
            "with cluster.exclusive(pathlib.Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(60)",
            str(tmp_path),
        ],
        stdout=subprocess.PIPE,
    )
    with holder, contextlib.closing(holder.stdout):
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(ClusterError, match="Another `tuneloom up` or `down`"), cluster.exclusive(tmp_path, 0.2):
            pass
        holder.kill()
    with cluster.exclusive(tmp_path, 0.2):
        pass


def test_a_busy_port_gives_way_to_the_next(tmp_path: Path):
    def claim(wanted: int) -> int:
        return ports.claim(tmp_path, "127.0.0.1", wanted, lambda home, port: False)

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", ports.free_ports(1)[0]))
        taken.listen()
        port = taken.getsockname()[1]
        assert claim(port) > port
    assert claim(port) == port
    assert claim(0) > 0


def test_two_installations_that_start_at_once_take_different_ports(spawn, tmp_path: Path):
    first, second = tmp_path / "first", tmp_path / "second"
    wanted = ports.free_ports(1)[0]
    settings = [config.Settings.model_validate({"home": h, "gateway": {"port": wanted}}) for h in (first, second)]
    with cluster.exclusive(first):  # as `up` holds it from the choice of the port to the first answer
        assert cluster._plan(settings[0], None).port == wanted
        assert cluster._plan(settings[1], None).port > wanted

    make_state(first, port=wanted)  # it runs, though nothing listens yet
    process = spawn(first)
    assert cluster._plan(settings[1], None).port > wanted
    process.kill()
    process.wait(5)
    assert cluster._plan(settings[1], None).port == wanted


def test_a_second_listener_on_the_apis_port_is_noticed(tmp_path: Path):
    state = make_state(tmp_path, port=ports.free_ports(1)[0])
    assert cluster.intruders(tmp_path, state) == set()
    with socket.socket() as other:
        other.bind((state.host, state.port))
        other.listen()
        assert cluster.intruders(tmp_path, state) == {os.getpid()}


def test_the_clusters_environment_has_nothing_of_the_callers_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_NAMESPACE", "RAY_JOB_CONFIG_JSON_ENV_VAR", "TUNELOOM_JOB"):
        monkeypatch.setenv(name, "foreign")
    state = make_state(tmp_path, gcs_address="10.0.0.1:20001", dashboard_port=20002)
    environment = cluster._environment(Settings(home=tmp_path), state)

    assert "foreign" not in environment.values()
    assert environment["RAY_ADDRESS"] == "10.0.0.1:20001"
    assert environment["RAY_API_SERVER_ADDRESS"] == "http://127.0.0.1:20002"
    assert environment["RAY_AUTH_MODE"] == "token"
    assert environment.items() >= PROXY_ENVIRONMENT.items()
    assert environment["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)


def test_secrets_and_sockets_are_their_users_alone(tmp_path: Path):
    deep = tmp_path / ("x" * 80)
    deep.mkdir()
    token = cluster.ensure_token(deep)
    assert cluster.ensure_token(deep) == token
    assert stat.S_IMODE((deep / cluster.TOKEN_FILE).stat().st_mode) == 0o600

    folder = cluster._ray_folder(deep)
    try:
        assert len(str(folder)) <= cluster.MAX_RAY_FOLDER
        assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
        folder.parent.chmod(0o777)
        with pytest.raises(ClusterError, match="not a folder of yours alone"):
            cluster._ray_folder(deep)
    finally:
        shutil.rmtree(folder.parent)


def test_the_proxy_of_a_shell_does_not_come_between_replicas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_grpc_proxy", raising=False)
    monkeypatch.setenv("no_proxy", "intranet.example")
    server = grpc.server(ThreadPoolExecutor(1))
    answer = grpc.unary_unary_rpc_method_handler(lambda request, context: b"here")
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("replica", {"call": answer}),))
    port = server.add_insecure_port("0.0.0.0:0")
    server.start()
    try:
        own = cluster._own_address()
        settings = config.Settings(home=tmp_path)
        environment = cluster._environment(settings, make_state(tmp_path, gcs_address=f"{own}:1"))
        assert environment["http_proxy"] and "intranet.example" in environment["no_grpc_proxy"].split(",")
        monkeypatch.setenv("no_grpc_proxy", environment["no_grpc_proxy"])
        for host in (own, "127.0.0.1", "localhost"):
            with grpc.insecure_channel(f"{host}:{port}") as channel:
                assert channel.unary_unary("/replica/call")(b"", timeout=20) == b"here"
    finally:
        server.stop(None).wait()


def test_there_are_cpus_for_all_that_is_configured(tmp_path: Path):
    many = [{"id": f"b{i}", "num_cpus": 2, "replicas": 2} for i in range(4)]
    settings = config.Settings.model_validate({"home": tmp_path, "bases": many, "train": {"max_running": 3}})
    assert cluster.num_cpus(settings) >= 4 * 2 * 2 + 3
    ours = {"kind": "openai", "base_url": "http://127.0.0.1:8000/v1", "models": ["b0"]}
    drafting = DraftingSettings.model_validate({"providers": {"ours": ours}, "max_tasks": 50, "num_cpus": 0.5})
    more = settings.model_copy(update={"drafting": drafting})
    assert cluster.num_cpus(more) >= 4 * 2 * 2 + 3 + 25


def test_a_base_that_nobody_has_added_stops_up_with_advice(tmp_path: Path):
    (tmp_path / "config.yaml").write_text("bases: [{id: my/base}]\n")
    with pytest.raises(up.InvalidRequest, match="tuneloom bases add FOLDER --id my/base"):
        up.up(config.load(tmp_path), print)
    assert cluster.read_state(tmp_path) is None


def test_the_admin_key_is_made_once_and_again_only_when_it_is_of_no_use(tmp_path: Path):
    settings = config.load(tmp_path)
    first, is_new = up.ensure_admin_key(settings)
    assert is_new and up.ensure_admin_key(settings) == (first, False)
    assert stat.S_IMODE((tmp_path / up.KEY_FILE).stat().st_mode) == 0o600

    (tmp_path / "tuneloom.db").unlink()
    for leftover in tmp_path.glob("tuneloom.db-*"):
        leftover.unlink()
    second, is_new = up.ensure_admin_key(settings)
    assert is_new and second != first

    store = open_store(settings)
    (key,) = keys.list_keys(store.records)
    keys.update(store.records, key.id, lambda key: key.model_copy(update={"expires_at": 1.0}), audit.cli_actor())
    store.close()
    third, is_new = up.ensure_admin_key(settings)
    assert is_new and third != second


def test_what_changed_in_the_settings_since_they_were_deployed_is_named(tmp_path: Path):
    def load(**parts: object) -> config.Settings:
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(parts))
        return config.load(tmp_path)

    first = load(bases=[{"id": BASE}])
    older = make_state(tmp_path)
    assert up.unused_parts(first, older) == (), "one that noted nothing is not judged"
    state = up._remember(first, older, is_new=True)
    assert cluster.read_state(tmp_path) == state
    assert up.unused_parts(load(bases=[{"id": BASE, "engine": {}}]), state) == (), "a default that is written out"

    changed = load(bases=[{"id": BASE, "engine": {"max_sequences": 5}}], gateway={"mode": "haproxy"}, audit={})
    assert up.unused_parts(changed, state) == ("bases", "gateway")
    assert up.unused_parts(changed, up._remember(changed, state, is_new=False)) == ("gateway",), "at the start"


@pytest.fixture
def local_server() -> Iterator:
    """A dashboard and an API in one, which answer each path with what is given for it; the paths that were asked."""
    asked: list[str] = []
    answers: dict[str, bytes] = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            body = answers.get(self.path, b"")
            self.send_response(200 if self.path in answers else 503)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_address[1], answers, asked
        server.shutdown()
        thread.join()


def test_bringing_up_neither_waits_for_a_base_that_runs_only_while_used_nor_starts_it(local_server, tmp_path: Path):
    port, answers, asked = local_server
    bases = (BaseSettings(id="always"), BaseSettings(id="rare", min_replicas=0))
    settings = Settings(home=tmp_path, bases=bases)
    state = make_state(tmp_path, port=port, dashboard_port=port)
    answers["/api/serve/applications/"] = json.dumps({"applications": {"gateway": {"status": "RUNNING"}}}).encode()
    answers["/v1/chat/completions"] = answers["/healthz"] = b"{}"
    said: list[str] = []

    up._await_answers(settings, state, "key", said.append, time.monotonic() + 20)
    assert said == ["always answers"]
    assert asked.count("/v1/chat/completions") == 1

    only_rare = settings.model_copy(update={"bases": bases[1:]})
    up._await_answers(only_rare, state, "key", said.append, time.monotonic() + 20)
    del answers["/healthz"]
    with pytest.raises(ClusterError, match="No answer in time"):
        up._await_answers(only_rare, state, "key", said.append, time.monotonic() + 0.5)
    assert asked.count("/v1/chat/completions") == 1
