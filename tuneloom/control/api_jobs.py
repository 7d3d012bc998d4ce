"""`/v1/fine_tuning` on the wire: jobs, their events and checkpoints."""

import time
from collections.abc import Callable, Iterable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tuneloom.control import audit, first_key, jobs, outbox, owner_limits, repeat
from tuneloom.control.api_keys import show_made
from tuneloom.control.body import digest, identify, parse, read_json, retry_count
from tuneloom.control.context import ApiContext, caller, in_thread, query_int
from tuneloom.control.job_body import CreateJob
from tuneloom.control.job_usage import job_over
from tuneloom.control.job_view import show_checkpoint, show_event, show_job
from tuneloom.control.jobs import History, JobEvent
from tuneloom.control.keys import Minted
from tuneloom.control.line import Place
from tuneloom.control.new_job import NewJobs
from tuneloom.control.pages import read_page
from tuneloom.control.queue import is_waiting, read_places
from tuneloom.control.retry import retry
from tuneloom.control.turns import OwnerLocks
from tuneloom.domain import ApiKey, Job, JobState, Principal, model_name
from tuneloom.errors import Conflict, NotFound, UnsupportedParameter
from tuneloom.store.base import Write
from tuneloom.store.records import Stored, Table


class JobsApi:
    """Each method is one endpoint."""

    def __init__(self, context: ApiContext) -> None:
        self._context = context
        self._records = context.store.records
        self._new = NewJobs(context)
        self._locks = OwnerLocks()

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
        who = caller(request, "training")
        raw = await read_json(request, self._context.settings.gateway.max_body_bytes)
        async with self._locks.of(who.owner):
            job, key = await in_thread(self._create, request, who, raw)
        self._context.poke()
        shown = await in_thread(self._show, job)
        if key is None:
            return JSONResponse(shown)
        shown["tuneloom"]["key"] = show_made(key)
        return JSONResponse(shown, headers={"cache-control": "no-store"})

    def _create(self, request: Request, who: Principal, raw: bytes) -> tuple[Job, Minted | ApiKey | None]:
        owner, body = who.owner, parse(CreateJob, raw)
        spec, wants_key = self._new.spec(who, body), body.tuneloom is not None and body.tuneloom.first_key
        actor, pepper = audit.actor_of(request), self._context.pepper

        def make() -> tuple[str, tuple[Job, Minted | ApiKey | None], list[Write]]:
            job, writes = self._new.draft(owner, spec, body.model, self._max_queued(request))
            data = {"model": body.model, "training_file": spec.training_file, "method": spec.method}
            writes.append(audit.of_job(actor, job, "created", data))
            if not wants_key:
                return job.id, (job, None), writes
            key, more = first_key.draft(self._records, pepper, who, job, actor)
            return job.id, (job, key), [*writes, *more]

        def find(id: str) -> tuple[Job, Minted | ApiKey | None]:
            job = self._get(who, id).value
            return job, first_key.again(self._records, pepper, job, actor) if wants_key else None

        return repeat.create_once(self._records, identify(request, owner, digest(raw)), make, find)

    async def list_jobs(self, request: Request) -> Response:
        return JSONResponse(await in_thread(self._list, request, caller(request, "training")))

    def _list(self, request: Request, who: Principal) -> dict[str, Any]:
        wanted = {
            name.removeprefix("metadata[").removesuffix("]"): value
            for name, value in request.query_params.multi_items()
            if name.startswith("metadata[") and name.endswith("]")
        }
        # `metadata=null` asks for the jobs that have none.
        bare = request.query_params.get("metadata") == "null"

        def keep(job: Job) -> bool:
            metadata = job.spec.metadata or {}
            is_wanted = not (bare and metadata) and all(metadata.get(key) == value for key, value in wanted.items())
            return is_wanted and who.may_use(model_name(job.spec, job.id))

        after = request.query_params.get("after")
        page = read_page(
            self._records.jobs,
            {"owner": who.owner},
            order_by="created_at",
            limit=query_int(request, "limit", 20, 1, 1000),
            after=self._get(who, after).value if after else None,
            keep=keep,
        )
        places = self._places(page.items)
        return page.body(lambda job: show_job(job, places.get(job.id)))

    async def retrieve(self, request: Request) -> Response:
        who = caller(request, "training")
        return JSONResponse(await in_thread(lambda: self._show(self._get(who, request.path_params["id"]).value)))

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
        who, id = caller(request, "training"), request.path_params["id"]
        again = retry_count(request) > 0

        def once() -> Job:
            stored = self._get(who, id)
            try:
                after = jobs.apply(stored.value, event())
            except Conflict:
                if again and stored.value.state in done:
                    return stored.value
                raise
            line = History(after).line(f"The job was {participle}")
            now = time.time()
            told = outbox.job_ended(self._records, stored.value, after, now)
            entry = audit.of_job(audit.actor_of(request), after, participle)
            used = job_over(self._records, stored.value, after, now)
            writes = [self._records.jobs.replace(stored, after), self._records.events.create(line), entry]
            if participle == "resumed":
                writes.append(self._new.place_in_queue(who.owner, self._max_queued(request)))
            self._records.commit(*writes, *told, *used)
            return after

        async with self._locks.of(who.owner):
            job = await in_thread(retry, once)
        self._context.poke()
        return JSONResponse(await in_thread(self._show, job))

    async def events(self, request: Request) -> Response:
        who = caller(request, "training")
        limit = query_int(request, "limit", 20, 1, 1000)
        show = await in_thread(self._page_of, request, who, self._records.events, "id", limit, show_event)
        return JSONResponse(show)

    async def checkpoints(self, request: Request) -> Response:
        who = caller(request, "training")
        limit = query_int(request, "limit", 10, 1, 1000)
        show = await in_thread(self._page_of, request, who, self._records.checkpoints, "step", limit, show_checkpoint)
        return JSONResponse(show)

    def _page_of(
        self,
        request: Request,
        who: Principal,
        table: Table[Any],
        order_by: str,
        limit: int,
        show: Callable[[Any], dict[str, Any]],
    ) -> dict[str, Any]:
        """A page of what belongs to the job of the path, newest first."""
        job = self._get(who, request.path_params["id"]).value
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

    def _max_queued(self, request: Request) -> int | None:
        allowance = owner_limits.allowance_of(self._context.settings, self._records, caller(request))
        return allowance.max_queued_jobs

    def _show(self, job: Job) -> dict[str, Any]:
        return show_job(job, self._places([job]).get(job.id))

    def _places(self, shown: Iterable[Job]) -> dict[str, Place]:
        """Where each job stands in the line, if one of those that are shown waits there."""
        if not any(is_waiting(job) for job in shown):
            return {}
        return read_places(self._records, self._context.settings.train, time.time())

    def _get(self, who: Principal, id: str) -> Stored[Job]:
        stored = self._records.jobs.find(id)
        job = stored.value if stored else None
        if stored is None or job is None or job.owner != who.owner or not who.may_use(model_name(job.spec, job.id)):
            raise NotFound(f"Could not find fine tune: {id[:200]}", param="id", code="fine_tune_not_found")
        return stored
