"""What was used, on the wire: OpenAI's pages for admins, and an owner's own with what OpenAI's lack."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tuneloom.control.context import ApiContext, caller, in_thread
from tuneloom.control.usage import WIDTHS, Bucket, Question, ask
from tuneloom.domain import Amounts, UsageKind
from tuneloom.errors import InvalidRequest, MissingParameter, UnknownParameter
from tuneloom.store.records import Records

# Beyond what a Unix time can be in centuries.
MAX_TIME = 99_999_999_999
MAX_VALUES = 100
LINE_ITEM, BATCH = "line_item", "batch"


@dataclass(frozen=True)
class Report:
    """One of the pages. `limits` are, by width, how many buckets a page has without `limit`, and at most.

    `same`: what OpenAI can group by that is the same for all that is counted here.
    """

    kinds: tuple[UsageKind, ...]
    limits: Mapping[str, tuple[int, int]]
    groups: tuple[str, ...]
    filters: Mapping[str, str]
    show: Callable[[Mapping[str, Any], Amounts, str], dict[str, Any]]
    same: Mapping[str, Any] = field(default_factory=dict)


def _show_completions(group: Mapping[str, Any], amounts: Amounts, currency: str) -> dict[str, Any]:
    return {
        "object": "organization.usage.completions.result",
        "input_tokens": amounts.input_tokens,
        "input_cached_tokens": amounts.cached_tokens,
        "output_tokens": amounts.output_tokens,
        "input_audio_tokens": 0,
        "output_audio_tokens": 0,
        "num_model_requests": amounts.requests,
        **{name: group.get(name) for name in COMPLETIONS.groups},
    }


def _show_costs(group: Mapping[str, Any], amounts: Amounts, currency: str) -> dict[str, Any]:
    return {
        "object": "organization.costs.result",
        "amount": None if amounts.cost is None else {"value": amounts.cost, "currency": currency.lower()},
        **{name: group.get(name) for name in COSTS.groups},
        "quantity": None,
        "quantity_unit": None,
    }


def _show_own(group: Mapping[str, Any], amounts: Amounts, currency: str) -> dict[str, Any]:
    return {
        "object": "tuneloom.usage.result",
        "num_model_requests": amounts.requests,
        "input_tokens": amounts.input_tokens,
        "input_cached_tokens": amounts.cached_tokens,
        "output_tokens": amounts.output_tokens,
        "trained_tokens": amounts.trained_tokens,
        "device_seconds": amounts.device_s,
        "cost": amounts.cost,
        "currency": currency,
        **{name: group.get(name) for name in OWN.groups},
    }


EVERYTHING: tuple[UsageKind, ...] = ("inference", "training", "drafting")
PAGES = {"1h": (24, 168), "1d": (7, 31)}
OWNERS = {"project_ids": "project_id", "user_ids": "user_id"}
SAME_SOURCE = {"api_source": "unlabeled"}
COMPLETIONS = Report(
    ("inference",),
    PAGES,
    ("project_id", "user_id", "api_key_id", "model", BATCH, "service_tier", "api_source"),
    {**OWNERS, "api_key_ids": "api_key_id", "models": "model"},
    _show_completions,
    {BATCH: False, "service_tier": "default", **SAME_SOURCE},
)
COSTS = Report(
    EVERYTHING,
    {"1d": (7, 180)},
    (LINE_ITEM, "project_id", "user_id", "api_key_id", "api_source"),
    {**OWNERS, "api_key_ids": "api_key_id", "line_items": LINE_ITEM},
    _show_costs,
    SAME_SOURCE,
)
OWN = Report(
    EVERYTHING,
    PAGES,
    ("api_key_id", "model", "base", "job_id", "kind"),
    {"api_key_ids": "api_key_id", "models": "model", "job_ids": "job_id", "kinds": "kind"},
    _show_own,
)


class UsageApi:
    """Each method is one endpoint."""

    def __init__(self, context: ApiContext) -> None:
        self._records: Records = context.store.records
        self._currency = context.settings.train.currency

    def routes(self) -> list[Route]:
        return [
            Route("/v1/organization/usage/completions", self.completions, methods=["GET"]),
            Route("/v1/organization/costs", self.costs, methods=["GET"]),
            Route("/v1/tuneloom/usage", self.own, methods=["GET"]),
        ]

    async def completions(self, request: Request) -> Response:
        caller(request, "admin")
        return await self._answer(request, COMPLETIONS)

    async def costs(self, request: Request) -> Response:
        caller(request, "admin")
        return await self._answer(request, COSTS)

    async def own(self, request: Request) -> Response:
        return await self._answer(request, OWN, caller(request, "account").owner)

    async def _answer(self, request: Request, report: Report, owner: str | None = None) -> Response:
        question = _read(request, report, owner)
        same = {name: report.same[name] for name in _read_groups(request, report) if name in report.same}
        buckets, rest = await in_thread(ask, self._records, question)
        body = {
            "object": "page",
            "data": [self._show(bucket, report, same) for bucket in buckets],
            "has_more": rest is not None,
            "next_page": None if rest is None else f"page_{rest}",
        }
        return JSONResponse(body)

    def _show(self, bucket: Bucket, report: Report, same: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "object": "bucket",
            "start_time": bucket.start,
            "end_time": bucket.end,
            "results": [report.show({**group, **same}, amounts, self._currency) for group, amounts in bucket.groups],
        }


def _read(request: Request, report: Report, owner: str | None) -> Question:
    lists = {"group_by", *report.filters}
    known = (
        {"start_time", "end_time", "bucket_width", "limit", "page"}
        | lists
        | report.same.keys() & {BATCH}
        | {f"{name}[]" for name in lists}
    )
    for name in request.query_params:
        if name not in known:
            listed = ", ".join(f"`{one}`" for one in sorted(known) if "[" not in one)
            raise UnknownParameter(f"Unknown parameter: `{name[:100]}`. Use some of {listed}.", param=name[:100])
    width = _read_width(request, report)
    default, most = report.limits[width]
    start, end = _read_times(request)
    start = _read_page(request, start, end, WIDTHS[width])
    limit = _read_number(request, "limit", default, 1, most)
    only = {field: values for name, field in report.filters.items() if (values := _read_list(request, name))}
    owners = {value for name in OWNERS.values() for value in only.get(name, ())}
    return Question(
        start=start,
        end=end,
        width=WIDTHS[width],
        limit=limit,
        group_by=tuple(name for name in _read_groups(request, report) if name not in report.same),
        only=only,
        kinds=() if _wants_batches(request) else report.kinds,
        # One owner's rows are found without reading those of others.
        owner=owner if owner is not None else min(owners) if len(owners) == 1 else None,
    )


def _read_width(request: Request, report: Report) -> str:
    width = request.query_params.get("bucket_width", "1d")
    if width in report.limits:
        return width
    listed = " or ".join(f"`{known}`" for known in report.limits)
    why = "; usage is kept by the hour" if width == "1m" else ""
    raise InvalidRequest(f"Invalid `bucket_width`: {width[:40]!r}. Use {listed}{why}.", param="bucket_width")


def _read_times(request: Request) -> tuple[int, int]:
    if "start_time" not in request.query_params:
        raise MissingParameter("Missing required parameter: `start_time`, in Unix seconds.", param="start_time")
    start = _read_number(request, "start_time", 0, 0, MAX_TIME)
    end = _read_number(request, "end_time", int(time.time()) + 1, 0, MAX_TIME)
    if "end_time" in request.query_params and end <= start:
        raise InvalidRequest("Invalid `end_time`: it must be later than `start_time`.", param="end_time")
    return start, end


def _read_page(request: Request, start: int, end: int, width: int) -> int:
    """Where the page begins: `start`, or where the cursor says."""
    page = request.query_params.get("page")
    if page is None:
        return start
    text = page.removeprefix("page_")
    at = int(text) if page.startswith("page_") and text.isascii() and text.isdecimal() and len(text) < 12 else -1
    if at % width or not start < at < end + width:
        raise InvalidRequest(
            f"Invalid `page`: {page[:40]!r}. Send the `next_page` of an answer, with the same parameters.", param="page"
        )
    return at


def _read_groups(request: Request, report: Report) -> tuple[str, ...]:
    groups = _read_list(request, "group_by")
    for name in groups:
        if name not in report.groups:
            listed = ", ".join(f"`{known}`" for known in report.groups)
            raise InvalidRequest(f"Invalid `group_by`: {name[:40]!r}. Use some of {listed}.", param="group_by")
    return tuple(dict.fromkeys(groups))


def _wants_batches(request: Request) -> bool:
    """Whether only calls of batches are asked for, of which there are none."""
    text = request.query_params.get(BATCH, "false")
    if text.lower() not in ("true", "false"):
        raise InvalidRequest(f"Invalid `batch`: {text[:40]!r}. Use `true` or `false`.", param=BATCH)
    return text.lower() == "true"


def _read_list(request: Request, name: str) -> list[str]:
    """Values given as `name[]=a&name[]=b`, or without the brackets."""
    values = [*request.query_params.getlist(name), *request.query_params.getlist(f"{name}[]")]
    if len(values) > MAX_VALUES:
        raise InvalidRequest(f"`{name}` takes up to {MAX_VALUES} values.", param=name)
    return values


def _read_number(request: Request, name: str, default: int, low: int, high: int) -> int:
    text = request.query_params.get(name)
    if text is None:
        return default
    number = int(text) if text.isascii() and text.isdecimal() and len(text) <= len(str(high)) else -1
    if not low <= number <= high:
        raise InvalidRequest(f"Invalid `{name}`: {text[:40]!r}. Use a whole number from {low} to {high}.", param=name)
    return number
