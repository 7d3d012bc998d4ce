"""`tuneloom jobs`: fine-tuning jobs, by the API."""

import time
from collections.abc import Iterator
from json import dumps, loads
from typing import Annotated, Any

import typer

from tuneloom.cli.session import Api, Json, Limit, print_json, print_rows, read_settings, show_time
from tuneloom.config import TrainSettings
from tuneloom.errors import InvalidRequest

app = typer.Typer(help="Fine-tuning jobs.", no_args_is_help=True)

JOBS = "/v1/fine_tuning/jobs"
FOLLOW_S = 1.0
ENDED = ("succeeded", "failed", "cancelled")

JobId = Annotated[str, typer.Argument(help="The job's id, `ftjob-...`.")]


@app.command("list")
def list_jobs(
    context: typer.Context,
    limit: Limit = 20,
    json: Json = False,
) -> None:
    """Jobs, newest first."""
    found = _api(context).get(JOBS, limit=limit)["data"]
    if json:
        print_json(found)
        return
    rows = [[job["id"], job["status"], show_time(job["created_at"]), _outcome(job)] for job in found]
    print_rows(["id", "status", "created", "model, or place in line"], rows, none="no jobs")


@app.command()
def show(context: typer.Context, id: JobId, json: Json = False) -> None:
    """A job: where it stands, its settings with the reason of each, what was estimated and what it took."""
    job = _api(context).get(f"{JOBS}/{id}")
    if json:
        print_json(job)
        return
    for name, text in _lines(job, read_settings(context).train):
        typer.echo(f"{name:10}  {text}".rstrip())
    settings = job["tuneloom"]["settings"]
    print_rows(["setting", "value", "reason"], [[each["name"], each["value"], each["reason"]] for each in settings])


@app.command()
def estimate(
    context: typer.Context,
    training_file: Annotated[str, typer.Argument(help="The id of an uploaded file, `file-...`.")],
    model: Annotated[
        str | None, typer.Option(help="A base or a model of yours.", show_default="the first base")
    ] = None,
    validation_file: Annotated[str | None, typer.Option(help="The id of a file for the validation loss.")] = None,
    method: Annotated[str, typer.Option(help="supervised or dpo.")] = "supervised",
    epochs: Annotated[int | None, typer.Option(help="`n_epochs`; without it as a job would choose.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="`batch_size`; without it as a job would choose.")] = None,
    option: Annotated[list[str] | None, typer.Option("--option", "-o", help="Of `tuneloom`: `rank=8`.")] = None,
    json: Json = False,
) -> None:
    """Tokens, steps, time, memory and cost of a job, without creating it."""
    hyperparameters = {"n_epochs": epochs, "batch_size": batch_size}
    chosen = {name: value for name, value in hyperparameters.items() if value is not None}
    body: dict[str, Any] = {
        "model": model or read_settings(context).bases[0].id,
        "training_file": training_file,
        "validation_file": validation_file,
        "method": {"type": method, method: {"hyperparameters": chosen}},
        "tuneloom": dict(_option(text) for text in option or ()),
    }
    api = _api(context)
    while (found := api.post("/v1/tuneloom/estimate", body))["status"] == "running":
        time.sleep(FOLLOW_S)
    if json:
        print_json(found)
        return
    typer.echo(found["message"])
    print_rows(
        ["setting", "value", "reason"], [[each["name"], each["value"], each["reason"]] for each in found["settings"]]
    )


@app.command()
def cancel(context: typer.Context, id: JobId) -> None:
    """End a job; what it has learned so far stays in its checkpoints."""
    _change(context, id, "cancel")


@app.command()
def pause(context: typer.Context, id: JobId) -> None:
    """Save a checkpoint and stop training until `resume`."""
    _change(context, id, "pause")


@app.command()
def resume(context: typer.Context, id: JobId) -> None:
    """Go on from the last checkpoint."""
    _change(context, id, "resume")


@app.command()
def events(
    context: typer.Context,
    id: JobId,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job has ended.")] = False,
    limit: Annotated[int, typer.Option(help="At most so many of the past.", min=1, max=1000)] = 100,
    json: Annotated[bool, typer.Option("--json", help="For programs: an object a line.")] = False,
) -> None:
    """A job's history, oldest first. With --follow the exit code tells whether it succeeded."""
    api = _api(context)
    seen: set[str] = set()
    while True:
        state = api.get(f"{JOBS}/{id}")["status"] if follow else ""
        for event in reversed(api.get(f"{JOBS}/{id}/events", limit=limit)["data"]):
            if event["id"] not in seen:
                seen.add(event["id"])
                line = f"{show_time(event['created_at'])}  {event['level']:5}  {event['message']}"
                typer.echo(dumps(event, ensure_ascii=False) if json else line)
        if not follow or state in ENDED:
            raise typer.Exit(0 if state in ("", "succeeded") else 1)
        time.sleep(FOLLOW_S)


def _change(context: typer.Context, id: str, verb: str) -> None:
    job: dict[str, Any] = _api(context).post(f"{JOBS}/{id}/{verb}")
    typer.echo(f"{job['id']} {job['status']}")


def _outcome(job: dict[str, Any]) -> str:
    """What a list tells of a job beside its state."""
    place = job["tuneloom"]["queue"]
    return f"{place['position']}: {place['waiting_for']}" if place else job["fine_tuned_model"] or ""


def _lines(job: dict[str, Any], train: TrainSettings) -> Iterator[tuple[str, str]]:
    from tuneloom.control.estimate import describe_estimate, describe_usage
    from tuneloom.domain import Estimate, Usage

    ours = job["tuneloom"]
    yield "job", f"{job['id']}, {job['status']}, created {show_time(job['created_at'])}"
    yield "trains", f"{ours['name']}, on {ours['base']}"
    if place := ours["queue"]:
        starts = f"; starts at about {show_time(place['starts_at'])}" if place["starts_at"] else ""
        yield "in line", f"{place['position']}, waiting for {place['waiting_for']}{starts}"
    if job["estimated_finish"]:
        yield "finish", f"at about {show_time(job['estimated_finish'])}"
    before = Estimate.model_validate(ours["estimate"]) if ours["estimate"] else None
    if before is not None:
        yield "estimate", describe_estimate(before, train).removeprefix("Estimate: ")
    if ours["usage"]:
        usage = Usage.model_validate({name: ours["usage"][name] for name in Usage.model_fields})
        compared = before if job["status"] == "succeeded" else None
        yield "took", describe_usage(usage, compared, train).removeprefix("Took ")
    if job["fine_tuned_model"]:
        yield "model", job["fine_tuned_model"]
    if job["error"]:
        yield "error", job["error"]["message"]


def _option(text: str) -> tuple[str, Any]:
    """`rank=8` as a name and a JSON value; what is no JSON is a string."""
    name, equals, value = text.partition("=")
    if not equals:
        raise InvalidRequest(f"Invalid `--option`: {text!r}. Write `name=value`.")
    try:
        return name, loads(value)
    except ValueError:
        return name, value


def _api(context: typer.Context) -> Api:
    return Api(read_settings(context))
