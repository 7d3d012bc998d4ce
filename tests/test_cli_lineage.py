"""`tuneloom verify` and `tuneloom reproduce` on an adapter that was really trained."""

import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.test_cli import Shell
from tests.train.conftest import BASE_ID, Lab, colour_rows
from tuneloom.bases import get_base
from tuneloom.cli import lineage as commands
from tuneloom.config import BaseSettings, EngineSettings, TrainSettings
from tuneloom.control import models
from tuneloom.domain import Job, TrainOptions
from tuneloom.store.artifacts import read_manifest
from tuneloom.store.lineage import public_pem, read_signed, sign
from tuneloom.train.attempt import run_attempt

CONFIG = f"bases: [{{id: {BASE_ID}, engine: {{dtype: fp32}}}}]\ntrain: {{threads: 1, min_rows: 1}}\n"


def register(lab: Lab, job_id: str) -> None:
    """What control does with a published attempt, in short."""
    stored = lab.store.records.jobs.get(job_id)
    manifest = read_manifest(lab.store.blobs, stored.value.artifacts)
    assert manifest is not None, lab.progress(job_id).error
    addition = models.register(lab.store.records, stored.value, manifest, time.time())
    after = stored.value.model_copy(update={"state": "succeeded", "version_id": addition.version.id})
    lab.store.records.commit(*addition.writes, lab.store.records.jobs.replace(stored, after))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Iterator[tuple[Lab, Job]]:
    """An installation with the model `colours`, of one trained version."""
    lab = Lab(tmp_path_factory.mktemp("trained") / "home", tiny_base)
    bases = (BaseSettings(id=BASE_ID, engine=EngineSettings(dtype="fp32")),)
    lab.settings = lab.settings.model_copy(update={"bases": bases, "train": TrainSettings(threads=1, min_rows=1)})
    (lab.settings.home / "config.yaml").write_text(CONFIG)
    job = lab.add_job(colour_rows(12), n_epochs=1, options=TrainOptions(rank=4, learning_rate=5e-3, precision="fp32"))
    assert run_attempt(lab.settings, job.id, 1) == "published", lab.progress(job.id).error
    register(lab, job.id)
    yield lab, job
    lab.store.close()


@pytest.fixture
def home(trained: tuple[Lab, Job], tmp_path: Path) -> Path:
    """A copy of the installation, to be changed."""
    return shutil.copytree(trained[0].settings.home, tmp_path / "home")


@pytest.fixture
def shell(home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shell:
    return Shell(home, capsys, monkeypatch)


def adapter_blobs(home: Path, job: Job) -> Path:
    """The folder of the version's files in the blob store."""
    return home / "blobs" / "data" / "jobs" / job.id / "a1" / "adapter"


def test_what_was_trained_here_is_verified_line_by_line(shell: Shell, trained: tuple[Lab, Job]):
    assert shell("verify", "colours") == 0, shell.out
    checked = [line.split(":")[0] for line in shell.out.splitlines()]
    assert checked == [
        "ok    signature",
        "ok    signer",
        "ok    adapter_config.json",
        "ok    adapter_model.safetensors",
        "ok    adapter",
        "ok    base",
        "ok    training file",
    ]
    assert "this installation" in shell.out
    assert shell("verify", "nothing") == 1 and "does not exist" in shell.err
    last = trained[0].store.records.checkpoints.query({"job_id": trained[1].id})[-1].value
    assert shell("verify", last.name) == 0, shell.out


def test_a_download_is_verified_as_a_folder_here_and_elsewhere(shell: Shell, home: Path, tmp_path: Path):
    folder = tmp_path / "colours"
    assert shell("models", "download", "colours", "--to", str(folder)) == 0
    assert shell("verify", str(folder)) == 0, shell.out
    key = tmp_path / "signer.pem"
    key.write_bytes(public_pem(read_signed((folder / "lineage.json").read_bytes()).public_key))

    shell.home = tmp_path / "elsewhere"
    assert shell("verify", str(folder)) == 1 and "FAIL  signer: unknown" in shell.out
    assert shell("verify", str(folder), "--public-key", str(key)) == 0, shell.out
    assert "--    base: `tiny/llama` is not here" in shell.out and "--    training file" in shell.out
    assert not shell.home.exists(), "looking at a folder makes no installation"


def test_a_merged_model_is_said_not_to_be_covered(shell: Shell, home: Path, tmp_path: Path):
    merged = tmp_path / "merged"
    assert shell("models", "export", "colours@v1", "--merged", "--to", str(merged)) == 0
    assert shell("verify", str(merged)) == 1
    failed = [line for line in shell.out.splitlines() if line.startswith("FAIL")]
    assert len(failed) == 1 and failed[0].startswith("FAIL  weights: a merged model's are not covered")


def test_what_somebody_else_signed_is_said_to_be_so(shell: Shell, home: Path, trained: tuple[Lab, Job]):
    path = adapter_blobs(home, trained[1]) / "lineage.json"
    other = Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    path.chmod(0o644)
    path.write_bytes(sign(read_signed(path.read_bytes()).lineage, other))
    assert shell("verify", "colours") == 1
    assert "ok    signature" in shell.out and "FAIL  signer: unknown" in shell.out


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_changed_byte_of_any_file_is_found(home: Path, trained: tuple[Lab, Job], data: st.DataObject):
    base = get_base(home / "bases", BASE_ID)
    data_files = (home / "blobs" / "data" / "files").iterdir()
    base_files = (base.path / "model.safetensors", base.path / "config.json")
    files = [*adapter_blobs(home, trained[1]).iterdir(), *base_files, *data_files]
    path = data.draw(st.sampled_from(sorted(files)))
    before = path.read_bytes()
    at = data.draw(st.integers(0, len(before) - 1))
    path.chmod(0o644)
    path.write_bytes(before[:at] + bytes([before[at] ^ (1 << data.draw(st.integers(0, 7)))]) + before[at + 1 :])
    try:
        assert any(check.is_ok is False for check in checks_of(home)), (path.name, at)
    finally:
        path.write_bytes(before)


def checks_of(home: Path) -> list[commands.Check]:
    """What `tuneloom verify colours` looks at."""
    import typer
    from click import Context

    from tuneloom import config
    from tuneloom.cli import app

    context = Context(typer.main.get_command(app), obj=home)
    return list(commands._checks(context, config.load(home), "colours", None, "local"))  # type: ignore[arg-type]


def test_an_imported_adapter_has_no_lineage_to_verify(shell: Shell, tiny_adapters: list[Path]):
    assert shell("models", "import", str(tiny_adapters[0]), "--name", "bot") == 0
    assert shell("verify", "bot") == 1 and "it was imported" in shell.out
    assert shell("reproduce", "bot") == 1


class Control:
    """Runs jobs that appear, as the service does, in a thread; `change` what it does before a run."""

    def __init__(self, home: Path, tiny_base: Path) -> None:
        self.lab = Lab.__new__(Lab)
        from tuneloom import config
        from tuneloom.store import open_store

        self.lab.settings = config.load(home)
        self.lab.store = open_store(self.lab.settings)
        self.known = {stored.value.id for stored in self.lab.store.records.jobs.query({})}
        self.results: list[str] = []
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Control":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join(60)
        self.lab.store.close()

    def _run(self) -> None:
        from tuneloom.domain import Progress

        while not self._is_over.wait(0.1):
            for stored in self.lab.store.records.jobs.query({}):
                job = stored.value
                if job.id in self.known:
                    continue
                self.known.add(job.id)
                self.lab.change_job(job.id, state="running", attempt=1, attempt_open=True)
                progress = Progress(id=job.id, owner=job.owner, attempt=1, heartbeat_at=time.time())
                self.lab.store.records.commit(self.lab.store.records.progress.create(progress))
                self.results.append(run_attempt(self.lab.settings, job.id, 1))
                if self.results[-1] == "published":
                    register(self.lab, job.id)
                else:
                    self.lab.change_job(job.id, state="failed", error=self.lab.progress(job.id).error)


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command asks only whether somebody runs jobs."""
    monkeypatch.setattr(commands, "Api", lambda settings: None)


def test_the_same_adapter_comes_again_and_leaves_no_model(
    shell: Shell, home: Path, tiny_base: Path, running: None, trained: tuple[Lab, Job]
):
    with Control(home, tiny_base) as control:
        assert shell("reproduce", "colours") == 0, shell.out + shell.err
        assert control.results == ["published"]
    assert "identical: adapter " in shell.out and "same machine, packages and code" in shell.out
    assert "Step 3/3" in shell.out
    assert shell("models", "list") == 0
    assert "colours@v1 *" in shell.out and "reproduce" not in shell.out
    assert " of 0.01 " in shell.out, "the list tells of the fidelity"
    assert len(shell.out.splitlines()) == 2


def test_what_differs_is_named_and_the_copy_is_removed(
    shell: Shell, home: Path, tiny_base: Path, running: None, trained: tuple[Lab, Job], monkeypatch: pytest.MonkeyPatch
):
    from tuneloom.train import lineage
    from tuneloom.train import models as train_models

    save = train_models.save_adapter

    def changed(model: Any, folder: Path, base_id: str) -> None:
        save(model, folder, base_id)
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "peft_version": "0"}))

    monkeypatch.setattr(train_models, "save_adapter", changed)
    monkeypatch.setattr(lineage, "package_versions", lambda: {"torch": "0.0"})
    with Control(home, tiny_base):
        assert shell("reproduce", "colours@v1") == 1
    assert "different: adapter " in shell.out and "package torch: " in shell.out and "0.0 now" in shell.out
    assert shell("models", "list") == 0 and "reproduce" not in shell.out


def test_a_job_that_does_not_end_is_cancelled(shell: Shell, home: Path, running: None):
    assert shell("reproduce", "colours", "--timeout", "0.0003") == 1
    assert "did not end within" in shell.err
    from tuneloom import config
    from tuneloom.store import open_store

    store = open_store(config.load(home))
    states = {stored.value.state for stored in store.records.jobs.query({})}
    store.close()
    assert states == {"succeeded", "cancelled"}


def test_nothing_is_reproduced_without_its_data_or_a_service(shell: Shell, running: None, monkeypatch: Any, home: Path):
    from tuneloom import config
    from tuneloom.store import open_store

    store = open_store(config.load(home))
    (file,) = store.records.files.query({})
    store.records.commit(store.records.files.delete(file))
    store.close()
    assert shell("reproduce", "colours") == 1 and "is needed again" in shell.err
    assert shell("verify", "colours") == 0 and "--    training file" in shell.out
    monkeypatch.undo()
    assert shell("reproduce", "colours") in (1, 3)
