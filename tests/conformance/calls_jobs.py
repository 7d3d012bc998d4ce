"""Calls of `fine_tuning.jobs`: what happens to jobs, and what a finished one leaves."""

import csv
import io
import time
from typing import Any

import openai
from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent
from openai.types.fine_tuning.jobs import FineTuningJobCheckpoint

from tests.conformance.session import Session, fails, holds, is_a, more, rows, same, wait_for

SUFFIX = "conform"
EPOCHS = 2
BATCH = 4
STEPS = 24 * EPOCHS // BATCH
JOB_TIMEOUT_S = 600.0
CHECK_TIMEOUT_S = 180.0


def jobs_create(session: Session) -> None:
    file, validation = session.earlier("file"), session.earlier("validation")
    hyperparameters: Any = {"n_epochs": EPOCHS, "batch_size": BATCH, "learning_rate_multiplier": "auto"}
    job = session.client.fine_tuning.jobs.create(
        model=session.base,
        training_file=file.id,
        validation_file=validation.id,
        suffix=SUFFIX,
        seed=7,
        metadata={"team": "blue", "run": "first"},
        method={"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
    )
    is_a(job, FineTuningJob)
    holds("id", job.id.startswith("ftjob-"), job.id)
    same("object and status", (job.object, job.status), ("fine_tuning.job", "validating_files"))
    same("model", (job.model, job.fine_tuned_model), (session.base, None))
    same("files", (job.training_file, job.validation_file, job.result_files), (file.id, validation.id, []))
    same("seed and metadata", (job.seed, job.metadata), (7, {"team": "blue", "run": "first"}))
    same("organization_id", job.organization_id, session.owner)
    same("error and finished_at", (job.error, job.finished_at), (None, None))
    assert job.method is not None and job.method.supervised is not None
    assert job.method.supervised.hyperparameters is not None
    same("method", (job.method.type, job.method.supervised.hyperparameters.n_epochs), ("supervised", EPOCHS))
    same("hyperparameters", job.hyperparameters.to_dict(), hyperparameters)
    same("user_provided_suffix", more(job, "user_provided_suffix"), SUFFIX)
    session.made["job"] = job


def files_delete_in_use(session: Session) -> None:
    file, job = session.earlier("file"), session.earlier("job")
    error = fails(openai.ConflictError, lambda: session.client.files.delete(file.id), code="file_in_use")
    holds("the message names the job", job.id in error.message, error.message)
    same("the file is still there", session.client.files.retrieve(file.id), file)


def jobs_create_hyperparameters(session: Session) -> None:
    job = session.client.fine_tuning.jobs.create(
        model=session.base,
        training_file=session.earlier("file").id,
        hyperparameters={"n_epochs": 1},
        metadata={"team": "red"},
    )
    same("n_epochs", job.hyperparameters.n_epochs, 1)
    same("batch_size", job.hyperparameters.batch_size, "auto")
    assert job.method is not None and job.method.supervised is not None
    same(
        "method",
        job.method.supervised.hyperparameters,
        type(job.method.supervised.hyperparameters)(n_epochs=1, batch_size="auto", learning_rate_multiplier="auto"),
    )
    holds("a seed is chosen", isinstance(job.seed, int), job.seed)
    session.made["second job"] = job


def jobs_create_own_options(session: Session) -> None:
    jobs = session.client.fine_tuning.jobs
    job = jobs.create(
        model=session.base,
        training_file=session.earlier("file").id,
        extra_body={"tuneloom": {"rank": 4, "learning_rate": 1e-3}},
    )
    ours = more(job, "tuneloom")
    same("rank and learning_rate", (ours["options"]["rank"], ours["options"]["learning_rate"]), (4, 1e-3))
    same("status after cancelling", jobs.cancel(job.id).status, "cancelled")
    session.made["third job"] = job


def jobs_retrieve(session: Session) -> None:
    job = session.earlier("job")
    found = session.client.fine_tuning.jobs.retrieve(job.id)
    is_a(found, FineTuningJob)
    same("the job", (found.id, found.created_at, found.seed), (job.id, job.created_at, job.seed))


def jobs_list(session: Session) -> None:
    page = session.client.fine_tuning.jobs.list()
    is_a(page.data[0], FineTuningJob)
    same("ids", [job.id for job in page.data], _newest_first(session))
    same("has_more", page.has_more, False)


def jobs_list_paging(session: Session) -> None:
    page = session.client.fine_tuning.jobs.list(limit=1)
    same("items of the first page", (len(page.data), page.has_more), (1, True))
    same("ids over all pages", [job.id for job in page], _newest_first(session))


def jobs_list_after(session: Session) -> None:
    newest, *rest = _newest_first(session)
    same("ids", [job.id for job in session.client.fine_tuning.jobs.list(after=newest, limit=10)], rest)


def jobs_list_metadata(session: Session) -> None:
    jobs = session.client.fine_tuning.jobs
    same("ids", [job.id for job in jobs.list(metadata={"team": "blue"})], [session.earlier("job").id])
    both = {"team": "blue", "run": "second"}
    same("ids of a filter that fits none", list(jobs.list(metadata=both)), [])


def jobs_pause(session: Session) -> None:
    job = session.client.fine_tuning.jobs.pause(session.earlier("second job").id)
    is_a(job, FineTuningJob)
    same("status", job.status, "paused")
    same("status when read", session.client.fine_tuning.jobs.retrieve(job.id).status, "paused")


def jobs_resume(session: Session) -> None:
    job = session.client.fine_tuning.jobs.resume(session.earlier("second job").id)
    holds("status", job.status in ("validating_files", "queued", "running"), job.status)


def jobs_cancel(session: Session) -> None:
    job = session.client.fine_tuning.jobs.cancel(session.earlier("second job").id)
    is_a(job, FineTuningJob)
    same("status", job.status, "cancelled")
    holds("finished_at", job.finished_at and job.finished_at >= job.created_at, job.finished_at)
    same("model", job.fine_tuned_model, None)


def jobs_cancel_again(session: Session) -> None:
    _conflict(session, session.earlier("second job").id, "cancelled")


def jobs_failed(session: Session) -> None:
    bad = rows(11) + b'{"messages": [{"role": "alien", "content": "hello"}]}\n'
    file = session.client.files.create(file=("bad.jsonl", bad), purpose="fine-tune")
    created = session.client.fine_tuning.jobs.create(model=session.base, training_file=file.id)
    job = _wait_until_over(session, created.id, CHECK_TIMEOUT_S)
    same("status", job.status, "failed")
    assert job.error is not None
    same("code and param", (job.error.code, job.error.param), ("invalid_training_file", "training_file"))
    holds("the message names line 12", "12" in job.error.message, job.error.message)
    levels = [event.level for event in session.client.fine_tuning.jobs.list_events(job.id)]
    holds("an event of the level `error`", "error" in levels, levels)


def jobs_create_unknown_file(session: Session) -> None:
    create = session.client.fine_tuning.jobs.create
    fails(
        openai.BadRequestError,
        lambda: create(model=session.base, training_file="file-none"),
        param="training_file",
        code="invalid_training_file",
    )


def jobs_create_unknown_base(session: Session) -> None:
    file = session.earlier("file").id
    create = session.client.fine_tuning.jobs.create
    fails(openai.NotFoundError, lambda: create(model="no-such-base", training_file=file), code="model_not_found")


def jobs_create_bad_hyperparameter(session: Session) -> None:
    file = session.earlier("file").id
    create = session.client.fine_tuning.jobs.create
    error = fails(
        openai.BadRequestError,
        lambda: create(model=session.base, training_file=file, hyperparameters={"n_epochs": 0}),
        code="invalid_value",
    )
    holds("param", "n_epochs" in (error.param or ""), error.param)


def jobs_create_unsupported(session: Session) -> None:
    file = session.earlier("file").id
    create = session.client.fine_tuning.jobs.create
    wandb: Any = [{"type": "wandb", "wandb": {"project": "x"}}]
    fails(
        openai.BadRequestError,
        lambda: create(model=session.base, training_file=file, integrations=wandb),
        code="unsupported_parameter",
        param="integrations",
    )


def jobs_succeeded(session: Session) -> None:
    asked = session.earlier("job")
    job = _wait_until_over(session, asked.id, JOB_TIMEOUT_S)
    same("status", (job.status, job.error), ("succeeded", None))
    session.made["finished"] = job
    prefix = f"ft:{session.base}:{session.owner}:{SUFFIX}:"
    holds("fine_tuned_model", (job.fine_tuned_model or "").startswith(prefix), job.fine_tuned_model)
    holds("trained_tokens", (job.trained_tokens or 0) > 0, job.trained_tokens)
    holds("finished_at", (job.finished_at or 0) >= job.created_at, job.finished_at)
    same("result_files", len(job.result_files), 1)
    same("n_epochs and batch_size", (job.hyperparameters.n_epochs, job.hyperparameters.batch_size), (EPOCHS, BATCH))
    multiplier = job.hyperparameters.learning_rate_multiplier
    holds("learning_rate_multiplier is a number", isinstance(multiplier, int | float), multiplier)
    same("what was asked", (job.seed, job.metadata), (asked.seed, asked.metadata))


def jobs_events(session: Session) -> None:
    job = session.earlier("finished")
    page = session.client.fine_tuning.jobs.list_events(job.id, limit=2)
    same("items of the first page", (len(page.data), page.has_more), (2, True))
    events = list(page)
    is_a(events[0], FineTuningJobEvent)
    same("ids that come twice", len(events) - len({event.id for event in events}), 0)
    times = [event.created_at for event in events]
    same("times, newest first", times, sorted(times, reverse=True))
    messages = [event.message for event in events]
    for part in (
        "Created fine-tuning job",
        "Files validated",
        "Fine-tuning job started",
        "New fine-tuned model created",
    ):
        holds(f"an event that says `{part}`", any(part in message for message in messages), messages)
    same("the first event", messages[-1], f"Created fine-tuning job: {job.id}")
    session.made["events"] = events


def jobs_metrics(session: Session) -> None:
    metrics = [event for event in reversed(session.earlier("events")) if event.type == "metrics"]
    same("steps", [event.data["step"] for event in metrics], list(range(1, STEPS + 1)))
    last = metrics[-1].data
    holds("train_loss", all(isinstance(event.data["train_loss"], float) for event in metrics), last)
    same("total_steps", last["total_steps"], STEPS)
    for name in ("train_mean_token_accuracy", "full_valid_loss", "full_valid_mean_token_accuracy"):
        holds(f"`{name}` of the last step", isinstance(last.get(name), int | float), last)
    holds("the message", metrics[-1].message.startswith(f"Step {STEPS}/{STEPS}: training loss="), metrics[-1].message)


def jobs_checkpoints(session: Session) -> None:
    job = session.earlier("finished")
    page = session.client.fine_tuning.jobs.checkpoints.list(job.id)
    checkpoints = list(page)
    holds("at least one", checkpoints, checkpoints)
    first = checkpoints[0]
    is_a(first, FineTuningJobCheckpoint)
    same("object and job", (first.object, first.fine_tuning_job_id), ("fine_tuning.job.checkpoint", job.id))
    steps = [checkpoint.step_number for checkpoint in checkpoints]
    same("steps, newest first", steps, sorted(steps, reverse=True))
    for checkpoint in checkpoints:
        name = f"{job.fine_tuned_model}:ckpt-step-{checkpoint.step_number}"
        same("name", checkpoint.fine_tuned_model_checkpoint, name)
        same("metrics.step", checkpoint.metrics.step, checkpoint.step_number)
        holds("metrics.train_loss", isinstance(checkpoint.metrics.train_loss, float), checkpoint.metrics)
    by_one = [checkpoint.id for checkpoint in session.client.fine_tuning.jobs.checkpoints.list(job.id, limit=1)]
    same("ids over all pages", by_one, [checkpoint.id for checkpoint in checkpoints])
    session.made["checkpoint"] = first


def jobs_result_file(session: Session) -> None:
    id = session.earlier("finished").result_files[0]
    file = session.client.files.retrieve(id)
    same("purpose", file.purpose, "fine-tune-results")
    table = list(csv.DictReader(io.StringIO(session.client.files.content(id).text)))
    columns = ["step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy"]
    same("columns", list(table[0]), columns)
    same("steps", [row["step"] for row in table], [str(step) for step in range(1, STEPS + 1)])
    holds("train_loss is a number in each row", all(float(row["train_loss"]) >= 0 for row in table))
    holds("valid_loss somewhere", any(row["valid_loss"] for row in table), table[-1])


def jobs_cancel_finished(session: Session) -> None:
    _conflict(session, session.earlier("finished").id, "succeeded")


def jobs_create_on_tuned(session: Session) -> None:
    name, file = session.earlier("finished").fine_tuned_model, session.earlier("file").id
    jobs = session.client.fine_tuning.jobs
    job = jobs.create(model=name, training_file=file)
    is_a(job, FineTuningJob)
    same("model", job.model, name)
    same("status once cancelled", jobs.cancel(job.id).status, "cancelled")
    fails(openai.NotFoundError, lambda: jobs.create(model=f"{name}x", training_file=file), param="model")


def _conflict(session: Session, job_id: str, code: str) -> None:
    """Cancelling is refused, and the client, which retries conflicts, is told not to."""
    started = time.monotonic()
    error = fails(openai.ConflictError, lambda: session.client.fine_tuning.jobs.cancel(job_id), code=code)
    same("x-should-retry", error.response.headers.get("x-should-retry"), "false")
    same("tries", error.response.request.headers.get("x-stainless-retry-count"), "0")
    holds("the message names the job", job_id in error.message, error.message)
    holds("answered at once", time.monotonic() - started < 30)


def _wait_until_over(session: Session, job_id: str, timeout_s: float) -> Any:
    def over() -> Any:
        job = session.client.fine_tuning.jobs.retrieve(job_id)
        return job if job.status in ("succeeded", "failed", "cancelled") else None

    return wait_for(f"the end of {job_id}", over, timeout_s, every_s=1.0)


def _newest_first(session: Session) -> list[str]:
    return [session.earlier(name).id for name in ("third job", "second job", "job")]
