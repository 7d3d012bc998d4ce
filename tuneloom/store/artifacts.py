"""What a training run leaves in the blob store, and how it comes back: adapters by content, manifests by attempt."""

import contextlib
import hashlib
import os
import re
import secrets
import shutil
import time
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from tuneloom.domain import AdapterRef, Fidelity, Hyperparameters, Setting, adapter_sha256
from tuneloom.store.base import BlobCorrupt, BlobNotFound, Blobs
from tuneloom.store.peft_folder import (
    CONFIG_FILE,
    MAX_CONFIG_BYTES,
    WEIGHTS_FILE,
    check_adapter,
    read_header,
)

__all__ = [
    "ADAPTER_FILES",
    "Manifest",
    "check_adapter",
    "fetch_adapter",
    "put_adapter",
    "read_manifest",
    "write_manifest",
]

ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE)
CHUNK_BYTES = 1 << 20
STALE_DRAFT_S = 24 * 3600.0

_SHA256 = re.compile(r"[0-9a-f]{64}")


class Manifest(BaseModel):
    """What an attempt has made. It is written last: if it is there, everything it names is there too."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    job_id: str
    attempt: int
    base: str
    adapter: AdapterRef
    resolved: Hyperparameters
    trained_tokens: int
    steps: int
    metrics: dict[str, float]
    settings: tuple[Setting, ...] = ()
    fidelity: Fidelity | None = None
    fidelity_note: str | None = None
    created_at: float


def put_adapter(blobs: Blobs, prefix: str, folder: Path) -> AdapterRef:
    """Store the two files of an adapter folder under `prefix`. Doing it again with the same files changes nothing.

    Only the form of the files is looked at here; whether they fit a base is `check_adapter`'s question.

    Raises:
        AdapterRejected: the weights are not a safetensors file.
        BlobExists: another adapter is stored under `prefix`.
    """
    tensors = read_header(folder / WEIGHTS_FILE)
    rank = max((tensor.shape[0] for name, tensor in tensors.items() if name.endswith("lora_A.weight")), default=0)
    hashes = {name: _file_sha256(folder / name) for name in ADAPTER_FILES}
    # The weights first: whoever sees the small file can count on the large one.
    for name in reversed(ADAPTER_FILES):
        blobs.write(f"{prefix}/{name}", folder / name, sha256=hashes[name])
    size = (folder / WEIGHTS_FILE).stat().st_size
    return AdapterRef(sha256=adapter_sha256(hashes), uri=prefix, rank=rank, size_bytes=size)


def fetch_adapter(blobs: Blobs, ref: AdapterRef, cache: Path) -> Path:
    """The folder `cache/{sha256}` with the adapter's files, downloaded and verified unless it is there already.

    Safe for any number of threads and processes over one cache. A folder that is there was verified when it came;
    only its sizes are looked at again.

    Raises:
        BlobNotFound: a file of it is not stored.
        BlobCorrupt: the stored bytes are not those that `ref` promises; nothing is kept of them.
    """
    if not _SHA256.fullmatch(ref.sha256):
        raise BlobCorrupt(f"`{ref.sha256[:80]}` is not the sha256 of an adapter.")
    target = cache / ref.sha256
    if _is_whole(target, ref):
        return target
    drafts = cache / "drafts"
    drafts.mkdir(parents=True, exist_ok=True)
    _sweep(drafts)
    draft = drafts / secrets.token_hex(16)
    draft.mkdir()
    try:
        _download(blobs, ref, draft)
        _install(draft, target, drafts, ref)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target


def write_manifest(blobs: Blobs, prefix: str, manifest: Manifest) -> None:
    """Raises BlobExists if another manifest is there: an attempt has made one thing."""
    blobs.write(f"{prefix}/manifest.json", manifest.model_dump_json(indent=2).encode())


def read_manifest(blobs: Blobs, prefix: str) -> Manifest | None:
    try:
        data = blobs.read(f"{prefix}/manifest.json")
    except BlobNotFound:
        return None
    try:
        return Manifest.model_validate_json(data)
    except ValidationError as error:
        raise BlobCorrupt(f"The manifest under `{prefix}` cannot be read: {error}") from error


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_whole(folder: Path, ref: AdapterRef) -> bool:
    try:
        sizes = {name: (folder / name).stat().st_size for name in ADAPTER_FILES}
    except (FileNotFoundError, NotADirectoryError):
        return False
    return sizes[WEIGHTS_FILE] == ref.size_bytes and sizes[CONFIG_FILE] > 0


def _download(blobs: Blobs, ref: AdapterRef, draft: Path) -> None:
    limits = {CONFIG_FILE: MAX_CONFIG_BYTES, WEIGHTS_FILE: ref.size_bytes}
    hashes = {name: _copy(blobs, f"{ref.uri}/{name}", draft / name, limits[name]) for name in ADAPTER_FILES}
    actual = adapter_sha256(hashes)
    if actual != ref.sha256:
        raise BlobCorrupt(f"The adapter stored at `{ref.uri}` hashes to `{actual}`, not to `{ref.sha256}`.")


def _copy(blobs: Blobs, key: str, path: Path, max_bytes: int) -> str:
    digest = hashlib.sha256()
    with blobs.open(key) as source, path.open("wb") as file:
        while chunk := source.read(CHUNK_BYTES):
            digest.update(chunk)
            file.write(chunk)
            if file.tell() > max_bytes:
                raise BlobCorrupt(f"The blob `{key}` is larger than the {max_bytes:,} bytes it should have.")
        file.flush()
        # Folders of the cache are trusted later, so a power cut must not leave one with holes.
        os.fsync(file.fileno())
    return digest.hexdigest()


def _install(draft: Path, target: Path, drafts: Path, ref: AdapterRef) -> None:
    """Put a verified draft in its place, unless another caller's is there; one that is broken is moved away."""
    while True:
        try:
            draft.rename(target)
            return
        except OSError:
            if _is_whole(target, ref):
                return
            if not target.exists():
                raise
        broken = drafts / secrets.token_hex(16)
        with contextlib.suppress(FileNotFoundError):
            target.rename(broken)
        shutil.rmtree(broken, ignore_errors=True)


def _sweep(drafts: Path) -> None:
    oldest = time.time() - STALE_DRAFT_S
    for path in drafts.iterdir():
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_mtime < oldest:
                shutil.rmtree(path, ignore_errors=True)
