"""The life of a job: what may happen to it in each state, and the record that results. Pure; no store, no clock.

`TRANSITIONS` is the whole machine. `apply` is its only reader: an event that the table does not allow is a Conflict
whose code is the state that forbids it.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tuneloom.domain import Estimate, Event, Hyperparameters, Job, JobError, JobState, Setting, Usage, event_id
from tuneloom.errors import Conflict


@dataclass(frozen=True)
class FilesAccepted:
    """The row check has passed. What it resolved and what the run will take."""

    estimate: Estimate | None = None
    settings: tuple[Setting, ...] = ()


@dataclass(frozen=True)
class Waits:
    """The job could not start yet, and `reason` is not what it was told before."""

    reason: str


@dataclass(frozen=True)
class Launched:
    """A new attempt is about to start. Recorded before the effect."""

    at: float


@dataclass(frozen=True)
class Started:
    """The trainer of the current attempt has given its first sign of life."""


@dataclass(frozen=True)
class Advanced:
    """What the trainer says of its progress."""

    trained_tokens: int | None
    estimated_finish: float | None
    resolved: Hyperparameters | None
    settings: tuple[Setting, ...] = ()
    usage: Usage | None = None


@dataclass(frozen=True)
class Yielded:
    """The attempt ended because it was told to, with the job wanted again since."""


@dataclass(frozen=True)
class Lost:
    """The attempt is gone without a last word."""

    usage: Usage | None = None


@dataclass(frozen=True)
class Closed:
    """The last process of a job that wants none is gone."""

    usage: Usage | None = None


@dataclass(frozen=True)
class Published:
    """The attempt's adapter is registered as a Version."""

    at: float
    fine_tuned_model: str
    version_id: str
    result_files: tuple[str, ...]
    trained_tokens: int
    resolved: Hyperparameters
    settings: tuple[Setting, ...] = ()
    usage: Usage | None = None


@dataclass(frozen=True)
class Failed:
    at: float
    error: JobError


@dataclass(frozen=True)
class Cancelled:
    at: float


@dataclass(frozen=True)
class Paused:
    pass


@dataclass(frozen=True)
class Resumed:
    pass


JobEvent = (
    FilesAccepted
    | Waits
    | Launched
    | Started
    | Advanced
    | Yielded
    | Lost
    | Closed
    | Published
    | Failed
    | Cancelled
    | Paused
    | Resumed
)

TRANSITIONS: Mapping[type, Mapping[JobState, JobState]] = {
    FilesAccepted: {"validating_files": "queued"},
    Waits: {"queued": "queued"},
    Launched: {"queued": "queued"},
    # A run started by hand checks its files itself, so its first sign of life may find the job at any stage.
    Started: {"validating_files": "running", "queued": "running"},
    Advanced: {"queued": "queued", "running": "running"},
    Yielded: {"queued": "queued", "running": "queued"},
    Lost: {"validating_files": "validating_files", "queued": "queued", "running": "queued"},
    Closed: {"paused": "paused", "succeeded": "succeeded", "failed": "failed", "cancelled": "cancelled"},
    Published: {"validating_files": "succeeded", "queued": "succeeded", "running": "succeeded"},
    Failed: {"validating_files": "failed", "queued": "failed", "running": "failed"},
    Cancelled: {
        "validating_files": "cancelled",
        "queued": "cancelled",
        "running": "cancelled",
        "paused": "cancelled",
    },
    Paused: {"validating_files": "paused", "queued": "paused", "running": "paused"},
    Resumed: {"paused": "queued"},
}

_VERBS = {Cancelled: "cancelled", Paused: "paused", Resumed: "resumed"}


def apply(job: Job, event: JobEvent) -> Job:
    """The job after `event`.

    Raises:
        Conflict: the state of the job does not allow it; `code` is that state.
    """
    allowed = TRANSITIONS[type(event)]
    if job.state not in allowed:
        verb = _VERBS.get(type(event), type(event).__name__.lower())
        raise Conflict(
            f"Job `{job.id}` is `{job.state}` and cannot be {verb}. That is possible while it is {_either(allowed)}.",
            code=job.state,
        )
    return job.model_copy(update={"state": allowed[job.state], **_changes(job, event)})


def _changes(job: Job, event: JobEvent) -> dict[str, Any]:
    """The fields beside `state` that `event` sets."""
    match event:
        case FilesAccepted(estimate, settings):
            return {"files_checked": True, "estimate": estimate, "settings": settings}
        case Waits(reason):
            return {"waiting_for": reason}
        case Launched(at):
            assert not job.attempt_open, "two attempts of a job at once"
            return {
                "attempt": job.attempt + 1,
                "attempt_open": True,
                "attempt_started_at": at,
                "waiting_for": None,
            }
        case Started():
            return {"files_checked": True}
        case Advanced(trained_tokens, estimated_finish, resolved, settings, usage):
            return _known(
                trained_tokens=trained_tokens,
                estimated_finish=estimated_finish,
                resolved=resolved,
                settings=settings or None,
                usage=usage,
            )
        case Lost(usage):
            return {"attempt_open": False, "losses": job.losses + 1, "estimated_finish": None, **_known(usage=usage)}
        case Yielded():
            return {"attempt_open": False, "estimated_finish": None}
        case Closed(usage):
            return {"attempt_open": False, **_known(usage=usage)}
        case Published(at, fine_tuned_model, version, result_files, trained_tokens, resolved, settings, usage):
            return {
                **_known(settings=settings or None, usage=usage),
                "finished_at": at,
                "estimated_finish": None,
                "fine_tuned_model": fine_tuned_model,
                "version_id": version,
                "result_files": result_files,
                "trained_tokens": trained_tokens,
                "resolved": resolved,
            }
        case Failed(at, error):
            return {"finished_at": at, "estimated_finish": None, "waiting_for": None, "error": error}
        case Cancelled(at):
            return {"finished_at": at, "estimated_finish": None, "waiting_for": None}
        case Paused():
            return {"estimated_finish": None, "waiting_for": None}
        case Resumed():
            return {} if job.files_checked else {"state": "validating_files"}


def _known(**changes: Any) -> dict[str, Any]:
    return {name: value for name, value in changes.items() if value is not None}


class History:
    """Makes the events of one job in order: each is a little later than the one before, even within a microsecond."""

    def __init__(self, job: Job, at: float | None = None) -> None:
        self._job = job
        self._at = time.time() if at is None else at
        self._count = 0

    def line(self, message: str, level: str = "info", data: dict[str, Any] | None = None) -> Event:
        # Ids hold microseconds; two of them keep neighbours apart under float rounding of today's Unix times.
        at = self._at + self._count * 2e-6
        self._count += 1
        return Event.model_validate(
            {
                "id": event_id(at),
                "owner": self._job.owner,
                "job_id": self._job.id,
                "created_at": at,
                "level": level,
                "message": message,
                "data": data,
            }
        )


def _either(states: Mapping[JobState, JobState]) -> str:
    names = [f"`{state}`" for state in states]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
