"""Up, down, status and env: the installation on this machine."""

import shlex
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import typer

from tuneloom.cli.session import Api, Json, home_folder, print_json, print_rows, read_settings

if TYPE_CHECKING:
    from tuneloom.config import Settings

NOT_RUNNING = 3


def up(
    context: typer.Context,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for the first answers.")] = 600.0,
) -> None:
    """Start everything and wait until it answers. Fetches the default base the first time."""
    from tuneloom import up as bring_up

    started = time.monotonic()

    def report(line: str) -> None:
        typer.echo(f"[{time.monotonic() - started:4.0f} s] {line}")

    settings = read_settings(context)
    outcome = bring_up.up(settings, report, timeout)
    state = outcome.state
    typer.echo("tuneloom is running already" if outcome.was_running else "tuneloom is running")
    if state.port != settings.gateway.port and settings.gateway.port:
        typer.echo(f"  port {settings.gateway.port} is taken by another program; this is port {state.port}")
    typer.echo(f"  API        {state.api_url}/v1")
    typer.echo(f"  dashboard  {state.dashboard_url}   (asks for the token in {settings.home / 'ray-token'})")
    if outcome.new_key:
        typer.echo(f"  admin key  {outcome.new_key}   (shown this once; kept in {settings.home / 'admin-key'})")
    typer.echo('  shell      eval "$(tuneloom env)"')
    if outcome.unused:
        typer.echo(f"  {_unused(outcome.unused)}")


def down(context: typer.Context) -> None:
    """Stop everything that `up` started. Files, jobs, models and keys stay."""
    from tuneloom import cluster

    home = home_folder(context)
    with cluster.exclusive(home, wait_s=30.0):
        count = cluster.stop(home)
    typer.echo(f"stopped ({count} processes)" if count else "nothing was running")


def status(
    context: typer.Context,
    json: Json = False,
    bases: Annotated[
        bool, typer.Option("--bases", help="What each replica of each base does and holds, instead.")
    ] = False,
) -> None:
    """What runs, what trains, what is stored. Exit code 3 when nothing runs."""
    from tuneloom.cli.report import collect

    settings = read_settings(context)
    if bases:
        _print_bases(settings, as_json=json)
        return
    report = collect(settings)
    if json:
        print_json(report)
    else:
        _print_status(report)
    if not report["running"]:
        raise typer.Exit(NOT_RUNNING)


def env(
    context: typer.Context,
    ray: Annotated[
        bool, typer.Option("--ray", help="Also what Ray's own tools need, such as `ray job submit`.")
    ] = False,
) -> None:
    """Lines for a shell: eval "$(tuneloom env)"."""
    from tuneloom import cluster, up

    settings = read_settings(context)
    state = cluster.read_state(settings.home)
    if state is None or not state.is_up:
        typer.echo("tuneloom is not running. Start it: `tuneloom up`.", err=True)
        raise typer.Exit(NOT_RUNNING)
    variables = {"OPENAI_BASE_URL": f"{state.api_url}/v1", "OPENAI_API_KEY": up.read_admin_key(settings)}
    if ray:
        variables |= cluster.client_environment(settings.home, state)
    for name, value in variables.items():
        typer.echo(f"export {name}={shlex.quote(value)}")


def _print_bases(settings: "Settings", *, as_json: bool) -> None:
    from tuneloom import cluster
    from tuneloom.cli.report import adapter_rows, pin_rows, replica_rows, tier_rows

    state = cluster.read_state(settings.home)
    if state is None or not state.is_up:
        typer.echo("not running", err=True)
        raise typer.Exit(NOT_RUNNING)
    api = Api(settings)
    shown = api.get("/v1/tuneloom/bases")["data"]
    for base in shown:
        known = api.get(f"/v1/tuneloom/bases/{base['id']}/adapters") if base["replicas"] else {}
        base |= {"adapters": known.get("data", []), "has_more_adapters": known.get("has_more", False)}
    if as_json:
        print_json(shown)
        return
    for number, base in enumerate(shown):
        typer.echo(("\n" if number else "") + base["id"] + (f": {base['problem']}" if base["problem"] else ""))
        if not base["replicas"] and not base["problem"]:
            typer.echo("no replica runs; one starts when it is asked for")
        for header, rows in (replica_rows(base), tier_rows(base), adapter_rows(base), pin_rows(base)):
            print_rows(header, rows)
        if base["has_more_adapters"]:
            count = len(base["adapters"])
            typer.echo(f"only the {count} used last; more by GET /v1/tuneloom/bases/{base['id']}/adapters")


def _unused(parts: Iterable[str]) -> str:
    names = ", ".join(f"`{part}`" for part in parts)
    return f"settings have changed ({names}) since it was started; to use them: tuneloom down && tuneloom up"


def _print_status(report: dict) -> None:
    if report["running"]:
        typer.echo(f"running at {report['api_url']}, dashboard {report['dashboard_url']}, {report['memory_mb']:,} MB")
        if report["problem"]:
            typer.echo(f"  {report['problem']}")
        if report["unused_settings"]:
            typer.echo(f"  {_unused(report['unused_settings'])}")
    else:
        typer.echo("not running" + (f": {report['problem']}" if report["problem"] else ""))
    print_rows(["application", "state"], [[name, state] for name, state in report["applications"].items()])
    print_rows(["base", "size", "state"], [[b["id"], f"{b['size_mb']:,} MB", b["state"]] for b in report["bases"]])
    rows = [[j["id"], j["state"], j["progress"], j["base"]] for j in report["jobs"]]
    print_rows(["job in progress", "state", "progress", "base"], rows)
    typer.echo("disk: " + ", ".join(f"{name} {size:,} MB" for name, size in report["disk_mb"].items()))
