"""`/v1/tuneloom/estimate` on the wire: what a job would take, without creating it."""

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tuneloom.control.api_checks import RETRY_AFTER_S, ChecksApi
from tuneloom.control.body import parse, read_json
from tuneloom.control.check import CheckReport
from tuneloom.control.context import ApiContext, caller, in_thread
from tuneloom.control.estimate import DOES_NOT_FIT, Estimator
from tuneloom.control.job_body import CreateJob
from tuneloom.control.new_job import NewJobs
from tuneloom.domain import JobSpec, Principal
from tuneloom.errors import InvalidFile, InvalidRequest


class EstimateApi:
    def __init__(self, context: ApiContext, checks: ChecksApi) -> None:
        self._context = context
        self._checks = checks
        self._new = NewJobs(context)
        self._estimator = Estimator(context.store.records, context.settings.train)

    def routes(self) -> list[Route]:
        return [Route("/v1/tuneloom/estimate", self.estimate, methods=["POST"])]

    async def estimate(self, request: Request) -> Response:
        """The estimate for the body of a job, or 202 while its files are read; the same call again then finds it."""
        who = caller(request, "training")
        raw = await read_json(request, self._context.settings.gateway.max_body_bytes)
        spec = await in_thread(self._spec, who, raw)
        check = await self._checks.find(who.owner, spec)
        if check.status == "running":
            body = {"object": "estimate", "status": "running", "model": spec.base}
            return JSONResponse(body, status_code=202, headers={"Retry-After": str(RETRY_AFTER_S)})
        return JSONResponse(await in_thread(self._show, spec, CheckReport.model_validate(check.report)))

    def _spec(self, who: Principal, raw: bytes) -> JobSpec:
        body = parse(CreateJob, raw)
        spec = self._new.spec(who, body)
        self._new.files_of(who.owner, spec)
        # A seed by chance would make each call another question; so would what changes no estimate.
        return spec.model_copy(update={"seed": body.seed or 0, "suffix": None, "metadata": None, "wandb": ()})

    def _show(self, spec: JobSpec, report: CheckReport) -> dict[str, Any]:
        """Raises InvalidFile or InvalidRequest with what would have failed the job."""
        if not report.ok or report.planned is None:
            error = report.error
            text = error.message if error else "The files could not be checked. Try again later."
            raise InvalidFile(text, param=error.param if error else None, code=error.code if error else None)
        if report.planned.refusal is not None:
            raise InvalidRequest(report.planned.refusal, code=DOES_NOT_FIT)
        found = self._estimator.estimate(spec, report.planned)
        return {
            "object": "estimate",
            "status": "completed",
            "model": spec.base,
            "rows": report.rows,
            "estimate": found.model_dump(mode="json"),
            "currency": self._context.settings.train.currency if found.cost is not None else None,
            "message": self._estimator.describe(found),
            "settings": [setting.model_dump(mode="json") for setting in report.planned.settings],
        }
