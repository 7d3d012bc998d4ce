"""`tuneloom models`: tuned models and their versions, changed in the store itself; a running API follows at once."""

from typing import TYPE_CHECKING, Annotated

import typer

from tuneloom.cli.session import Api, Json, open_store, print_json, print_rows, read_settings, show_time
from tuneloom.domain import LOCAL_OWNER
from tuneloom.errors import InvalidRequest, ModelNotFound

if TYPE_CHECKING:
    from tuneloom.domain import Checkpoint, Version
    from tuneloom.store import Store

app = typer.Typer(help="Tuned models and their versions.", no_args_is_help=True)

Owner = Annotated[str, typer.Option(help="Whose models.")]
Name = Annotated[str, typer.Argument(help="A model's name, such as support-bot.")]
AnyName = Annotated[str, typer.Argument(help="A model, a version, or a checkpoint, by any of its names.")]

# Beyond what the API gives its replicas.
ACT_TIMEOUT_S = 120.0


@app.command("list")
def list_models(
    context: typer.Context,
    owner: Owner = LOCAL_OWNER,
    json: Json = False,
) -> None:
    """Models with their versions; `*` marks the active one, which the bare name calls."""
    from tuneloom.control import models

    with open_store(context) as store:
        found = {model.name: model for model in models.list_models(store.records, owner)}
        versions = models.list_versions(store.records, owner)
    if json:
        print_json([{**v.model_dump(), "active": found[v.model].active == v.number} for v in versions])
        return
    rows = [
        [
            version.pinned_name + (" *" if found[version.model].active == version.number else ""),
            version.base,
            str(version.adapter.rank),
            show_time(version.created_at),
            _fidelity(version),
            version.ft_name,
        ]
        for version in versions
    ]
    print_rows(["model", "base", "rank", "created", "fidelity", "also called"], rows, none=f"no models of {owner}")


@app.command()
def activate(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="A model, or one of its versions, such as support-bot@v2.")],
    version: Annotated[
        str | None, typer.Argument(help="The version, such as 2 or v2, if NAME does not say it.")
    ] = None,
    owner: Owner = LOCAL_OWNER,
) -> None:
    """Let the bare name call this version. Requests in flight finish on theirs."""
    from tuneloom.control import models

    bare, _, number = name.partition("@")
    number = (number or version or "").removeprefix("v")
    if not number.isascii() or not number.isdecimal():
        raise InvalidRequest(f"Say which version: `tuneloom models activate {bare or 'support-bot'}@v2`.")
    with open_store(context) as store:
        model = models.activate(store.records, owner, bare, int(number))
    typer.echo(f"{model.name} calls v{model.active}")


@app.command()
def rollback(context: typer.Context, name: Name, owner: Owner = LOCAL_OWNER) -> None:
    """Let the bare name call the version before the active one."""
    from tuneloom.control import models

    with open_store(context) as store:
        model = models.rollback(store.records, owner, name)
    typer.echo(f"{model.name} calls v{model.active}")


@app.command()
def show(
    context: typer.Context,
    name: Name,
    owner: Owner = LOCAL_OWNER,
    json: Json = False,
) -> None:
    """One model: each version with its job, what was measured of it, and whether its lineage is recorded."""
    from tuneloom.control import exports, models

    with open_store(context) as store:
        model = models.get_model(store.records, owner, name).value
        versions = models.list_versions(store.records, owner, name)
        lineages = exports.have_lineages(store.blobs, (version.adapter for version in versions))
    if json:
        shown = [{**v.model_dump(), "lineage": has} for v, has in zip(versions, lineages, strict=True)]
        print_json({**model.model_dump(), "versions": shown})
        return
    active = f"calls v{model.active}" if model.active else "has no version"
    typer.echo(f"{model.name} on {model.base}, {active}")
    print_rows(
        ["version", "created", "rank", "job", "lineage", "fidelity", "metrics"],
        [_version_row(v, has, v.number == model.active) for v, has in zip(versions, lineages, strict=True)],
    )


@app.command()
def delete(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="A model with all its versions, a version, or a checkpoint.")],
    owner: Owner = LOCAL_OWNER,
) -> None:
    """Delete a model, one of its versions, or a checkpoint."""
    from tuneloom.control import deletion

    with open_store(context) as store:
        deletion.delete(store, owner, name)
    typer.echo(f"deleted {name}")


@app.command()
def prewarm(context: typer.Context, name: AnyName, owner: Owner = LOCAL_OWNER) -> None:
    """Load an adapter into the memory of all replicas of its base."""
    _act(context, "prewarm", name, owner)


@app.command()
def pin(context: typer.Context, name: AnyName, owner: Owner = LOCAL_OWNER) -> None:
    """Keep an adapter loaded on all replicas of its base, also on those that start later."""
    _act(context, "pin", name, owner)


@app.command()
def unpin(context: typer.Context, name: AnyName, owner: Owner = LOCAL_OWNER) -> None:
    """Take a pin back."""
    _act(context, "unpin", name, owner)


@app.command()
def unload(context: typer.Context, name: AnyName, owner: Owner = LOCAL_OWNER) -> None:
    """Drop an adapter from device, memory and disk of all replicas; the next request loads it again."""
    _act(context, "unload", name, owner)


def _act(context: typer.Context, action: str, name: str, owner: str) -> None:
    """Ask the running API; exit code 1 if a replica could not do it."""
    with open_store(context) as store:
        base = holder_of(store, owner, name).base
    path = f"/v1/tuneloom/bases/{base}/{action}"
    done = Api(read_settings(context)).post(path, {"model": name, "owner": owner}, timeout=ACT_TIMEOUT_S)
    rows = [[each["id"], each["error"]["message"] if each["status"] != "ok" else "ok"] for each in done["replicas"]]
    print_rows(["replica", action], rows)
    if not rows:
        typer.echo(f"{base} has no replica at the moment")
    if done["failed"]:
        raise typer.Exit(1)


def _version_row(version: "Version", has_lineage: bool, is_active: bool) -> list[str]:
    return [
        f"v{version.number}" + (" *" if is_active else ""),
        show_time(version.created_at),
        str(version.adapter.rank),
        version.job_id or "imported",
        "yes" if has_lineage else "no",
        _fidelity(version),
        ", ".join(f"{key} {value:.4g}" for key, value in version.metrics.items()) or "-",
    ]


def _fidelity(version: "Version") -> str:
    """How far trainer and engine were apart at most, and how far they may be."""
    found = version.fidelity
    return f"{found.max_difference:.1g} of {found.tolerance:g}" if found else "-"


def holder_of(store: "Store", owner: str, name: str) -> "Version | Checkpoint":
    """What has the adapter that a name calls."""
    from tuneloom.store.names import find_named

    found = find_named(store.records, owner, name)
    for stored in (found.version, found.checkpoint) if found else ():
        if stored is not None:
            return stored.value
    raise ModelNotFound.named(name)
