"""The command line as a stranger meets it: what it prints, what it refuses, which exit codes it gives."""

import json
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.test_bases import write_gguf
from tuneloom import cli, cluster, config
from tuneloom.domain import LOCAL_OWNER
from tuneloom.store import open_store
from tuneloom.store.keys import find_secret

BASE = "tiny/llama"


class Shell:
    """Runs commands in this process, as the script does, and keeps what they printed."""

    def __init__(self, home: Path, capture: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch) -> None:
        self.home, self._capture, self._patch = home, capture, patch
        self.out = self.err = ""

    def __call__(self, *arguments: str) -> int:
        self._patch.setattr(sys, "argv", ["tuneloom", "--home", str(self.home), *arguments])
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        self.out, self.err = self._capture.readouterr()
        return code


@pytest.fixture
def shell(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shell:
    return Shell(tmp_path / "home", capsys, monkeypatch)


@pytest.fixture
def tiny_home(shell: Shell, tiny_base: Path) -> Path:
    """A home that serves the tiny base and nothing else."""
    assert shell("bases", "add", str(tiny_base), "--id", BASE) == 0
    (shell.home / "config.yaml").write_text("bases: [{id: tiny/llama}]\nbase_aliases: {old-name: tiny/llama}\n")
    return shell.home


def test_help_comes_at_once():
    started = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-m", "tuneloom.cli", "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert all(word in done.stdout for word in ("up", "down", "status", "env", "keys", "models", "jobs", "bases"))
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert ended.ru_utime - started.ru_utime < 3


@pytest.mark.parametrize("arguments", [["nonsense"], ["keys", "create", "--what"], ["jobs", "show"]])
def test_a_mistyped_command_is_exit_code_2(arguments: list[str], shell: Shell):
    assert shell(*arguments) == 2
    assert "Usage:" in shell.err


def test_a_wrong_config_names_the_file_and_the_field(shell: Shell):
    shell.home.mkdir()
    (shell.home / "config.yaml").write_text("gateway: {port: many}\n")
    assert shell("status") == 1
    assert "config.yaml" in shell.err and "gateway.port" in shell.err and "Traceback" not in shell.err
    assert shell("down") == 0  # what runs can be stopped all the same


def test_nothing_runs_in_a_new_home(shell: Shell):
    assert shell("down") == 0 and "nothing was running" in shell.out
    assert shell("status") == 3 and "not running" in shell.out
    assert shell("status", "--bases") == 3 and "not running" in shell.err
    assert shell("env") == 3 and shell.out == "" and "tuneloom up" in shell.err
    assert shell("jobs", "list") == 1 and "Start it: `tuneloom up`" in shell.err
    assert shell("models", "list") == 0 and (shell.out, shell.err) == ("", "no models of local\n")


def test_a_store_that_is_not_there_is_neither_made_nor_called_whole(shell: Shell):
    assert shell("store", "check") == 1 and "There is nothing at" in shell.err
    assert not shell.home.exists()


def test_output_that_cannot_be_written_is_one_line_and_exit_code_1(shell: Shell):
    command = [sys.executable, "-m", "tuneloom.cli", "--home", str(shell.home), "status"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.splitlines()[0] == "error: [Errno 28] No space left on device"
    assert "Traceback" not in done.stderr


def test_the_version_is_told(shell: Shell):
    assert shell("--version") == 0 and shell.out == f"tuneloom {version('tuneloom')}\n"


def test_a_setting_that_does_not_exist_is_named(shell: Shell):
    shell.home.mkdir()
    (shell.home / "config.yaml").write_text("train: {launcher: ray-jobs}\n")
    assert shell("status") == 1
    assert shell.err == f"error: {shell.home / 'config.yaml'}: `train.launcher`: there is no such setting.\n"


def test_status_for_programs_has_the_same_fields_up_or_down(shell: Shell, tiny_home: Path):
    assert shell("status", "--json") == 3
    report = json.loads(shell.out)
    assert report["running"] is False
    assert report["applications"] == {} and report["jobs"] == []
    assert report["bases"][0] == {"id": BASE, "size_mb": 0, "context_length": 512, "state": "not running"}
    assert {"bases", "database", "free"} <= report["disk_mb"].keys()


def test_keys_are_made_listed_and_revoked(shell: Shell):
    assert shell("keys", "create", "--name", "phone", "--scope", "inference", "--expires-in", "30d") == 0
    secret = shell.out.strip()
    assert secret.startswith("sk-") and "inference" in shell.err and secret not in shell.err

    settings = config.load(shell.home)
    store = open_store(settings)
    (stored,) = store.records.keys.query({"hash": config.read_pepper(settings).hash(secret).hash})
    store.close()
    assert (stored.value.owner, stored.value.scopes) == (LOCAL_OWNER, ("inference",))

    assert shell("keys", "list") == 0
    assert stored.value.id in shell.out and "phone" in shell.out and secret not in shell.out
    assert shell("keys", "revoke", stored.value.id) == 0
    assert shell("keys", "list", "--json") == 0
    (listed,) = json.loads(shell.out)
    assert listed["revoked_at"] is not None and "hash" not in listed


def test_a_key_is_changed_rotated_and_shown(shell: Shell, tiny_home: Path):
    limits = ["--requests-per-minute", "5", "--tokens-per-minute", "900"]
    assert shell("keys", "create", "--model", "old-name", *limits) == 0
    first = shell.out.strip()
    assert shell("keys", "list", "--json") == 0
    id = json.loads(shell.out)[0]["id"]
    assert shell("keys", "update", id, "--name", "phone", "--requests-per-day", "50", "--expires-in", "2d") == 0
    assert shell("keys", "show", id) == 0
    shown = json.loads(shell.out)
    rates = {"requests_per_minute": 5, "requests_per_day": 50, "tokens_per_minute": 900}
    assert (shown["name"], shown["models"]) == ("phone", [BASE])
    assert {name: shown["rates"][name] for name in rates} == rates
    assert shown["expires_at"] > time.time() and "hash" not in shown and "pepper" not in shown

    assert shell("keys", "rotate", id, "--overlap", "1h") == 0
    second = shell.out.strip()
    assert second != first and second not in shell.err and "old secret ends" in shell.err
    assert shell("keys", "update", id, "--model", "all", "--expires-in", "never") == 0
    assert shell("keys", "show", id) == 0
    shown = json.loads(shell.out)
    assert (shown["models"], shown["expires_at"]) == ([], None)
    assert shown["previous_secret_ends_at"] > time.time()


def test_in_production_no_command_takes_an_emulator_for_the_store(shell: Shell, monkeypatch: pytest.MonkeyPatch):
    shell.home.mkdir(exist_ok=True)
    (shell.home / "config.yaml").write_text("documents_url: firestore:my-project\n")
    monkeypatch.setenv("FIRESTORE_EMULATOR_HOST", "127.0.0.1:9")
    for command in (["keys", "list"], ["keys", "revoke", "key_x"], ["audit"]):
        assert shell(*command) == 1 and "`FIRESTORE_EMULATOR_HOST` is set" in shell.err


def test_all_keys_of_an_owner_are_revoked_at_once(shell: Shell):
    for owner in ("ada", "ada", "bob"):
        assert shell("keys", "create", "--owner", owner) == 0
    assert shell("keys", "revoke", "--owner", "ada") == 0 and shell.out.count("revoked key_") == 2
    assert shell("keys", "list", "--json") == 0
    ended = {(key["owner"], key["revoked_at"] is not None) for key in json.loads(shell.out)}
    assert ended == {("ada", True), ("bob", False)}
    assert shell("keys", "revoke", "--owner", "ada") == 0 and (shell.out, shell.err) == (
        "",
        "no keys of ada that work\n",
    )
    for arguments in ([], ["key_x", "--owner", "ada"]):
        assert shell("keys", "revoke", *arguments) == 1 and "`--owner`" in shell.err


def test_the_pepper_rotates_and_keys_go_on(shell: Shell):
    assert shell("keys", "create") == 0
    secret = shell.out.strip()
    before = config.read_pepper(config.load(shell.home)).id
    assert shell("keys", "rotate-pepper") == 0
    assert "1 older ones are still needed" in shell.out
    pepper = config.read_pepper(config.load(shell.home))
    assert pepper.id != before
    store = open_store(config.load(shell.home))
    assert find_secret(store.records, pepper.hashes(secret)) is not None
    store.close()


def test_what_commands_do_is_in_the_audit_log(shell: Shell):
    for arguments in (["create", "--owner", "ada"], ["create"], ["rotate-pepper"]):
        assert shell("keys", *arguments) == 0
    assert shell("audit", "--json") == 0
    entries = json.loads(shell.out)
    assert [entry["action"] for entry in entries] == ["pepper.rotated", "api_key.created", "api_key.created"]
    assert {entry["actor"]["kind"] for entry in entries} == {"cli"}
    assert shell("audit", "--owner", "ada") == 0
    assert shell.out.count("api_key.created") == 1
    assert shell("audit", "--type", "pepper.rotated", "--limit", "1") == 0
    assert len(shell.out.splitlines()) == 2
    assert shell("audit", "--since", "soon") == 1 and "`since`" in shell.err


def test_bases_that_come_and_go_are_in_the_audit_log(shell: Shell, tiny_base: Path):
    assert shell("bases", "add", str(tiny_base), "--id", "my/other") == 0
    assert shell("bases", "remove", "my/other") == 0
    assert shell("bases", "remove", "my/other") == 1
    assert shell("audit", "--type", "base.added", "--type", "base.removed", "--json") == 0
    entries = json.loads(shell.out)
    assert [(entry["action"], entry["target"]["id"]) for entry in entries][:2] == [
        ("base.removed", "my/other"),
        ("base.added", "my/other"),
    ]
    assert {entry["actor"]["kind"] for entry in entries} == {"cli"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["create", "--scope", "everything"], "Unknown scope 'everything'"),
        (["create", "--expires-in", "soon"], "Invalid `expires_in`"),
        (["create", "--owner", "../x"], "Invalid `owner`"),
        (["create", "--model", "no-bot"], "no model or base `no-bot`"),
        (["update", "key_none", "--name", "x"], "No such key: `key_none`"),
        (["update", "key_none"], "Say what to change"),
        (["rotate", "key_none", "--overlap", "1y"], "No such key: `key_none`"),
        (["revoke", "key_none"], "No such key: `key_none`"),
    ],
)
def test_a_wrong_key_command_says_what_is_wrong(arguments: list[str], message: str, shell: Shell):
    assert shell("keys", *arguments) == 1
    assert message in shell.err and shell.out == ""


def test_bases_come_from_folders_and_gguf_files(shell: Shell, tiny_home: Path, tiny_base: Path, tmp_path: Path):
    gguf = write_gguf(tmp_path / "small.gguf", tiny_base)
    assert shell("bases", "add", str(gguf)) == 1 and "--id" in shell.err
    assert shell("bases", "add", str(gguf), "--id", "my/small") == 0
    assert shell("bases", "list", "--verify") == 0
    rows = {line.split()[0]: line.split()[-1] for line in shell.out.splitlines()[1:]}
    assert rows == {BASE: "yes", "my/small": "no"}
    assert shell("bases", "remove", "my/small") == 0
    assert shell("bases", "remove", "my/small") == 1 and "no base `my/small`" in shell.err


def test_adapters_come_in_take_turns_and_go_out_as_they_came(
    shell: Shell, tiny_home: Path, tiny_adapters: list[Path], tmp_path: Path
):
    assert shell("models", "import", str(tiny_adapters[0]), "--name", "bot") == 0
    assert shell.out.startswith("bot@v1 (ft:tiny/llama:local:bot:")
    elsewhere = Path(shutil.copytree(tiny_adapters[1], tmp_path / "elsewhere"))
    settings = json.loads((elsewhere / "adapter_config.json").read_text())
    (elsewhere / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": "/home/ada/m"}))
    assert shell("models", "import", str(elsewhere), "--name", "bot", "--base", "old-name") == 0

    assert shell("models", "list") == 0
    assert "bot@v1 *" in shell.out and "bot@v2  " in shell.out
    assert shell("models", "activate", "bot@v2") == 0 and "bot calls v2" in shell.out
    assert shell("models", "activate", "bot", "1") == 0 and "bot calls v1" in shell.out
    assert shell("models", "activate", "bot", "v2") == 0 and "bot calls v2" in shell.out
    assert shell("models", "rollback", "bot") == 0 and "bot calls v1" in shell.out
    assert shell("models", "rollback", "bot") == 1 and "no version before" in shell.err

    target = tmp_path / "out"
    assert shell("models", "export", "bot@v2", "--to", str(target)) == 0
    weights = "adapter_model.safetensors"
    assert (target / weights).read_bytes() == (tiny_adapters[1] / weights).read_bytes()
    assert json.loads((target / "adapter_config.json").read_text())["base_model_name_or_path"] == BASE
    assert shell("models", "export", "bot@v2", "--to", str(target)) == 1 and "is there already" in shell.err

    assert shell("models", "delete", "bot@v1") == 0
    assert shell("models", "delete", "bot") == 0
    assert shell("models", "list") == 0 and shell.out == ""


def test_a_downloaded_adapter_is_loaded_by_plain_peft(
    shell: Shell, tiny_home: Path, tiny_base: Path, tiny_adapters: list[Path], tmp_path: Path
):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    shell("models", "import", str(tiny_adapters[0]), "--name", "bot")
    assert shell("models", "export", "bot", "--to", str(tmp_path / "bot")) == 0
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), tmp_path / "bot")
    assert model.peft_config["default"].r == 4


def test_a_merged_model_goes_out_and_comes_back_as_a_base(
    shell: Shell, tiny_home: Path, tiny_base: Path, tiny_adapters: list[Path], tmp_path: Path
):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    shell("models", "import", str(tiny_adapters[0]), "--name", "bot")
    target = tmp_path / "merged"
    assert shell("models", "export", "bot@v1", "--merged", "--to", str(target)) == 0
    assert shell.out.startswith(f"{target} (fp32, ") and "logits differ from base and adapter by" in shell.out
    assert "Traceback" not in shell.err and "Warning" not in shell.err

    ids = torch.tensor([[1, 5, 300, 17, 42]])
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), tiny_adapters[0])
    with torch.no_grad():
        wanted = tuned(input_ids=ids).logits
        found = AutoModelForCausalLM.from_pretrained(target)(input_ids=ids).logits
    torch.testing.assert_close(found, wanted, atol=1e-5 * wanted.abs().max().item(), rtol=0)
    assert shell("bases", "add", str(target), "--id", "my/merged") == 0
    assert shell("bases", "list", "--verify") == 0 and "my/merged" in shell.out

    assert shell("models", "export", "bot@v1", "--merged", "--to", str(target)) == 1 and "is there already" in shell.err
    assert shell("models", "export", "bot", "--merged", "--dtype", "int3", "--to", str(tmp_path / "x")) == 1
    assert "Use `bf16` or `fp32`" in shell.err
    assert shell("models", "export", "bot", "--dtype", "bf16") == 1 and "goes with `--merged`" in shell.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "merged"]


def test_an_export_has_the_lineage_and_show_tells_of_it(
    shell: Shell, tiny_home: Path, tiny_adapters: list[Path], tmp_path: Path
):
    for adapter in tiny_adapters[:2]:
        shell("models", "import", str(adapter), "--name", "bot")
    store = open_store(config.load(shell.home))
    version = store.records.versions.get(f"{LOCAL_OWNER}:bot:v2").value
    store.blobs.write(f"{version.adapter.uri}/lineage.json", b'{"signed": true}')
    store.close()

    assert shell("models", "export", "bot@v2", "--to", str(tmp_path / "v2")) == 0
    assert (tmp_path / "v2" / "lineage.json").read_bytes() == b'{"signed": true}'
    assert shell("models", "export", "bot", "--to", str(tmp_path / "v1")) == 0
    files = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert sorted(path.name for path in (tmp_path / "v1").iterdir()) == files

    assert shell("models", "show", "bot") == 0
    head, _, first, second = shell.out.splitlines()
    assert head == "bot on tiny/llama, calls v1"
    assert first.split()[:2] == ["v1", "*"] and first.split()[-4:] == ["imported", "no", "-", "-"]
    assert second.split()[-4:] == ["imported", "yes", "-", "-"]
    assert shell("models", "show", "bot", "--json") == 0
    assert [row["lineage"] for row in json.loads(shell.out)["versions"]] == [False, True]
    assert shell("models", "show", "nothing") == 1 and "does not exist" in shell.err


def test_a_copied_bucket_comes_in_with_its_versions(
    shell: Shell, tiny_home: Path, tiny_adapters: list[Path], tmp_path: Path
):
    for number, adapter in enumerate(tiny_adapters[:2], start=1):
        folder = tmp_path / "bucket" / "models" / "bot" / f"v{number}"
        shutil.copytree(adapter, folder / "adapter")
        (folder / "training_config.json").write_text(json.dumps({"base_model": "google/x", "lora_r": 4}))
        path = folder / "adapter" / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "google/x"}))

    command = ["models", "import-layout", str(tmp_path / "bucket")]
    assert shell(*command) == 1 and "--base-map google/x=ID" in shell.out
    assert shell(*command, "--base-map", "google/x") == 1 and "Use OLD=NEW" in shell.err
    assert shell(*command, "--base-map", f"google/x={BASE}") == 0
    assert [line.split()[:4] for line in shell.out.splitlines()[1:]] == [
        [f"bot/v{number}", "added", f"bot@v{number}", BASE] for number in (1, 2)
    ]
    assert shell(*command, "--base-map", f"google/x={BASE}", "--json") == 0
    assert [(row["result"], row["settings"]) for row in json.loads(shell.out)] == [("present", {"rank": 4})] * 2
    assert shell("models", "list") == 0 and "bot@v2 *" in shell.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["activate", "bot"], "Say which version: `tuneloom models activate bot@v2`"),
        (["activate", "bot@x"], "Say which version: `tuneloom models activate bot@v2`"),
        (["activate", "bot@v1"], "`bot` does not exist"),
        (["export", "nothing"], "`nothing` does not exist"),
        (["delete", "nothing"], "`nothing` does not exist"),
        (["import", "nowhere"], "no readable `adapter_config.json`"),
    ],
)
def test_a_wrong_model_command_says_what_is_wrong(arguments: list[str], message: str, shell: Shell, tiny_home: Path):
    assert shell("models", *arguments) == 1
    assert message in shell.err


def test_an_import_may_not_hide_a_base_and_must_fit_one(shell: Shell, tiny_home: Path, tiny_adapters: list[Path]):
    source = str(tiny_adapters[0])
    assert shell("models", "import", source, "--name", "old-name") == 1 and "base model" in shell.err
    assert shell("models", "import", source, "--base", "other") == 1 and "is not served here" in shell.err


@pytest.fixture
def api(shell: Shell) -> Iterator[list[str]]:
    """A server with one job in the place of the API; the list has what it was asked."""
    asked: list[str] = []
    sent: list[dict] = []
    settings = [{"name": "rank", "value": 8, "reason": "as asked"}]
    bounds = {"seconds": 100.0, "seconds_low": 80.0, "seconds_high": 125.0}
    estimate = {"tokens": 500, "steps": 20, "memory_bytes": 10**9, "based_on": "1 job like it", **bounds}
    usage = {"tokens": 500, "steps": 20, "seconds": 90.0, "memory_bytes": 10**9, "cost": None, "estimate_error": -0.1}
    ours = {"name": "x", "base": "b", "settings": settings, "estimate": estimate, "usage": None, "queue": None}
    common = {"created_at": 1_700_000_000, "estimated_finish": None, "error": None}
    job = {"id": "ftjob-1", "status": "succeeded", "fine_tuned_model": "ft:b:local:x:1", **common}
    job["tuneloom"] = {**ours, "usage": usage}
    waiting = {"id": "ftjob-3", "status": "queued", "fine_tuned_model": None, **common}
    waiting["tuneloom"] = {
        **ours,
        "queue": {"position": 2, "waiting_for": "free cores", "starts_at": 1_700_000_060},
    }
    event = {"id": "e1", "created_at": 1_700_000_000, "level": "info", "message": "Step 1/2: training loss=2.10"}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(f"{self.command} {self.path}")
            if self.headers["Authorization"] != "Bearer sk-admin":
                return self._answer(401, {"error": {"message": "Incorrect API key provided."}})
            if "ftjob-2" in self.path:
                return self._answer(404, {"error": {"message": "No such job: `ftjob-2`."}})
            if self.path.endswith("/jobs?limit=20"):
                return self._answer(200, {"data": [job, waiting]})
            if self.path.endswith("ftjob-3"):
                return self._answer(200, waiting)
            if self.path.endswith("/estimate"):
                sent.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                if len(sent) == 1:
                    return self._answer(202, {"status": "running"})
                done = {"status": "completed", "message": "Estimate: 500 tokens", "settings": settings}
                return self._answer(200, done)
            if "/events" in self.path:
                return self._answer(200, {"data": [event]})
            return self._answer(200, job)

        do_POST = do_GET

        def _answer(self, status: int, body: dict) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    cluster.write_private(shell.home / "admin-key", "sk-admin\n")
    state = cluster.ClusterState(
        id="c1",
        started_at=0,
        host="127.0.0.1",
        port=server.server_address[1],
        gcs_address="127.0.0.1:1",
        dashboard_port=1,
        folder=shell.home,
    )
    cluster.write_state(shell.home, state)
    yield asked
    server.shutdown()
    thread.join(5)
    server.server_close()


def test_jobs_are_shown_and_changed_through_the_api(shell: Shell, api: list[str]):
    assert shell("jobs", "list") == 0
    assert shell.out.splitlines()[1].split() == ["ftjob-1", "succeeded", "2023-11-14", "22:13:20Z", "ft:b:local:x:1"]
    assert shell.out.splitlines()[2].split(maxsplit=4)[4] == "2: free cores"
    assert shell("jobs", "show", "ftjob-1", "--json") == 0 and json.loads(shell.out)["id"] == "ftjob-1"
    for verb in ("cancel", "pause", "resume"):
        assert shell("jobs", verb, "ftjob-1") == 0
        assert api[-1] == f"POST /v1/fine_tuning/jobs/ftjob-1/{verb}"
    assert shell("jobs", "events", "ftjob-1", "--follow") == 0
    assert "2023-11-14 22:13:20Z  info   Step 1/2: training loss=2.10" in shell.out
    assert shell("jobs", "events", "ftjob-1", "--json") == 0 and json.loads(shell.out)["id"] == "e1"


def test_a_job_is_shown_with_its_place_its_estimate_and_what_it_took(shell: Shell, api: list[str]):
    assert shell("jobs", "show", "ftjob-3") == 0
    assert "in line     2, waiting for free cores; starts at about 2023-11-14 22:14:20Z" in shell.out
    assert "estimate    500 tokens in 20 steps, 100 s (80 to 125 s), 1.0 GB; from 1 job like it" in shell.out
    assert shell("jobs", "show", "ftjob-1") == 0
    assert "took        500 tokens in 20 steps, 90 s, 1.0 GB; 10% less than estimated" in shell.out
    assert shell.out.splitlines()[-1].split(maxsplit=2) == ["rank", "8", "as asked"]


def test_a_job_is_estimated_without_creating_it(shell: Shell, api: list[str], monkeypatch):
    monkeypatch.setattr("tuneloom.cli.jobs.FOLLOW_S", 0)
    assert shell("jobs", "estimate", "file-1", "--epochs", "3", "-o", "rank=8", "-o", "precision=bf16") == 0
    assert shell.out.splitlines()[0] == "Estimate: 500 tokens"
    assert api[-2:] == ["POST /v1/tuneloom/estimate"] * 2
    assert shell("jobs", "estimate", "file-1", "-o", "rank") == 1 and "Write `name=value`" in shell.err


def test_the_apis_own_words_reach_the_user(shell: Shell, api: list[str]):
    assert shell("jobs", "cancel", "ftjob-2") == 1
    assert shell.err == "error: No such job: `ftjob-2`.\n"
    cluster.write_private(shell.home / "admin-key", "sk-other\n")
    assert shell("jobs", "list") == 1
    assert shell.err == f"error: The API refuses the key in {shell.home / 'admin-key'}. `tuneloom up` makes another.\n"


def test_env_prints_lines_for_a_shell(shell: Shell, api: list[str]):
    assert shell("env") == 0
    base_url, key = shell.out.splitlines()
    assert base_url.startswith("export OPENAI_BASE_URL=http://127.0.0.1:") and base_url.endswith("/v1")
    assert key == "export OPENAI_API_KEY=sk-admin"
    assert shell("env", "--ray") == 0
    assert "export RAY_API_SERVER_ADDRESS=http://127.0.0.1:1" in shell.out and "RAY_AUTH_TOKEN_PATH" in shell.out


def test_a_table_that_leaves_adapters_out_says_so(shell: Shell, api: list[str], monkeypatch: pytest.MonkeyPatch):
    from tuneloom.engine.base import AdapterState
    from tuneloom.serve.bases_view import show_adapter

    adapters = {"data": [show_adapter("r1", AdapterState("a" * 64, "disk", 4, 9, 0, False, 5.0), [])], "has_more": True}
    base = {"id": "o/m", "problem": None, "pins": [], "replicas": [{"id": "r1", "status": "error", "error": {}}]}
    base["replicas"][0]["error"]["message"] = "Silent."

    class Answers:
        def __init__(self, settings: config.Settings) -> None:
            pass

        def get(self, path: str) -> dict:
            return json.loads(json.dumps(adapters if path.endswith("/adapters") else {"data": [base]}))

    monkeypatch.setattr("tuneloom.cli.local.Api", Answers)
    assert shell("status", "--bases") == 0
    assert "only the 1 used last; more by GET /v1/tuneloom/bases/o/m/adapters" in shell.out and "Silent." in shell.out
    adapters["has_more"] = False
    assert shell("status", "--bases") == 0 and "only the" not in shell.out
    base["replicas"] = []
    assert shell("status", "--bases") == 0 and "no replica runs" in shell.out


def test_the_tables_of_operators_hold_what_the_api_tells():
    from tuneloom.cli.report import adapter_rows, pin_rows, replica_rows, tier_rows
    from tuneloom.engine.base import AdapterState, EngineStats, TierStats
    from tuneloom.errors import Overloaded
    from tuneloom.serve.bases_view import show_adapter, show_outcome, show_stats

    tier = TierStats(2, 2_000_000, 3_000_000, hits=3, misses=1, fills=1, evictions=5, failures=6, fill_s=0.2)
    details = {
        "device": "cpu",
        "dtype": "bfloat16",
        "mode": "batched",
        "prefix_cache": {"hit_tokens": 30, "query_tokens": 40},
    }
    stats = EngineStats(4, 2, 10, 1000, 9, 12.52, 77, 1, 0, 1234, 0, 30.0, 160.0, {"host": tier}, details)
    state = AdapterState("a" * 64, "slot", 4, 9_800_000, 1, True, 50.0)
    base = {
        "replicas": [{**show_outcome("r1", None), **show_stats(stats)}, show_outcome("r2", Overloaded("Silent."))],
        "adapters": [show_adapter("r1", state, [{"name": "bot@v1", "owner": "eve"}])],
        "pins": [{"model": "bot@v1", "owner": "eve", "sha256": "a" * 64}],
    }
    _, (one, two) = replica_rows(base)
    assert one[:8] == ["r1", "batched", "cpu bfloat16", "4", "2 (1,234 tokens)", "12.5 ms", "160", "10 of 1,000 tokens"]
    assert one[8] == "75 %" and two[:2] == ["r2", "Silent."]
    details |= {"mode": "one at a time", "reason": "MambaForCausalLM carries a state"}
    assert replica_rows(base)[1][0][1] == "one at a time: MambaForCausalLM carries a state"
    assert tier_rows(base)[1] == [["r1", "host", "2", "2.0 MB", "3.0 MB", "3", "1", "75 %", "5", "6"]]
    assert adapter_rows(base)[1][0][:7] == ["r1", "a" * 12, "eve/bot@v1", "slot", "9.8 MB", "1", "yes"]
    assert pin_rows(base)[1] == [["eve/bot@v1", "a" * 64]]
