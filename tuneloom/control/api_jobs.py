"""`/v1/fine_tuning` on the wire: jobs, their events and checkpoints."""

import random
import time
from collections.abc import Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tuneloom.control import files, jobs, models, repeat
from tuneloom.control.body import digest, identify, parse, read_json, retry_count
from tuneloom.control.context import ApiContext, caller, in_thread, query_int
from tuneloom.control.job_body import CreateJob, check_supported, hyperparameters_of, method_of
from tuneloom.control.jobs import History, JobEvent
from tuneloom.control.pages import read_page
from tuneloom.control.retry import retry
from tuneloom.domain import (
    Checkpoint,
    Event,
    File,
    Job,
    JobSpec,
    JobState,
    TrainOptions,
    check_model_name,
    check_settings_agree,
    model_id,
    model_name,
    new_id,
)
from tuneloom.errors import Conflict, InvalidFile, InvalidRequest, ModelNotFound, NotFound, UnsupportedParameter
from tuneloom.store.base import Write
from tuneloom.store.names import find_named, find_start
from tuneloom.store.records import Stored, Table


class JobsApi:
    """Each method is one endpoint."""

    def __init__(self, context: ApiContext) -> None:
        self._context = context
        self._records = context.store.records

    def routes(self) -> list[Route]:
        jobs_path = "/v1/fine_tuning/jobs"
        permissions = "/v1/fine_tuning/checkpoints/{name:path}/permissions"
        return [
            Route(jobs_path, self.create, methods=["POST"]),
            Route(jobs_path, self.list_jobs, methods=["GET"]),
            Route(jobs_path + "/{id}", self.retrieve, methods=["GET"]),
            Route(jobs_path + "/{id}/cancel", self.cancel, methods=["POST"]),
            Route(jobs_path + "/{id}/pause", self.pause, methods=["POST"]),
            Route(jobs_path + "/{id}/resume", self.resume, methods=["POST"]),
            Route(jobs_path + "/{id}/events", self.events, methods=["GET"]),
            Route(jobs_path + "/{id}/checkpoints", self.checkpoints, methods=["GET"]),
            Route(permissions, self.permissions, methods=["GET", "POST"]),
            Route(permissions + "/{permission}", self.permissions, methods=["DELETE"]),
        ]

    async def create(self, request: Request) -> Response:
        owner = caller(request, "training").owner
        raw = await read_json(request, self._context.settings.gateway.max_body_bytes)
        job = await in_thread(self._create, request, owner, raw)
        self._context.poke()
        return JSONResponse(show_job(job))

    def _create(self, request: Request, owner: str, raw: bytes) -> Job:
        body = parse(CreateJob, raw)
        check_supported(body)
        base, start = self._base_of(owner, body.model), body.tuneloom and body.tuneloom.warm_start
        spec = JobSpec(
            base=base,
            training_file=body.training_file,
            validation_file=body.validation_file or None,
            suffix=self._check_suffix(body.suffix),
            seed=random.SystemRandom().randrange(2**31) if body.seed is None else body.seed,
            method=method_of(body),
            hyperparameters=hyperparameters_of(body),
            options=self._check_options(body),
            warm_start=None if start is None else find_start(self._records, owner, start, base),
            metadata=body.metadata,
        )
        check_settings_agree(spec)

        def make() -> tuple[str, Job, list[Write]]:
            needed = self._files_of(owner, spec)
            self._check_base(owner, spec)
            now = time.time()
            job = Job(id=new_id("ftjob-"), owner=owner, spec=spec, requested_model=body.model, created_at=now)
            history = History(job, now)
            lines = [history.line(f"Created fine-tuning job: {job.id}")]
            lines += [history.line(f"Validating {kind} file: {file.value.id}") for kind, file in needed.items() if file]
            # The files are written unchanged: deleting one at this moment then conflicts instead of slipping through.
            guards = {file.value.id: file for file in needed.values() if file}
            writes: list[Write] = [self._records.files.replace(file, file.value) for file in guards.values()]
            writes += [self._records.events.create(line) for line in lines]
            return job.id, job, [self._records.jobs.create(job), *writes]

        asked = identify(request, owner, digest(raw))
        return repeat.create_once(self._records, asked, make, lambda id: self._get(owner, id).value)

    async def list_jobs(self, request: Request) -> Response:
        return JSONResponse(await in_thread(self._list, request, caller(request, "training").owner))

    def _list(self, request: Request, owner: str) -> dict[str, Any]:
        wanted = {
            name.removeprefix("metadata[").removesuffix("]"): value
            for name, value in request.query_params.multi_items()
            if name.startswith("metadata[") and name.endswith("]")
        }
        # `metadata=null` asks for the jobs that have none.
        bare = request.query_params.get("metadata") == "null"

        def keep(job: Job) -> bool:
            metadata = job.spec.metadata or {}
            return not (bare and metadata) and all(metadata.get(key) == value for key, value in wanted.items())

        after = request.query_params.get("after")
        page = read_page(
            self._records.jobs,
            {"owner": owner},
            order_by="created_at",
            limit=query_int(request, "limit", 20, 1, 1000),
            after=self._get(owner, after).value if after else None,
            keep=keep,
        )
        return page.body(show_job)

    async def retrieve(self, request: Request) -> Response:
        owner = caller(request, "training").owner
        stored = await in_thread(self._get, owner, request.path_params["id"])
        return JSONResponse(show_job(stored.value))

    async def cancel(self, request: Request) -> Response:
        return await self._intend(request, lambda: jobs.Cancelled(time.time()), "cancelled", ("cancelled",))

    async def pause(self, request: Request) -> Response:
        return await self._intend(request, jobs.Paused, "paused", ("paused",))

    async def resume(self, request: Request) -> Response:
        return await self._intend(request, jobs.Resumed, "resumed", ("validating_files", "queued", "running"))

    async def _intend(
        self, request: Request, event: Callable[[], JobEvent], participle: str, done: tuple[JobState, ...]
    ) -> Response:
        """Apply what the owner wants of a job; a client's retry of what was done already finds it done."""
        owner, id = caller(request, "training").owner, request.path_params["id"]
        again = retry_count(request) > 0

        def once() -> Job:
            stored = self._get(owner, id)
            try:
                after = jobs.apply(stored.value, event())
            except Conflict:
                if again and stored.value.state in done:
                    return stored.value
                raise
            line = History(after).line(f"The job was {participle}")
            self._records.commit(self._records.jobs.replace(stored, after), self._records.events.create(line))
            return after

        job = await in_thread(retry, once)
        self._context.poke()
        return JSONResponse(show_job(job))

    async def events(self, request: Request) -> Response:
        owner = caller(request, "training").owner
        limit = query_int(request, "limit", 20, 1, 1000)
        show = await in_thread(self._page_of, request, owner, self._records.events, "id", limit, show_event)
        return JSONResponse(show)

    async def checkpoints(self, request: Request) -> Response:
        owner = caller(request, "training").owner
        limit = query_int(request, "limit", 10, 1, 1000)
        show = await in_thread(self._page_of, request, owner, self._records.checkpoints, "step", limit, show_checkpoint)
        return JSONResponse(show)

    def _page_of(
        self,
        request: Request,
        owner: str,
        table: Table[Any],
        order_by: str,
        limit: int,
        show: Callable[[Any], dict[str, Any]],
    ) -> dict[str, Any]:
        """A page of what belongs to the job of the path, newest first."""
        job = self._get(owner, request.path_params["id"]).value
        cursor = None
        if after := request.query_params.get("after"):
            stored = table.find(after)
            if stored is None or stored.value.job_id != job.id:
                raise NotFound(f"The job has no item `{after[:80]}` to go on after.", param="after")
            cursor = stored.value
        return read_page(table, {"job_id": job.id}, order_by=order_by, limit=limit, after=cursor).body(show)

    async def permissions(self, request: Request) -> Response:
        caller(request, "training")
        raise UnsupportedParameter(
            "Checkpoint permissions are not supported: a checkpoint can be used by its owner only.", param=None
        )

    def _get(self, owner: str, id: str) -> Stored[Job]:
        stored = self._records.jobs.find(id)
        if stored is None or stored.value.owner != owner:
            raise NotFound(f"Could not find fine tune: {id[:200]}", param="id", code="fine_tune_not_found")
        return stored

    def _base_of(self, owner: str, name: str) -> str:
        base = self._context.find_base(name)
        if base is not None:
            return base.id
        found = find_named(self._records, owner, name)
        if found is not None and found.model is not None:
            raise UnsupportedParameter(
                f"`{name}` is a fine-tuned model. To train on from it, use its base, `{found.model.value.base}`, and "
                f"`{name}` as `tuneloom.warm_start`.",
                param="model",
            )
        raise ModelNotFound.named(name[:512])

    def _check_suffix(self, suffix: str | None) -> str | None:
        if suffix is None:
            return None
        self._context.check_free_name(check_model_name(suffix), param="suffix")
        return suffix

    def _check_base(self, owner: str, spec: JobSpec) -> None:
        if spec.suffix is not None:
            existing = self._records.models.find(model_id(owner, spec.suffix))
            if existing is not None:
                models.check_same_base(existing.value, spec.base)

    def _check_options(self, body: CreateJob) -> TrainOptions:
        """The options, within what the engine of the base can serve afterwards."""
        options = body.tuneloom or TrainOptions()
        limit = self._context.get_base(body.model).engine.max_rank
        if options.rank is not None and options.rank > limit:
            raise InvalidRequest(
                f"Invalid `tuneloom.rank`: {options.rank} is above the largest rank that is served: {limit}.",
                param="tuneloom.rank",
            )
        return options

    def _files_of(self, owner: str, spec: JobSpec) -> dict[str, Stored[File] | None]:
        return {
            "training": self._file(owner, spec.training_file, "training_file"),
            "validation": self._file(owner, spec.validation_file, "validation_file") if spec.validation_file else None,
        }

    def _file(self, owner: str, id: str, param: str) -> Stored[File]:
        stored = files.find_file(self._records, owner, id, time.time())
        if stored is None:
            raise InvalidFile(f"`{param}`: there is no file `{id[:200]}`. Upload it first.", param=param)
        if stored.value.purpose != "fine-tune":
            raise InvalidFile(
                f"`{param}`: the file `{id}` has the purpose `{stored.value.purpose}`. "
                "Upload it with the purpose `fine-tune`.",
                param=param,
            )
        return stored


def show_job(job: Job) -> dict[str, Any]:
    """A job as the clients know it. `model` is the name that was asked for; `tuneloom` has what is only ours."""
    hyperparameters = (job.resolved or job.spec.hyperparameters).model_dump(mode="json", exclude_none=True)
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": int(job.created_at),
        "finished_at": _seconds(job.finished_at),
        "estimated_finish": _seconds(job.estimated_finish),
        "model": job.requested_model,
        "fine_tuned_model": job.fine_tuned_model,
        "organization_id": job.owner,
        "status": job.state,
        "trained_tokens": job.trained_tokens,
        "training_file": job.spec.training_file,
        "validation_file": job.spec.validation_file,
        "result_files": list(job.result_files),
        "seed": job.spec.seed,
        "hyperparameters": hyperparameters,
        "method": {"type": job.spec.method, job.spec.method: {"hyperparameters": hyperparameters}},
        "integrations": [],
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
        },
    }


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
