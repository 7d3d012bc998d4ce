"""Up, down, status and env: the installation on this machine."""

import shlex
import time
from typing import Annotated

import typer

from tuneloom.cli.session import home_folder, print_json, print_rows, read_settings

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


def down(context: typer.Context) -> None:
    """Stop everything that `up` started. Files, jobs, models and keys stay."""
    from tuneloom import cluster

    home = home_folder(context)
    with cluster.exclusive(home, wait_s=30.0):
        count = cluster.stop(home)
    typer.echo(f"stopped ({count} processes)" if count else "nothing was running")


def status(
    context: typer.Context,
    json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """What runs, what trains, what is stored. Exit code 3 when nothing runs."""
    from tuneloom.cli.report import collect

    report = collect(read_settings(context))
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


def _print_status(report: dict) -> None:
    if report["running"]:
        typer.echo(f"running at {report['api_url']}, dashboard {report['dashboard_url']}, {report['memory_mb']:,} MB")
        if report["problem"]:
            typer.echo(f"  {report['problem']}")
    else:
        typer.echo("not running" + (f": {report['problem']}" if report["problem"] else ""))
    print_rows(["application", "state"], [[name, state] for name, state in report["applications"].items()])
    print_rows(["base", "size", "state"], [[b["id"], f"{b['size_mb']:,} MB", b["state"]] for b in report["bases"]])
    rows = [[j["id"], j["state"], j["progress"], j["base"]] for j in report["jobs"]]
    print_rows(["job in progress", "state", "progress", "base"], rows)
    typer.echo("disk: " + ", ".join(f"{name} {size:,} MB" for name, size in report["disk_mb"].items()))
