"""The records of drafting: what rows were asked for, what each drafter has made, and how it ended."""

from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict

from tuneloom.domain.record import Record
from tuneloom.domain.training import JobError

DraftFormat = Literal["chat", "instruction", "text", "preference"]
DraftState = Literal["queued", "running", "succeeded", "failed", "cancelled"]
DraftRole = Literal["standard", "creative", "technical", "adversarial"]
# Why a draft has ended with fewer rows than were asked for, or at all.
DraftEnd = Literal["target", "cancelled", "budget", "time_limit", "exhausted", "provider", "lost"]

ROLE_TEMPERATURES: dict[DraftRole, float] = {
    "standard": 0.7,
    "creative": 1.0,
    "technical": 0.5,
    "adversarial": 0.9,
}


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RowLength(_Value):
    """Bounds of all text of a row together. None: none."""

    min_chars: int | None = None
    max_chars: int | None = None
    min_words: int | None = None
    max_words: int | None = None


class DraftPrice(_Value):
    """Per million tokens, as the provider's settings had it when the draft was created."""

    input: float
    output: float
    currency: str

    def cost(self, input_tokens: int, output_tokens: int) -> float:
        return (input_tokens * self.input + output_tokens * self.output) / 1e6


class DraftSpec(_Value):
    """What was asked for. `roles` has one for each drafter; `seeds` is the blob of the seed rows, JSON Lines."""

    description: str
    format: DraftFormat
    rows: int
    roles: tuple[DraftRole, ...]
    provider: str
    model: str
    max_output_tokens: int
    seed: int
    topics: tuple[str, ...] = ()
    seed_file: str | None = None
    seed_rows: int = 0
    seeds: str | None = None
    language: str | None = None
    length: RowLength = RowLength()
    similarity: float | None = 0.8
    max_tokens: int | None = None
    max_cost: float | None = None
    time_limit_s: float
    price: DraftPrice | None = None


class DraftCounts(_Value):
    """Rows of a drafter, or of a draft: `kept` + all of `dropped` is `received`. `dropped` goes by reason."""

    calls: int = 0
    requested: int = 0
    received: int = 0
    repaired: int = 0
    kept: int = 0
    dropped: dict[str, int] = {}
    input_tokens: int = 0
    output_tokens: int = 0

    def __add__(self, other: "DraftCounts") -> "DraftCounts":
        dropped = dict(self.dropped)
        for reason, count in other.dropped.items():
            dropped[reason] = dropped.get(reason, 0) + count
        names = ("calls", "requested", "received", "repaired", "kept", "input_tokens", "output_tokens")
        return DraftCounts(dropped=dropped, **{name: getattr(self, name) + getattr(other, name) for name in names})

    @property
    def tokens(self) -> int:
        return self.input_tokens + self.output_tokens


class DraftBatch(_Value):
    """Rows of one reply, stored whole. Its blob is written before the drafter's record names it."""

    blob: str
    rows: int
    at: float


class Drafter(Record):
    """One of a draft's drafters. Created and closed by control, written by its process while that runs.

    It is the fence: each commit of a process replaces this record at the revision that it wrote last; rows count once
    `batches` names them. A new `attempt`, or a close, replaces it first, so that a zombie fails at its next write.
    `heartbeat_at` is None until the attempt of `launched_at` has begun, which may wait for room in the cluster.
    `quota` is the rows that it should make in all; `token_limit` and `cost_limit` what it may spend. `reserved` are the
    tokens of a call under way: an attempt that is lost has spent them. `model_version` is what the provider said.
    """

    collection: ClassVar[str] = "drafters"
    draft_id: str
    number: int
    role: DraftRole
    quota: int
    state: Literal["waiting", "running", "done", "failed", "closed"] = "waiting"
    attempt: int = 0
    losses: int = 0
    launched_at: float | None = None
    heartbeat_at: float | None = None
    batches: tuple[DraftBatch, ...] = ()
    counts: DraftCounts = DraftCounts()
    token_limit: int | None = None
    cost_limit: float | None = None
    reserved_input: int = 0
    reserved_output: int = 0
    model_version: str | None = None
    outcome: Literal["quota", "budget", "exhausted"] | None = None
    error: JobError | None = None

    @property
    def handle(self) -> str:
        """Of the current attempt; deterministic, so that a launch can be repeated."""
        return f"{self.id}-a{self.attempt}"

    @property
    def is_over(self) -> bool:
        return self.state in ("done", "failed", "closed")


class DrafterReport(_Value):
    """What stays of a drafter when its draft has ended."""

    number: int
    role: DraftRole
    state: str
    losses: int
    counts: DraftCounts
    outcome: str | None = None
    model_version: str | None = None
    error: JobError | None = None


class Draft(Record):
    """A File of rows in the making. The API creates it and asks for its end; control does the rest.

    `key_id` is that of the key that asked, if one did.

    `is_open`: control has something left to do for it, which is so a moment longer than its `state` is not terminal.
    `target_file` is the id that its File gets; `file_id` is set once there is one. `counts` are those of all drafters
    with what fell out between them. `round` counts how often drafters were asked for what was still missing.
    """

    collection: ClassVar[str] = "drafts"
    spec: DraftSpec
    created_at: float
    target_file: str
    key_id: str = ""
    state: DraftState = "queued"
    is_open: bool = True
    cancel_requested_at: float | None = None
    started_at: float | None = None
    finished_at: float | None = None
    round: int = 0
    partial: bool = False
    ended_by: DraftEnd | None = None
    rows: int = 0
    counts: DraftCounts = DraftCounts()
    drafters: tuple[DrafterReport, ...] = ()
    file_id: str | None = None
    provenance: dict[str, Any] | None = None
    error: JobError | None = None

    @property
    def is_terminal(self) -> bool:
        return self.state in ("succeeded", "failed", "cancelled")
