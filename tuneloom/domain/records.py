"""The records of the store.

Every record is frozen; a change is a new record written against the revision that was read. Times are Unix
seconds (float), sizes are bytes. The field `id` is the document id in the record's collection.
"""

from typing import Any, ClassVar, Literal

from pydantic import Field

from tuneloom.domain.record import Record
from tuneloom.domain.training import Estimate, Fidelity, Hyperparameters, JobError, JobSpec, Setting, Usage
from tuneloom.domain.values import AdapterRef


class File(Record):
    """A data set, immutable. `blob` is its key in the blob store. A deleted file keeps no record.

    `provenance` tells how its rows came to be, where they were not uploaded: drafted, or edited from another file.
    """

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
    provenance: dict[str, Any] | None = None


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


class FileCheck(Record):
    """A check of files without a job. Its id is made of the owner and of `spec`, whose files, base and options count.

    `report` is what the check found, and what a run on these files would do.
    """

    collection: ClassVar[str] = "file_checks"
    spec: JobSpec
    created_at: float
    status: Literal["running", "completed"] = "running"
    finished_at: float | None = None
    report: dict[str, Any] | None = None


JobState = Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
TERMINAL: frozenset[str] = frozenset({"succeeded", "failed", "cancelled"})
UNFINISHED: tuple[JobState, ...] = ("validating_files", "queued", "running", "paused")


class Job(Record):
    """One training run. Only the API (intent) and control's reconcile write it; the trainer never does.

    `requested_model` is the name as the caller gave it (an alias perhaps). `attempt` counts launches, 0 before the
    first; `attempt_open` says that a process of the latest attempt may still be alive, whatever `state` is.
    `files_checked` is set when the row check has passed. `waiting_for` is what a queued job was last told.
    `self_launched` marks a run started by hand (`ray job submit -- python -m tuneloom.train`), which control adopts and
    never launches itself.
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
    waiting_for: str | None = None
    self_launched: bool = False
    resolved: Hyperparameters | None = None
    settings: tuple[Setting, ...] = ()
    estimate: Estimate | None = None
    usage: Usage | None = None
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
    are in the events, so that a resumed run does not repeat them. `seconds` counts what all attempts have trained,
    `starts` their processes, `memory_bytes` the most that one of them held. `outcome` is the trainer's last word.
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
    settings: tuple[Setting, ...] = ()
    seconds: float = 0.0
    starts: int = 0
    memory_bytes: int = 0
    outcome: Literal["published", "paused", "cancelled", "failed"] | None = None
    error: JobError | None = None


class Speed(Record):
    """How fast a job ran that was never interrupted; its id is the job id. Estimates of later jobs are made from it.

    `kind` names what speed depends on: base, method, number formats, device. Of `seconds`, `fixed_s` went by before
    the first step and after the last, scoring apart. `evaluated_tokens` are all that were scored; `is_recomputed`:
    activations were computed twice. `estimated_s` is what had been estimated from other jobs.
    """

    collection: ClassVar[str] = "speeds"
    kind: str
    created_at: float
    tokens: int
    evaluated_tokens: int
    steps: int
    is_recomputed: bool = False
    seconds: float
    fixed_s: float
    memory_bytes: int
    estimated_s: float | None = None


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
    metrics: dict[str, float] = Field(default_factory=dict)


class Model(Record):
    """What an owner calls by name. `id` is `model_id(owner, name)`; `active` is the number of the active Version."""

    collection: ClassVar[str] = "models"
    name: str
    base: str
    created_at: float
    next_version: int = 1
    active: int | None = None


class Version(Record):
    """One immutable adapter of a Model. `ft_name` is OpenAI's spelling of it, unique over all owners.

    `fidelity_note` tells why its `fidelity` is none, or not that with the base as it is served.
    """

    collection: ClassVar[str] = "versions"
    model: str
    number: int
    base: str
    ft_name: str
    adapter: AdapterRef
    created_at: float
    job_id: str | None = None
    metrics: dict[str, float] = Field(default_factory=dict)
    fidelity: Fidelity | None = None
    fidelity_note: str | None = None

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


class Repeat(Record):
    """What a create answered, so that its repetition answers the same. See `control.repeat`.

    `retry_count` is that of the request that wrote the row: 0 for a first try.
    """

    collection: ClassVar[str] = "repeats"
    request_sha256: str
    result_id: str
    created_at: float
    retry_count: int = 0
