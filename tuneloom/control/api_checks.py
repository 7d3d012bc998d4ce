"""`/v1/tuneloom/files/{id}/check` on the wire: what there is to say of files before a job trains on them."""

import time
from typing import Any, Literal

import anyio
from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tuneloom.control import files
from tuneloom.control.body import Body, digest, parse, read_json
from tuneloom.control.context import ApiContext, caller, in_thread
from tuneloom.control.file_checks import FAILURES
from tuneloom.domain import File, FileCheck, JobSpec, TrainOptions, check_settings_agree
from tuneloom.errors import InvalidFile, InvalidRequest, RateLimited
from tuneloom.store.base import StoreConflict

# How long a call waits for the report before it answers that the check goes on.
WAIT_S = 8.0
POLL_S = 0.2
RETRY_AFTER_S = 2
MAX_RUNNING_PER_OWNER = 4
# A check that failed itself is told for so long before it is tried again.
FAILURE_MEMORY_S = 30.0
OPTIONS = ("max_length", "long_rows", "loss_on", "validation_share")


class CheckFile(Body):
    """`seed` is that of the job: it says which rows a `validation_share` holds out."""

    model: str
    validation_file: str | None = None
    method: Literal["supervised", "dpo"] = "supervised"
    seed: int = Field(0, ge=0, le=2**31 - 1)
    tuneloom: TrainOptions = TrainOptions()


class ChecksApi:
    def __init__(self, context: ApiContext, *, wait_s: float = WAIT_S) -> None:
        self._context = context
        self._records = context.store.records
        self._wait_s = wait_s

    def routes(self) -> list[Route]:
        return [Route("/v1/tuneloom/files/{id}/check", self.check, methods=["POST"])]

    async def check(self, request: Request) -> Response:
        """The report, or 202 while it is made; the same call again then finds it."""
        owner, id = caller(request, "training").owner, request.path_params["id"]
        raw = await read_json(request, self._context.settings.gateway.max_body_bytes)
        found = await self.find(owner, await in_thread(self._spec, owner, id, raw))
        if found.status == "running":
            return JSONResponse(_show(found), status_code=202, headers={"Retry-After": str(RETRY_AFTER_S)})
        return JSONResponse(_show(found))

    async def find(self, owner: str, spec: JobSpec) -> FileCheck:
        """The check of the files of `spec`, done before if it can be, else perhaps still running after a while."""
        until = time.monotonic() + self._wait_s
        found = await in_thread(self._ask, owner, spec)
        if found.status == "running":
            self._context.poke()
        while found.status == "running" and time.monotonic() < until:
            await anyio.sleep(POLL_S)
            stored = await in_thread(self._records.file_checks.find, found.id)
            found = found if stored is None else stored.value
        return found

    def _ask(self, owner: str, spec: JobSpec) -> FileCheck:
        """The check that was asked for, under way or done."""
        now, table = time.time(), self._records.file_checks
        wanted = FileCheck(
            id=f"filecheck-{digest(owner, spec.model_dump_json())[:32]}", owner=owner, spec=spec, created_at=now
        )
        stored = table.find(wanted.id)
        if stored is not None and not _is_stale(stored.value, now):
            return stored.value
        running = {"owner": owner, "status": "running"}
        if len(table.query(running, limit=MAX_RUNNING_PER_OWNER)) >= MAX_RUNNING_PER_OWNER:
            raise RateLimited(
                f"{MAX_RUNNING_PER_OWNER} checks of your files are under way. Wait for one to end.",
                retry_after_s=RETRY_AFTER_S,
            )
        try:
            self._records.commit(table.create(wanted) if stored is None else table.replace(stored, wanted))
        except StoreConflict:
            # The same call at the same moment was first.
            return table.get(wanted.id).value
        return wanted

    def _spec(self, owner: str, id: str, raw: bytes) -> JobSpec:
        body = parse(CheckFile, raw)
        training = files.get_file(self._records, owner, id).value
        _check_purpose(training, "id")
        if body.validation_file is not None:
            validation = files.find_file(self._records, owner, body.validation_file, time.time())
            if validation is None:
                raise InvalidFile(
                    f"`validation_file`: there is no file `{body.validation_file[:200]}`. Upload it first.",
                    param="validation_file",
                )
            _check_purpose(validation.value, "validation_file")
        for name in sorted(body.tuneloom.model_fields_set - set(OPTIONS)):
            listed = ", ".join(f"`{option}`" for option in OPTIONS)
            raise InvalidRequest(
                f"`tuneloom.{name}` changes nothing of what a check finds. Use {listed}.", param=f"tuneloom.{name}"
            )
        spec = JobSpec(
            base=self._context.get_base(body.model).id,
            training_file=id,
            validation_file=body.validation_file,
            seed=body.seed,
            method=body.method,
            options=body.tuneloom,
        )
        check_settings_agree(spec)
        return spec


def _check_purpose(file: File, param: str) -> None:
    if file.purpose != "fine-tune":
        raise InvalidFile(
            f"The file `{file.id}` has the purpose `{file.purpose}`. Upload it with the purpose `fine-tune`.",
            param=param,
        )


def _is_stale(check: FileCheck, now: float) -> bool:
    """Whether it failed itself, a while ago."""
    error = (check.report or {}).get("error") or {}
    return error.get("code") in FAILURES and now - (check.finished_at or now) > FAILURE_MEMORY_S


def _show(check: FileCheck) -> dict[str, Any]:
    return {
        "object": "file.check",
        "status": check.status,
        "model": check.spec.base,
        "training_file": check.spec.training_file,
        "validation_file": check.spec.validation_file,
        **{name: value for name, value in (check.report or {}).items() if name != "planned"},
    }
