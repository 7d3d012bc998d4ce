"""`tuneloom drafts`: training rows written by a language model from a description, by the API."""

import json as jsons
from typing import Annotated, Any

import typer

from tuneloom.cli.session import Api, Json, Limit, print_json, print_rows, read_settings, show_time
from tuneloom.errors import TuneloomError

app = typer.Typer(help="Training rows drafted from a description.", no_args_is_help=True)

DRAFTS = "/v1/tuneloom/drafts"

DraftId = Annotated[str, typer.Argument(help="The draft's id, `draft_...`.")]


@app.command()
def create(
    context: typer.Context,
    description: Annotated[str, typer.Argument(help="What the rows are about, and for whom.")],
    rows: Annotated[int, typer.Option(help="How many.", min=10, max=1000)] = 100,
    format: Annotated[str, typer.Option(help="chat, instruction, text or preference.")] = "chat",
    drafters: Annotated[int | None, typer.Option(help="Written by so many at once.", min=1, max=50)] = None,
    role: Annotated[
        list[str] | None, typer.Option(help="standard, creative, technical or adversarial; repeat it.")
    ] = None,
    topic: Annotated[list[str] | None, typer.Option(help="A subject to write about; repeat it.")] = None,
    seed_file: Annotated[str | None, typer.Option(help="Id of a file with rows of the kind that is wanted.")] = None,
    language: Annotated[str | None, typer.Option(help="Code of ISO 639-1; rows in others are dropped.")] = None,
    provider: Annotated[str | None, typer.Option(help="One of `drafting.providers`.")] = None,
    model: Annotated[str | None, typer.Option(help="One of the provider's models.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Tokens that it may take of the provider.")] = None,
    max_cost: Annotated[float | None, typer.Option(help="What it may cost, in `train.currency`.")] = None,
    time_limit: Annotated[float | None, typer.Option(help="Seconds after which it ends with what there is.")] = None,
    seed: Annotated[int | None, typer.Option(help="Random if not given.")] = None,
) -> None:
    """Begin a draft and print its id."""
    body = {
        "description": description,
        "rows": rows,
        "format": format,
        "drafters": drafters,
        "roles": role or None,
        "topics": topic or None,
        "seed_file": seed_file,
        "language": language,
        "provider": provider,
        "model": model,
        "max_tokens": max_tokens,
        "max_cost": max_cost,
        "time_limit_s": time_limit,
        "seed": seed,
    }
    given = {name: value for name, value in body.items() if value is not None}
    typer.echo(Api(read_settings(context)).post(DRAFTS, given)["id"])


@app.command("list")
def list_drafts(
    context: typer.Context,
    limit: Limit = 20,
    json: Json = False,
) -> None:
    """Drafts, newest first."""
    found = Api(read_settings(context)).get(DRAFTS, limit=limit)["data"]
    if json:
        print_json(found)
        return
    rows = [
        [each["id"], _state(each), _progress(each), each["file_id"] or "", show_time(each["created_at"])]
        for each in found
    ]
    print_rows(["id", "status", "rows", "file", "created"], rows, none="no drafts")


@app.command()
def show(context: typer.Context, id: DraftId, json: Json = False) -> None:
    """How far a draft is, what was dropped and why, and what each drafter does."""
    draft = Api(read_settings(context)).get(f"{DRAFTS}/{id}")
    if json:
        print_json(draft)
        return
    counts = draft["counts"]
    typer.echo(f"{draft['id']}  {_state(draft)}  {_progress(draft)} rows  {draft['file_id'] or ''}".rstrip())
    if draft["error"] is not None:
        typer.echo(f"error: {draft['error']['message']}")
    typer.echo(f"received {counts['received']:,}, repaired {counts['repaired']:,}" + _dropped(counts["dropped"]))
    cost = "" if draft["cost"] is None else f", {draft['cost']:.4f} {draft['currency']}"
    typer.echo(
        f"tokens {counts['input_tokens']:,} in, {counts['output_tokens']:,} out, {counts['calls']:,} calls{cost}"
    )
    table = [
        [each["number"], each["role"], each["outcome"] or each["status"], each["counts"]["kept"], each["losses"]]
        for each in draft["drafters"]
    ]
    print_rows(["drafter", "role", "status", "rows", "lost"], [[str(cell) for cell in line] for line in table])


@app.command()
def watch(context: typer.Context, id: DraftId) -> None:
    """A line whenever a draft gets on, until it has ended. The exit code tells whether it has a file."""
    api = Api(read_settings(context))
    while True:
        for event in api.events(f"{DRAFTS}/{id}/events"):
            if "error" in event:
                raise TuneloomError(event["error"]["message"])
            draft = event["draft"]
            counts = draft["counts"]
            line = f"{_state(draft)}  {_progress(draft)} rows  {counts['calls']:,} calls" + _dropped(counts["dropped"])
            typer.echo(line)
            if event["type"] == "draft.ended":
                if draft["error"] is not None:
                    typer.echo(f"error: {draft['error']['message']}", err=True)
                typer.echo(draft["file_id"] or "no rows")
                raise typer.Exit(0 if draft["file_id"] else 1)


@app.command()
def cancel(context: typer.Context, id: DraftId) -> None:
    """End a draft. The rows that have come become its file within seconds."""
    Api(read_settings(context)).post(f"{DRAFTS}/{id}/cancel")
    typer.echo(f"cancelling {id}")


@app.command()
def rows(
    context: typer.Context,
    id: DraftId,
    after: Annotated[int, typer.Option(help="The number of the last row seen.", min=0)] = 0,
    limit: Annotated[int, typer.Option(help="At most so many.", min=1, max=1000)] = 20,
    json: Json = False,
) -> None:
    """The rows that there are, a line of JSON each, also while more are coming."""
    page = Api(read_settings(context)).get(f"{DRAFTS}/{id}/rows", after=after, limit=limit)
    if json:
        print_json(page)
        return
    for row in page["data"]:
        typer.echo(jsons.dumps(row["data"], ensure_ascii=False))


def _state(draft: dict[str, Any]) -> str:
    return "cancelling" if draft["is_cancelling"] else draft["status"]


def _progress(draft: dict[str, Any]) -> str:
    return f"{draft['rows']:,}/{draft['request']['rows']:,}"


def _dropped(dropped: dict[str, int]) -> str:
    return "".join(f", {reason.replace('_', ' ')} {count:,}" for reason, count in sorted(dropped.items()))
