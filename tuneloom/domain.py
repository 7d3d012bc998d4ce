"""What tuneloom keeps: the records of the store and the words for them. No I/O, no rules of any layer above.

Every record is frozen; a change is a new record written against the revision that was read. Times are Unix
seconds (float), sizes are bytes. The field `id` is the document id in the record's collection.
"""

import hashlib
import hmac
import re
import secrets
import string
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from tuneloom.errors import InvalidRequest, PermissionDenied

LOCAL_OWNER = "local"

# The context of a base whose config names none: a recurrent one has no longest position.
DEFAULT_CONTEXT_LENGTH = 2048

Scope = Literal["inference", "training", "admin"]
ALL_SCOPES: tuple[Scope, ...] = ("inference", "training", "admin")

_BASE62 = string.digits + string.ascii_letters


class Record(BaseModel):
    """A document of the store: frozen, strict about unknown fields, owned by somebody."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    collection: ClassVar[str]

    id: str
    owner: str


class AdapterRef(BaseModel):
    """An immutable adapter by content.

    `sha256` hashes its files (see `adapter_sha256`); `uri` is the blob prefix that holds them; `rank` is the largest
    rank of any module; `size_bytes` is the size of the weights file.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    sha256: str
    uri: str
    rank: int
    size_bytes: int


class Principal(BaseModel):
    """Who calls: the owner whose things they may touch, the key that proved it, and what it may do."""

    model_config = ConfigDict(frozen=True)
    owner: str
    key_id: str
    scopes: tuple[Scope, ...]

    def require(self, scope: Scope) -> None:
        """Raise PermissionDenied unless the key has the scope; `admin` holds every scope."""
        if scope not in self.scopes and "admin" not in self.scopes:
            raise PermissionDenied(f"This key lacks the scope `{scope}`. Use a key that was created with it.")


class Target(BaseModel):
    """Where a call goes: a base, and one immutable adapter or none. `name` is what the caller asked for."""

    model_config = ConfigDict(frozen=True)
    name: str
    base: str
    adapter: AdapterRef | None = None
    version: str | None = None


class File(Record):
    """An uploaded data set, immutable. `blob` is its key in the blob store. A deleted file keeps no record."""

    collection: ClassVar[str] = "files"
    filename: str
    purpose: str
    size_bytes: int
    sha256: str
    blob: str
    created_at: float
    expires_at: float | None = None
    status: Literal["uploaded", "processed", "error"] = "processed"
    status_details: str | None = None


class Upload(Record):
    """A file that arrives in parts. `file_id` is set once it is completed."""

    collection: ClassVar[str] = "uploads"
    filename: str
    purpose: str
    size_bytes: int
    mime_type: str
    created_at: float
    expires_at: float
    file_expires_after_s: int | None = None
    status: Literal["pending", "completed", "cancelled", "expired"] = "pending"
    file_id: str | None = None


class UploadPart(Record):
    collection: ClassVar[str] = "upload_parts"
    upload_id: str
    created_at: float
    size_bytes: int
    blob: str


class Hyperparameters(BaseModel):
    """OpenAI's three; `auto` until resolved from the data and the base before the run starts."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    n_epochs: int | Literal["auto"] = "auto"
    batch_size: int | Literal["auto"] = "auto"
    learning_rate_multiplier: float | Literal["auto"] = "auto"


class TrainOptions(BaseModel):
    """Our own settings, the request object `tuneloom`. None means: resolved when the job starts."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    rank: int | None = Field(None, ge=1, le=128)
    alpha: float | None = Field(None, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: tuple[str, ...] | None = None
    learning_rate: float | None = Field(None, gt=0, le=1)
    max_length: int | None = Field(None, ge=8)
    checkpoint_every_steps: int | None = Field(None, ge=1)
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    loss_on: Literal["answers", "all"] = "answers"


class JobSpec(BaseModel):
    """What was asked of a job. Frozen: a rerun of the job trains exactly this."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    base: str
    training_file: str
    validation_file: str | None = None
    suffix: str | None = None
    seed: int
    method: Literal["supervised"] = "supervised"
    hyperparameters: Hyperparameters = Hyperparameters()
    options: TrainOptions = TrainOptions()
    metadata: dict[str, str] | None = None


class JobError(BaseModel):
    """Why a job failed: one true sentence for people, one code for programs."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    code: str
    message: str
    param: str | None = None


JobState = Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
TERMINAL: frozenset[str] = frozenset({"succeeded", "failed", "cancelled"})


class Job(Record):
    """One training run. Only the API (intent) and control's reconcile write it; the trainer never does.

    `requested_model` is the name as the caller gave it (an alias perhaps). `attempt` counts launches, 0 before the
    first; `attempt_open` says that a process of the latest attempt may still be alive, whatever `state` is.
    `files_checked` is set when the row check has passed. `self_launched` marks a run started by hand
    (`ray job submit -- python -m tuneloom.train`), which control adopts and never launches itself.
    """

    collection: ClassVar[str] = "jobs"
    spec: JobSpec
    requested_model: str
    created_at: float
    state: JobState = "validating_files"
    files_checked: bool = False
    attempt: int = 0
    attempt_open: bool = False
    attempt_started_at: float | None = None
    losses: int = 0
    self_launched: bool = False
    resolved: Hyperparameters | None = None
    estimated_finish: float | None = None
    finished_at: float | None = None
    trained_tokens: int | None = None
    fine_tuned_model: str | None = None
    version_id: str | None = None
    result_files: tuple[str, ...] = ()
    error: JobError | None = None

    @property
    def is_terminal(self) -> bool:
        return self.state in TERMINAL

    @property
    def submission_id(self) -> str:
        """The launcher's handle of the current attempt; deterministic, so a restarted control finds it again."""
        return f"{self.id}-a{self.attempt}"

    @property
    def artifacts(self) -> str:
        """Blob prefix of the current attempt. The trainer writes `manifest.json` there last."""
        return f"jobs/{self.id}/a{self.attempt}"


class Progress(Record):
    """What the trainer says of itself; its id is the job id. Created by control with the launch of an attempt.

    It is the fence: each commit of a trainer replaces this record at the revision that the trainer wrote last. A new
    attempt replaces it first, so that a zombie fails at its next write. `logged_step` is the last step whose metrics
    are in the events, so that a resumed run does not repeat them. `outcome` is the trainer's last word.
    """

    collection: ClassVar[str] = "progress"
    attempt: int
    heartbeat_at: float
    stage: str = "launching"
    step: int = 0
    logged_step: int = 0
    total_steps: int | None = None
    trained_tokens: int = 0
    estimated_finish: float | None = None
    resolved: Hyperparameters | None = None
    outcome: Literal["published", "paused", "cancelled", "failed"] | None = None
    error: JobError | None = None


class Event(Record):
    """One line of a job's history. Its id sorts by time (see `event_id`)."""

    collection: ClassVar[str] = "events"
    job_id: str
    created_at: float
    level: Literal["info", "warn", "error"] = "info"
    message: str
    type: Literal["message", "metrics"] = "message"
    data: dict[str, Any] | None = None


class Checkpoint(Record):
    """A callable state of a run at a step. `name` is `{ft name}:ckpt-step-{step}`, whole and final from the start."""

    collection: ClassVar[str] = "checkpoints"
    job_id: str
    base: str
    step: int
    name: str
    created_at: float
    adapter: AdapterRef
    metrics: dict[str, float] = {}


class Model(Record):
    """What an owner calls by name. `id` is `model_id(owner, name)`; `active` is the number of the active Version."""

    collection: ClassVar[str] = "models"
    name: str
    base: str
    created_at: float
    next_version: int = 1
    active: int | None = None


class Version(Record):
    """One immutable adapter of a Model. `ft_name` is OpenAI's spelling of it, unique over all owners."""

    collection: ClassVar[str] = "versions"
    model: str
    number: int
    base: str
    ft_name: str
    adapter: AdapterRef
    created_at: float
    job_id: str | None = None
    metrics: dict[str, float] = {}

    @property
    def pinned_name(self) -> str:
        return f"{self.model}@v{self.number}"


class Registration(Record):
    """Uniqueness row: a job (its id) has made exactly one Version."""

    collection: ClassVar[str] = "registrations"
    version_id: str


class AdapterPin(Record):
    """An operator's wish that all replicas of a base keep an adapter. `id` is the adapter's sha256; `name` is what
    was asked to be pinned.
    """

    collection: ClassVar[str] = "adapter_pins"
    base: str
    name: str
    adapter: AdapterRef
    created_at: float


class ApiKey(Record):
    """A key without its secret. `id` is public; `hash` is the keyed hash of the secret and is looked up by equality."""

    collection: ClassVar[str] = "keys"
    name: str
    hash: str
    redacted: str
    scopes: tuple[Scope, ...]
    created_at: float
    expires_at: float | None = None
    revoked_at: float | None = None


class Repeat(Record):
    """What a create answered, so that its repetition answers the same. See `control.repeat`.

    `retry_count` is that of the request that wrote the row: 0 for a first try.
    """

    collection: ClassVar[str] = "repeats"
    request_sha256: str
    result_id: str
    created_at: float
    retry_count: int = 0


def new_id(prefix: str, length: int = 24) -> str:
    """A fresh random id such as `file-4uXk...`: `prefix` with its separator, then base-62 characters."""
    return prefix + "".join(secrets.choice(_BASE62) for _ in range(length))


def event_id(at_s: float) -> str:
    """An id that sorts by time to the microsecond, unique among writers of the same microsecond."""
    return f"ftevent-{int(at_s * 1_000_000):016x}{secrets.token_hex(4)}"


MODEL_NAME = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?")
RESERVED_NAMES = frozenset({"base", "ft", "tuneloom", "v1", "models", "admin", "active", "latest"})


def check_model_name(name: str, *, param: str = "suffix") -> str:
    """Return `name` if it may name a Model: 1-64 of `a-z 0-9 . _ -`, starting and ending with a letter or digit.

    Raises:
        InvalidRequest: it may not; the message says why.
    """
    if not MODEL_NAME.fullmatch(name) or ".." in name:
        raise InvalidRequest(
            f"Invalid `{param}`: {name[:80]!r}. Use 1 to 64 lower-case letters, digits, `.`, `_` or `-`, "
            "starting and ending with a letter or digit.",
            param=param,
        )
    if name in RESERVED_NAMES:
        raise InvalidRequest(f"`{name}` is a reserved name. Choose another `{param}`.", param=param)
    return name


def model_name(spec: JobSpec, job_id: str) -> str:
    """The Model that a job publishes to: its suffix, or a name of its own made from the job id."""
    return spec.suffix or f"ft-{short_id(job_id).lower()}"


def model_id(owner: str, name: str) -> str:
    return f"{owner}:{name}"


def version_id(owner: str, name: str, number: int) -> str:
    return f"{owner}:{name}:v{number}"


def short_id(job_id: str) -> str:
    """Eight characters that stand for a job in names."""
    digest = int.from_bytes(hashlib.sha256(job_id.encode()).digest()[:8])
    chars = []
    for _ in range(8):
        digest, remainder = divmod(digest, 62)
        chars.append(_BASE62[remainder])
    return "".join(chars)


def ft_name(base: str, owner: str, suffix: str | None, unique: str) -> str:
    """OpenAI's spelling of a Version: `ft:{base}:{owner}:{suffix}:{unique}`, empty suffix allowed."""
    return f"ft:{base}:{owner}:{suffix or ''}:{unique}"


def checkpoint_name(ft: str, step: int) -> str:
    return f"{ft}:ckpt-step-{step}"


def adapter_sha256(files: dict[str, str]) -> str:
    """The content hash of an adapter from `{file name: sha256 hex}`; independent of order."""
    digest = hashlib.sha256()
    for name, sha256 in sorted(files.items()):
        digest.update(f"{name}\0{sha256}\n".encode())
    return digest.hexdigest()


def hash_secret(pepper: bytes, secret: str) -> str:
    """The keyed hash under which a key's secret is stored: HMAC-SHA256, hex."""
    return hmac.new(pepper, secret.encode(), hashlib.sha256).hexdigest()
