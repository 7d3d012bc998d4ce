"""`tuneloom webhooks`: who is told what happens, and what became of it, by the API."""

from typing import Annotated, Any

import typer

from tuneloom.cli.session import Api, Json, Limit, print_json, print_rows, read_settings, show_time
from tuneloom.domain import EVENT_TYPES

app = typer.Typer(help="Webhooks: who is told what happens.", no_args_is_help=True)

PATH = "/v1/tuneloom/webhooks"

EndpointId = Annotated[str, typer.Argument(help="The endpoint's id, `we_...`.")]


@app.command("list")
def list_endpoints(context: typer.Context, json: Json = False) -> None:
    """The endpoints, newest first, without their secrets."""
    found = _api(context).get(PATH, limit=100)["data"]
    if json:
        print_json(found)
        return
    rows = [
        [each["id"], each["url"], each["name"], each["signing_secret_hint"], _state(each["tuneloom"])] for each in found
    ]
    print_rows(["id", "url", "name", "secret", "state"], rows, none="no webhooks")


@app.command()
def create(
    context: typer.Context,
    url: Annotated[str, typer.Argument(help="Where events are sent; `https://...`.")],
    event: Annotated[list[str] | None, typer.Option(help="A type of event; repeat it. All without it.")] = None,
    name: Annotated[str, typer.Option(help="What it is for.")] = "",
) -> None:
    """Make an endpoint. Its signing secret goes to stdout, this once; the rest to stderr."""
    made = _api(context).post(PATH, {"url": url, "event_types": event or list(EVENT_TYPES), "name": name})
    typer.echo(f"webhook {made['id']} for {', '.join(made['event_types'])}", err=True)
    typer.echo(made["signing_secret"])


@app.command()
def rotate(
    context: typer.Context,
    id: EndpointId,
    overlap: Annotated[str, typer.Option(help="How long the old secret signs too: 24h, 7d, 0.")] = "24h",
) -> None:
    """Give an endpoint a new signing secret; it goes to stdout, this once."""
    typer.echo(_api(context).post(f"{PATH}/{id}/rotate", {"overlap": overlap})["signing_secret"])


@app.command()
def enable(context: typer.Context, id: EndpointId) -> None:
    """Send to an endpoint again that was disabled."""
    _api(context).post(f"{PATH}/{id}", {"enabled": True})
    typer.echo(f"enabled {id}")


@app.command()
def delete(context: typer.Context, id: EndpointId) -> None:
    """Delete an endpoint. What it was still to be told is not sent."""
    _api(context).delete(f"{PATH}/{id}")
    typer.echo(f"deleted {id}")


@app.command()
def test(context: typer.Context, id: EndpointId) -> None:
    """Send a test event, and tell what the receiver answered."""
    result = _api(context).post(f"{PATH}/{id}/test", {})
    typer.echo(f"the receiver answered {result['status_code']}")
    raise typer.Exit(0 if result["tuneloom"]["delivered"] else 1)


@app.command()
def deliveries(
    context: typer.Context,
    id: EndpointId,
    state: Annotated[str, typer.Option(help="pending, delivered, dead or all.")] = "all",
    limit: Limit = 20,
    json: Json = False,
) -> None:
    """What was sent to an endpoint or is still to be, newest first."""
    found = _api(context).get(f"{PATH}/{id}/deliveries", state=state, limit=limit)["data"]
    if json:
        print_json(found)
        return
    rows = [
        [each["id"], each["type"], each["state"], str(each["attempts"]), show_time(each["created_at"]), _last(each)]
        for each in found
    ]
    print_rows(["id", "type", "state", "tries", "created", "last answer"], rows, none="no deliveries")


@app.command()
def replay(
    context: typer.Context,
    id: EndpointId,
    delivery: Annotated[str, typer.Argument(help="The delivery's id, `wh_...`.")],
) -> None:
    """Send a delivery again, now, under the same id."""
    _api(context).post(f"{PATH}/{id}/deliveries/{delivery}/replay")
    typer.echo(f"{delivery} is due")


def _api(context: typer.Context) -> Api:
    return Api(read_settings(context))


def _state(told: dict[str, Any]) -> str:
    if not told["enabled"]:
        return f"disabled {show_time(told['disabled_at'])}: {told['disabled_reason']}"
    return f"failing since {show_time(told['failing_since'])}" if told["failing_since"] else "ok"


def _last(delivery: dict[str, Any]) -> str:
    if not delivery["tries"]:
        return "-"
    last = delivery["tries"][-1]
    return last["error"] or str(last["status"])
