"""Where an adapter comes from: a signed document beside its files that names all that made it, by content.

A stored document is canonical JSON, so that no byte of it can change unnoticed. Who signed it is known by a key: the
installation's own, or one that the reader was given.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)
from pydantic import BaseModel, ConfigDict, ValidationError

from tuneloom.domain import AdapterRef, Fidelity, Hyperparameters, JobSpec, Setting
from tuneloom.errors import InvalidRequest
from tuneloom.store.base import BlobNotFound, Blobs

LINEAGE_FILE = "lineage.json"
SCHEMA = "tuneloom.lineage/1"
MAX_BYTES = 16 << 20


class Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BaseFacts(Part):
    """`sha256` covers the weights; `files` maps every file of the base to its own."""

    id: str
    sha256: str
    files: dict[str, str]
    tokenizer_sha256: str
    template_sha256: str


class FileFacts(Part):
    id: str
    filename: str
    sha256: str
    size_bytes: int


class OrderFacts(Part):
    """The order in which rows were learned; `sha256` is over the row numbers of all epochs as little-endian int64."""

    rows: int
    epochs: int
    seed: int
    sha256: str


class CodeFacts(Part):
    """`commit` is known in a git checkout only; `sources_sha256` covers the package's own files as they were run."""

    commit: str | None
    sources_sha256: str


class HardwareFacts(Part):
    """`cpu_class` is what torch chooses its kernels by; `gpu` None: computed on the CPU. `workers` share each step."""

    machine: str
    cpu: str
    cpu_class: str
    cpu_flags_sha256: str
    threads: int
    workers: int = 1
    gpu: str | None = None
    cuda: str | None = None


class AdapterFacts(Part):
    sha256: str
    files: dict[str, str]
    rank: int
    size_bytes: int


class Lineage(Part):
    """All that made one adapter. `spec` is what was asked, `settings` what it was resolved to; `parent_sha256` is the
    adapter that training went on from. `fidelity` is None of checkpoints, and where there was no room to compare.
    """

    schema_version: Literal["tuneloom.lineage/1"] = SCHEMA
    kind: Literal["version", "checkpoint"]
    job_id: str
    created_at: float
    method: str
    seed: int
    spec: JobSpec
    resolved: Hyperparameters
    settings: tuple[Setting, ...]
    base: BaseFacts
    training_file: FileFacts
    validation_file: FileFacts | None
    order: OrderFacts
    parent_sha256: str | None
    steps: int
    metrics: dict[str, float]
    fidelity: Fidelity | None
    packages: dict[str, str]
    code: CodeFacts
    hardware: HardwareFacts
    adapter: AdapterFacts


class LineageBroken(InvalidRequest):
    """A lineage does not hold: it was changed, or was never one."""

    code = "lineage_broken"


@dataclass(frozen=True)
class Signed:
    """A lineage whose signature is that of `public_key` (32 bytes)."""

    lineage: Lineage
    key_id: str
    public_key: bytes


def sign(lineage: Lineage, pem: bytes) -> bytes:
    """The document as it is stored. `pem` is an Ed25519 private key.

    Raises:
        InvalidRequest: it is none.
    """
    try:
        key = load_pem_private_key(pem, password=None)
    except (ValueError, TypeError) as error:
        raise InvalidRequest("The signing key is not a PEM private key without a password.") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise InvalidRequest("The signing key is no Ed25519 key. Make one: `openssl genpkey -algorithm ed25519`.")
    public = key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    # Read back once: what a reader sees is what is signed, whatever types were put in.
    plain = Lineage.model_validate_json(lineage.model_dump_json()).model_dump(mode="json")
    document = {
        "algorithm": "ed25519",
        "key_id": key_id(public),
        "lineage": plain,
        "public_key": public.hex(),
    }
    return _canonical({**document, "signature": key.sign(_canonical(document)).hex()})


def read_signed(raw: bytes) -> Signed:
    """The lineage in a stored document. That its signer is somebody to trust is the caller's question.

    Raises:
        LineageBroken: a byte of it is not what was signed.
    """
    try:
        document = json.loads(raw.decode("utf-8"))
        if not isinstance(document, dict) or _canonical(document) != raw:
            raise LineageBroken("The lineage is not as it was written: its JSON is not canonical.")
        signature, public = bytes.fromhex(document.pop("signature")), bytes.fromhex(document["public_key"])
        Ed25519PublicKey.from_public_bytes(public).verify(signature, _canonical(document))
        lineage = Lineage.model_validate(document["lineage"])
        named = document["key_id"]
    except InvalidSignature as error:
        raise LineageBroken("The signature of the lineage does not fit: something in it was changed.") from error
    except ValidationError as error:
        raise LineageBroken(f"The lineage is of another schema than `{SCHEMA}`.") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise LineageBroken("The lineage is not a signed document.") from error
    if document.keys() != {"algorithm", "key_id", "lineage", "public_key"} or named != key_id(public):
        raise LineageBroken("The lineage does not name its key rightly.")
    if _is_otherwise_written(raw, document, signature):
        raise LineageBroken("The lineage is not as it was written: a number is written in another way.")
    return Signed(lineage, named, public)


def _is_otherwise_written(raw: bytes, document: dict[str, Any], signature: bytes) -> bool:
    """Hexadecimal digits have two cases, of which one is written."""
    fields = {"signature": signature.hex(), "public_key": bytes.fromhex(document["public_key"]).hex()}
    return _canonical({**document, **fields}) != raw


def key_id(public_key: bytes) -> str:
    """A short name for a public key of 32 bytes."""
    return hashlib.sha256(public_key).hexdigest()[:16]


def public_key_of(pem: bytes) -> bytes:
    """The 32 bytes of an Ed25519 public key, from the PEM of it or of its private key.

    Raises:
        InvalidRequest: it is neither.
    """
    try:
        private = b"PRIVATE KEY" in pem
        key = load_pem_private_key(pem, password=None).public_key() if private else load_pem_public_key(pem)
    except (ValueError, TypeError) as error:
        raise InvalidRequest("This is not a PEM key without a password.") from error
    if not isinstance(key, Ed25519PublicKey):
        raise InvalidRequest("This is no Ed25519 key.")
    return key.public_bytes(Encoding.Raw, PublicFormat.Raw)


def public_pem(public_key: bytes) -> bytes:
    """A public key as others can be given it."""
    key = Ed25519PublicKey.from_public_bytes(public_key)
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def read_lineage(blobs: Blobs, adapter: AdapterRef) -> bytes | None:
    """The stored document of an adapter, unverified; None for one that was not trained here."""
    try:
        return blobs.read(f"{adapter.uri}/{LINEAGE_FILE}")
    except BlobNotFound:
        return None


def write_lineage(blobs: Blobs, adapter: AdapterRef, raw: bytes) -> None:
    blobs.write(f"{adapter.uri}/{LINEAGE_FILE}", raw)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _canonical(document: dict[str, Any]) -> bytes:
    """One way to write a document: sorted keys, no spaces, UTF-8, numbers as Python writes them."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8")
