"""`tuneloom verify` on an adapter that was really trained."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import typer
from click import Context
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.lineages import CONFIG, register
from tests.test_cli import Shell
from tests.train.conftest import BASE_ID, Lab, colour_rows
from tuneloom import config
from tuneloom.bases import get_base
from tuneloom.cli import app
from tuneloom.cli import verify as commands
from tuneloom.config import BaseSettings, EngineSettings, TrainSettings
from tuneloom.domain import Job, TrainOptions
from tuneloom.store import open_store
from tuneloom.store.lineage import public_pem, read_signed, sign
from tuneloom.train.attempt import run_attempt


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
    assert shell("models", "export", "colours", "--to", str(folder)) == 0
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
    context = Context(typer.main.get_command(app), obj=home)
    return list(commands.checks_of(context, config.load(home), "colours", None, "local"))  # type: ignore[arg-type]


def test_an_imported_adapter_has_no_lineage_to_verify(shell: Shell, tiny_adapters: list[Path]):
    assert shell("models", "import", str(tiny_adapters[0]), "--name", "bot") == 0
    assert shell("verify", "bot") == 1 and "it was imported" in shell.out


@pytest.fixture
def folder(shell: Shell, tmp_path: Path) -> Path:
    """A download of the model."""
    assert shell("models", "export", "colours", "--to", str(tmp_path / "download")) == 0
    return tmp_path / "download"


def strip(folder: Path) -> None:
    path = folder / "lineage.json"
    document = json.loads(path.read_bytes())
    path.write_bytes(json.dumps({k: v for k, v in document.items() if k != "signature"}).encode())


def link(folder: Path, target: Path | str) -> None:
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.safetensors").symlink_to(target)


def pipe(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    os.mkfifo(folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (strip, "FAIL  lineage: The lineage is not "),
        (lambda folder: (folder / "lineage.json").unlink(), "FAIL  lineage: `"),
        (lambda folder: (folder / "adapter_config.json").unlink(), "FAIL  adapter_config.json: it is missing"),
        (lambda folder: (folder / "adapter_model.bin").write_bytes(b"x"), "FAIL  adapter_model.bin: the lineage has"),
        (
            lambda folder: (folder / "tokenizer.json").write_bytes(b"{}"),
            "FAIL  tokenizer.json: the lineage has no such",
        ),
        (lambda folder: link(folder, "nowhere"), "FAIL  adapter_model.safetensors: it is missing"),
        (lambda folder: link(folder, "/dev/zero"), "FAIL  adapter_model.safetensors: it cannot be read: it is no file"),
        (pipe, "FAIL  adapter_model.safetensors: it cannot be read: it is no file"),
    ],
)
def test_a_folder_that_was_changed_fails_and_says_where(
    shell: Shell, folder: Path, edit: Callable[[Path], object], told: str
):
    edit(folder)
    assert shell("verify", str(folder)) == 1
    assert told in shell.out


def test_what_is_read_by_people_only_is_named_and_does_not_fail(shell: Shell, folder: Path):
    (folder / "README.md").write_text("Ours.")
    (folder / ".gitattributes").write_text("")
    link(folder, shutil.copy(folder / "adapter_model.safetensors", folder.parent / "weights"))
    assert shell("verify", str(folder)) == 0, shell.out
    assert "--    README.md: not covered" in shell.out and "--    .gitattributes: not covered" in shell.out


def test_a_file_or_too_much_is_refused(shell: Shell, folder: Path):
    with (folder / "lineage.json").open("r+b") as file:
        file.truncate(1 << 30)
    assert shell("verify", str(folder)) == 1 and "larger than a lineage may be" in shell.err
    assert shell("verify", str(folder / "README.md")) == 1 and "Unpack it" in shell.err


def test_a_folder_is_told_from_the_model_of_its_name(shell: Shell, folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(folder.parent)
    folder.rename("colours")
    (folder.parent / "colours" / "adapter_config.json").write_text("{}")
    assert shell("verify", "colours") == 1
    assert "The model of that name: `tuneloom verify colours@v1`" in shell.err
    assert shell("verify", "colours@v1") == 0, shell.out


def test_a_file_that_was_added_to_the_base_is_found(shell: Shell, home: Path):
    (get_base(home / "bases", BASE_ID).path / "chat_template.json").write_text("{}")
    assert shell("verify", "colours") == 1
    assert "FAIL  base chat_template.json: the lineage has no such file" in shell.out


def test_the_adapter_of_another_job_under_a_version_is_found(shell: Shell, home: Path):
    store = open_store(config.load(home))
    (version,) = store.records.versions.query({})
    other = version.value.model_copy(update={"job_id": "ftjob-other"})
    store.records.commit(store.records.versions.replace(version, other))
    store.close()
    assert shell("verify", "colours") == 1 and "FAIL  job: the lineage is of ftjob-" in shell.out
