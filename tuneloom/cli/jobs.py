"""`tuneloom jobs`: fine-tuning jobs, by the API."""

import time
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from tuneloom.cli.session import Api, print_json, print_rows, read_settings

app = typer.Typer(help="Fine-tuning jobs.", no_args_is_help=True)

JOBS = "/v1/fine_tuning/jobs"
FOLLOW_S = 1.0
ENDED = ("succeeded", "failed", "cancelled")

JobId = Annotated[str, typer.Argument(help="The job's id, `ftjob-...`.")]
Json = Annotated[bool, typer.Option("--json", help="For programs.")]


@app.command("list")
def list_jobs(
    context: typer.Context,
    limit: Annotated[int, typer.Option(help="At most so many.", min=1, max=100)] = 20,
    json: Json = False,
) -> None:
    """Jobs, newest first."""
    found = _api(context).get(JOBS, limit=limit)["data"]
    if json:
        print_json(found)
        return
    rows = [[job["id"], job["status"], _time(job["created_at"]), job["fine_tuned_model"] or ""] for job in found]
    print_rows(["id", "state", "created", "model"], rows)


@app.command()
def show(context: typer.Context, id: JobId) -> None:
    """All that the API tells of a job."""
    print_json(_api(context).get(f"{JOBS}/{id}"))


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
) -> None:
    """A job's history, oldest first. With --follow the exit code tells whether it succeeded."""
    api = _api(context)
    seen: set[str] = set()
    while True:
        state = api.get(f"{JOBS}/{id}")["status"] if follow else ""
        for event in reversed(api.get(f"{JOBS}/{id}/events", limit=limit)["data"]):
            if event["id"] not in seen:
                seen.add(event["id"])
                typer.echo(f"{_time(event['created_at'])}  {event['level']:5}  {event['message']}")
        if not follow or state in ENDED:
            raise typer.Exit(0 if state in ("", "succeeded") else 1)
        time.sleep(FOLLOW_S)


def _change(context: typer.Context, id: str, verb: str) -> None:
    job: dict[str, Any] = _api(context).post(f"{JOBS}/{id}/{verb}")
    typer.echo(f"{job['id']} {job['status']}")


def _api(context: typer.Context) -> Api:
    return Api(read_settings(context))


def _time(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S")
