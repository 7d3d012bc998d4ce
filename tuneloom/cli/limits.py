"""`tuneloom limits`: what owners may use, set in the store itself, so that it also works when nothing runs."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from tuneloom.cli.session import Json, open_store, print_json, print_rows
from tuneloom.errors import InvalidRequest

if TYPE_CHECKING:
    from tuneloom.domain import OwnerLimits

app = typer.Typer(help="What owners may use: rates, quotas, budgets.", no_args_is_help=True)

Owner = Annotated[str, typer.Argument(help="Whose limits.")]


@app.command("set")
def set_limits(
    context: typer.Context,
    owner: Owner,
    requests_per_minute: Annotated[int | None, typer.Option(help="Calls of models by all keys together.")] = None,
    requests_per_day: Annotated[int | None, typer.Option()] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(help="Tokens of prompts and answers.")] = None,
    max_concurrent: Annotated[int | None, typer.Option(help="Calls under way.")] = None,
    max_concurrent_per_key: Annotated[int | None, typer.Option()] = None,
    max_waiting: Annotated[int | None, typer.Option(help="Calls that have no first token yet.")] = None,
    costly_per_minute: Annotated[int | None, typer.Option(help="Creates of jobs, files, drafts, keys...")] = None,
    costly_per_day: Annotated[int | None, typer.Option()] = None,
    light_per_minute: Annotated[int | None, typer.Option(help="All other requests.")] = None,
    max_queued_jobs: Annotated[int | None, typer.Option()] = None,
    files_bytes: Annotated[int | None, typer.Option(help="Room for files.")] = None,
    tokens_per_month: Annotated[int | None, typer.Option()] = None,
    budget_per_month: Annotated[float | None, typer.Option(help="In the currency of `train.currency`.")] = None,
    model_requests_per_minute: Annotated[int | None, typer.Option(help="Calls of each single model.")] = None,
    model_tokens_per_minute: Annotated[int | None, typer.Option()] = None,
) -> None:
    """Change the limits that are named; the others stay. It counts within seconds."""
    from tuneloom.control import audit, owner_limits
    from tuneloom.domain import Allowance

    params = context.params
    named = {name: params[name] for name in Allowance.model_fields if params.get(name) is not None}
    rates = {"requests_per_minute": requests_per_minute, "requests_per_day": requests_per_day}
    rates["tokens_per_minute"] = tokens_per_minute
    of_models = {
        "requests_per_minute": model_requests_per_minute,
        "tokens_per_minute": model_tokens_per_minute,
    }
    if not named and not {*rates.values(), *of_models.values()} - {None}:
        raise InvalidRequest("Say which limit, such as `--requests-per-minute 60`.")
    with open_store(context) as store:
        before = owner_limits.find(store.records, owner)
        allowance = _parse({**named, "rates": rates, "model_rates": of_models})
        after = allowance.over(before.allowance) if before else allowance
        limits = owner_limits.put(store.records, owner, after, audit.cli_actor())
    print_rows(["limit", "value"], _rows(limits))


@app.command()
def show(context: typer.Context, owner: Owner, json: Json = False) -> None:
    """What was set for an owner; all else is as the settings say."""
    from tuneloom.control import owner_limits

    with open_store(context) as store:
        limits = owner_limits.find(store.records, owner)
    if json:
        print_json(None if limits is None else limits.model_dump(mode="json"))
    else:
        print_rows(["limit", "value"], _rows(limits) if limits else [], none=f"nothing is set for {owner}")


@app.command("list")
def list_limits(context: typer.Context, json: Json = False) -> None:
    """The owners for whom something was set."""
    from tuneloom.control import owner_limits

    with open_store(context) as store:
        found = owner_limits.list_all(store.records)
    if json:
        print_json([limits.model_dump(mode="json") for limits in found])
        return
    rows = [[limits.owner, *row] for limits in found for row in _rows(limits)]
    print_rows(["owner", "limit", "value"], rows, none="nothing is set for anybody")


@app.command()
def clear(context: typer.Context, owner: Owner) -> None:
    """An owner has again what the settings say."""
    from tuneloom.control import audit, owner_limits

    with open_store(context) as store:
        owner_limits.clear(store.records, owner, audit.cli_actor())
    typer.echo(f"cleared {owner}")


def _parse(fields: dict[str, Any]) -> Any:
    from pydantic import ValidationError

    from tuneloom.domain import Allowance

    try:
        return Allowance.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InvalidRequest(f"Invalid `{where}`: {first['msg']}.") from error


def _rows(limits: "OwnerLimits") -> list[list[str]]:
    """What is set, by its dotted name."""
    rows = []
    for name, value in limits.allowance.model_dump().items():
        inner = value if isinstance(value, dict) else {"": value}
        rows += [[f"{name}.{part}".rstrip("."), str(each)] for part, each in inner.items() if each is not None]
    return rows
