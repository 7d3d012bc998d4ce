"""Real local clusters, started and ended by the command line as a user would; one of them for most of the folder."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import yaml

from tests.tiny import make_base
from tuneloom import bases, cluster, config, up

BASE = "tiny/llama"
ALIAS = "gpt-4o-mini-2024-07-18"
COMMAND_TIMEOUT_S = 420


@dataclass
class Home:
    """A tuneloom installation in a folder of its own, driven by its command line. `said`: by the first `up`."""

    path: Path
    said: str = ""

    def call(self, *arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
        """A command as from a stranger's shell, which has `extra` in its environment."""
        command = [sys.executable, "-m", "tuneloom.cli", "--home", str(self.path), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, env=environment() | extra
        )

    def run(self, *arguments: str, **extra: str) -> str:
        """What a command says that ends well."""
        done = self.call(*arguments, **extra)
        assert done.returncode == 0, f"{arguments}: {done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    @property
    def state(self) -> cluster.ClusterState:
        state = cluster.read_state(self.path)
        assert state is not None
        return state

    @property
    def url(self) -> str:
        return f"{self.state.api_url}/v1"

    @property
    def admin_key(self) -> str:
        return (self.path / up.KEY_FILE).read_text().strip()

    def client(self, key: str | None = None, **settings: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key=key or self.admin_key, timeout=60, **settings)

    def mint(self, owner: str, scopes: tuple[str, ...] = ("inference", "training")) -> str:
        answer = httpx.post(
            f"{self.url}/tuneloom/keys",
            json={"name": f"{owner}'s", "owner": owner, "scopes": list(scopes)},
            headers={"Authorization": f"Bearer {self.admin_key}"},
            timeout=30,
        )
        assert answer.status_code == 200, answer.text
        return answer.json()["secret"]

    def pids(self, *words: str) -> list[int]:
        """Processes of this cluster whose command line or title has all the words."""
        found = []
        for process in cluster.processes(self.path):
            try:
                text = f"{process.name()} {' '.join(process.cmdline())}"
            except psutil.Error:
                continue
            if all(word in text for word in words):
                found.append(process.pid)
        return found

    def kill(self, *words: str) -> list[int]:
        """SIGKILL those processes; there must be one."""
        pids = self.pids(*words)
        assert pids, f"no process has {words}"
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        return pids


def environment() -> dict[str, str]:
    """A stranger's shell: nothing of Ray's or ours in it."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "TUNELOOM_", "OPENAI_"))}


def exports(home: Home, *options: str) -> dict[str, str]:
    """What `eval "$(tuneloom env)"` puts into a shell."""
    lines = home.run("env", *options)
    script = f"{lines}\n{sys.executable} -c 'import json, os; print(json.dumps(dict(os.environ)))'"
    shell = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True, timeout=30)
    return json.loads(shell.stdout)


def wait_for(what: str, check: Callable[[], Any], timeout_s: float = 120.0, every_s: float = 0.25) -> Any:
    """The first true value of `check`; connection errors count as not yet."""
    deadline = time.monotonic() + timeout_s
    last: object = None
    while time.monotonic() < deadline:
        try:
            if last := check():
                return last
        except (openai.APIConnectionError, openai.InternalServerError, httpx.TransportError) as error:
            last = error
        time.sleep(every_s)
    raise AssertionError(f"{what}: not within {timeout_s:.0f} s; last: {last!r}")


def rows_jsonl(count: int, answer: str = "serious") -> bytes:
    """Training rows that a tiny model can learn something from."""
    words = ("rain", "sun", "fox", "dog", "cafe", "green", "blue", "left", "right", "weather")
    lines = []
    for i in range(count):
        question = f"{words[i % 10]} {words[(i // 10) % 10]} {i}"
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": f"{answer} {words[i % 10]}"},
        ]
        lines.append(json.dumps({"messages": messages}))
    return ("\n".join(lines) + "\n").encode()


def make_home(path: Path, **settings: Any) -> Home:
    home = Home(path)
    path.mkdir(parents=True, exist_ok=True)
    source = make_base(path / "source", max_length=8192)
    bases.add_folder(path / "bases", source, BASE)
    written = {
        "bases": [{"id": BASE, "engine": {"dtype": "fp32", "max_sequences": 16, "adapter_slots": 4, "threads": 1}}],
        "base_aliases": {ALIAS: BASE, config.DEFAULT_BASE: BASE},
        "gateway": {"port": 0},
        # Other tests run beside these.
        "train": {"threads": 1, "niceness": 0, "checkpoint_interval_s": 600},
        "webhooks": {"allow_private": True},
        **settings,
    }
    (path / "config.yaml").write_text(yaml.safe_dump(written))
    return home


@contextlib.contextmanager
def running(**settings: Any) -> Iterator[Home]:
    """A new installation, with everything up."""
    # A short path: Ray's sockets live below it.
    folder = Path(tempfile.mkdtemp(prefix="tl-"))
    home = make_home(folder / "h", **settings)
    try:
        # A foreign cluster in the shell means nothing.
        home.said = home.run("up", RAY_ADDRESS="10.255.255.1:6379")
        yield home
    finally:
        home.call("down")
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="package")
def home() -> Iterator[Home]:
    with running() as home:
        yield home


@pytest.fixture
def client(home: Home) -> openai.OpenAI:
    return home.client()


def start_job(client: openai.OpenAI, rows: bytes, *, suffix: str, epochs: int = 1, **options: Any) -> Any:
    file = client.files.create(file=("rows.jsonl", rows), purpose="fine-tune")
    return client.fine_tuning.jobs.create(
        model=BASE,
        training_file=file.id,
        suffix=suffix,
        seed=7,
        hyperparameters={"n_epochs": epochs, "batch_size": 4},
        extra_body={"tuneloom": {"rank": 4, "learning_rate": 5e-3, **options}},
    )


def wait_for_job(client: openai.OpenAI, job_id: str, *states: str, timeout_s: float = 240.0) -> Any:
    """The job, once it is in one of the states; at once an error if it ends in another."""

    def check() -> Any:
        job = client.fine_tuning.jobs.retrieve(job_id)
        if job.status in states:
            return job
        if job.status in {"succeeded", "failed", "cancelled"}:
            raise AssertionError(f"{job_id} is {job.status}, not {states}: {job.error}")
        return None

    return wait_for(f"{job_id} to be {' or '.join(states)}", check, timeout_s)


def all_events(client: openai.OpenAI, job_id: str) -> list[Any]:
    """A job's events, oldest first."""
    return list(client.fine_tuning.jobs.list_events(job_id, limit=100))[::-1]


def steps_of(events: list[Any]) -> list[int]:
    return [event.data["step"] for event in events if event.type == "metrics"]
