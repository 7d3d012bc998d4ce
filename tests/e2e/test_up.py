"""`tuneloom up` on a real cluster: what it says, what a second one says, and what a stranger's shell then has."""

import json
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import yaml

from tests.e2e.conftest import BASE, Home, exports
from tuneloom import cluster, up

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_up_ends_with_an_answer_a_key_and_the_way_to_use_them(home: Home) -> None:
    assert f"{home.state.api_url}/v1" in home.said and home.state.dashboard_url in home.said
    key = (home.path / up.KEY_FILE).read_text().strip()
    assert home.said.count(key) == 1
    shell = exports(home)
    assert (shell["OPENAI_API_KEY"], shell["OPENAI_BASE_URL"]) == (key, home.url)
    hello = [{"role": "user", "content": "Hello"}]
    assert home.client().chat.completions.create(model=BASE, messages=hello, max_tokens=2).choices

    report = json.loads(home.run("status", "--json"))
    assert report["running"] and report["problem"] is None
    assert {"gateway", "control", "base-tiny-llama"} <= report["applications"].keys()
    assert [base["id"] for base in report["bases"]] == [BASE]
    assert "running at" in home.run("status")


def test_a_second_up_says_that_it_is_running_touches_nothing_and_names_the_settings_that_it_does_not_apply(
    home: Home,
) -> None:
    def lasting() -> list[set[int]]:
        # Ray ends idle workers by itself.
        return [set(home.pids(word)) for word in ("gcs_server", "raylet/raylet", "dashboard.py", "ServeReplica:")]

    before = lasting()
    output = home.run("up")
    assert "running already" in output
    assert "admin key" not in output
    assert all(before) and lasting() == before
    assert "settings have changed" not in output + home.run("status")

    path = home.path / "config.yaml"
    settings = path.read_text()
    try:
        path.write_text(yaml.safe_dump({**yaml.safe_load(settings), "usage": {"retention_days": 300}}))
        for command in ("up", "status"):
            assert "settings have changed (`usage`)" in home.run(command)
        assert json.loads(home.run("status", "--json"))["unused_settings"] == ["usage"]
    finally:
        path.write_text(settings)


def test_the_dashboard_needs_the_token_and_listens_on_loopback(home: Home) -> None:
    url = f"{home.state.dashboard_url}/api/jobs/"
    assert httpx.get(url, timeout=30, trust_env=False).status_code == 401
    token = Path(exports(home, "--ray")["RAY_AUTH_TOKEN_PATH"]).read_text().strip()
    answer = httpx.get(url, headers={"Authorization": f"Bearer {token}"}, timeout=30, trust_env=False)
    assert answer.status_code == 200

    port = home.state.dashboard_port
    listening = [c for p in cluster.processes(home.path) for c in p.net_connections("tcp") if c.status == "LISTEN"]
    assert {c.laddr.ip for c in listening if c.laddr.port == port} == {"127.0.0.1"}
    assert {c.laddr.ip for c in listening if c.laddr.port == home.state.port} == {"127.0.0.1"}


def test_the_example_scripts_run_as_they_are(home: Home) -> None:
    environment = exports(home)

    def run(*command: str) -> str:
        done = subprocess.run(
            [sys.executable, *command], env=environment, cwd=EXAMPLES, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        return done.stdout

    assert "succeeded ft:tiny/llama:local:parity:" in run("finetune.py")
    assert " tokens in, " in run("stream.py", "parity@v1", "Is 42 even?")
