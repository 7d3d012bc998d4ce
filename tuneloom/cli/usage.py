"""`tuneloom usage`: what was used, from the store itself, so that it also works when nothing runs."""

import time
from typing import TYPE_CHECKING, Annotated

import typer

from tuneloom.cli.session import open_store, print_json, print_rows, read_settings
from tuneloom.errors import InvalidRequest

if TYPE_CHECKING:
    from tuneloom.domain import Amounts

# What `--by` takes, and what a column of it is called in the API.
COLUMNS = {
    "owner": "owner",
    "model": "model",
    "key": "api_key_id",
    "job": "job_id",
    "base": "base",
    "kind": "kind",
}


def usage(
    context: typer.Context,
    since: Annotated[str, typer.Option(help="How far back, such as 12h or 7d, in whole hours.")] = "7d",
    by: Annotated[str, typer.Option(help="What to add up by: some of owner,model,key,job,base,kind.")] = "owner,model",
    owner: Annotated[str | None, typer.Option(help="Only what this owner used.")] = None,
    json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """What was used and what it cost. A job counts when it has ended; the last seconds of calls may be missing."""
    from tuneloom.control.key_fields import parse_duration
    from tuneloom.control.usage import Question, total

    columns = _columns(by)
    now = time.time()
    seconds = parse_duration(since, param="--since") or 0.0
    question = Question(
        start=int(now - seconds),
        end=int(now),
        width=3600,
        limit=1,
        group_by=tuple(COLUMNS[column] for column in columns),
        owner=owner,
    )
    with open_store(context) as store:
        found = list(total(store.records, question))
    currency = read_settings(context).train.currency
    if json:
        print_json([{**group, **_numbers(amounts), "currency": currency} for group, amounts in found])
        return
    header = [*columns, "requests", "input", "cached", "output", "trained", "device s", f"cost {currency}"]
    rows = [[*(value or "-" for value in group.values()), *_cells(amounts)] for group, amounts in found]
    print_rows(header, rows, none=f"nothing was used in the last {since}" + (f" by {owner}" if owner else ""))


def _columns(by: str) -> list[str]:
    columns = list(dict.fromkeys(column.strip() for column in by.split(",") if column.strip()))
    for column in columns:
        if column not in COLUMNS:
            raise InvalidRequest(f"Invalid `--by`: {column[:40]!r}. Use some of {','.join(COLUMNS)}.", param="--by")
    return columns


def _numbers(amounts: "Amounts") -> dict[str, float | int | None]:
    return {
        "num_model_requests": amounts.requests,
        "input_tokens": amounts.input_tokens,
        "input_cached_tokens": amounts.cached_tokens,
        "output_tokens": amounts.output_tokens,
        "trained_tokens": amounts.trained_tokens,
        "device_seconds": amounts.device_s,
        "cost": amounts.cost,
    }


def _cells(amounts: "Amounts") -> list[str]:
    *counts, device_s, cost = _numbers(amounts).values()
    return [*(str(count) for count in counts), f"{device_s:.1f}", "-" if cost is None else f"{cost:.6g}"]
