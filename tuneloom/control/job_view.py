"""Jobs, events and checkpoints as the clients see them: OpenAI's objects, with what is only ours under `tuneloom`."""

from typing import Any

from tuneloom.control.estimate import error_of
from tuneloom.control.integrations import show_integrations
from tuneloom.control.line import ITS_TURN, Place
from tuneloom.domain import Checkpoint, Event, Job, model_name


def show_job(job: Job, place: Place | None = None) -> dict[str, Any]:
    """`model` is the name that was asked for; `place` is where the job stands in the line, if it waits there."""
    hyperparameters = (job.resolved or job.spec.hyperparameters).model_dump(mode="json", exclude_none=True)
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": int(job.created_at),
        "finished_at": _seconds(job.finished_at),
        "estimated_finish": _seconds(place.ends_at if place else job.estimated_finish),
        "model": job.requested_model,
        "fine_tuned_model": job.fine_tuned_model,
        "organization_id": job.owner,
        "status": job.state,
        "trained_tokens": job.trained_tokens,
        "training_file": job.spec.training_file,
        "validation_file": job.spec.validation_file,
        "result_files": list(job.result_files),
        "seed": job.spec.seed,
        "hyperparameters": {name: value for name, value in hyperparameters.items() if name != "beta"},
        "method": {"type": job.spec.method, job.spec.method: {"hyperparameters": hyperparameters}},
        "integrations": show_integrations(job.spec.wandb),
        "metadata": job.spec.metadata,
        "error": None if job.error is None else job.error.model_dump(),
        "user_provided_suffix": job.spec.suffix,
        "tuneloom": {
            "base": job.spec.base,
            "name": model_name(job.spec, job.id),
            "version": job.version_id.rpartition(":v")[2] if job.version_id else None,
            "attempt": job.attempt,
            "losses": job.losses,
            "options": job.spec.options.model_dump(mode="json"),
            "settings": [setting.model_dump(mode="json") for setting in job.settings],
            "queue": _show_place(job, place),
            "estimate": job.estimate.model_dump(mode="json") if job.estimate else None,
            "usage": _show_usage(job),
        },
    }


def _show_place(job: Job, place: Place | None) -> dict[str, Any] | None:
    if place is None:
        return None
    # Control judges a job at its next tick; until then its turn is all there is to wait for.
    waiting_for = job.waiting_for or ITS_TURN
    return {"position": place.position, "waiting_for": waiting_for, "starts_at": _seconds(place.starts_at)}


def _show_usage(job: Job) -> dict[str, Any] | None:
    if job.usage is None:
        return None
    error = error_of(job.estimate, job.usage) if job.state == "succeeded" else None
    return {**job.usage.model_dump(mode="json"), "estimate_error": error}


def show_event(event: Event) -> dict[str, Any]:
    return {
        "id": event.id,
        "object": "fine_tuning.job.event",
        "created_at": int(event.created_at),
        "level": event.level,
        "message": event.message,
        "type": event.type,
        "data": event.data,
    }


def show_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "id": checkpoint.id,
        "object": "fine_tuning.job.checkpoint",
        "created_at": int(checkpoint.created_at),
        "fine_tuning_job_id": checkpoint.job_id,
        "fine_tuned_model_checkpoint": checkpoint.name,
        "step_number": checkpoint.step,
        "metrics": {"step": checkpoint.step, **checkpoint.metrics},
    }


def _seconds(at: float | None) -> int | None:
    return None if at is None else int(at)
