"""`tuneloom bases`: the base checkpoints of this installation."""

from pathlib import Path
from typing import Annotated

import typer

from tuneloom.cli.session import Json, open_store, print_json, print_rows, read_settings

app = typer.Typer(help="Base models.", no_args_is_help=True)


@app.command("list")
def list_bases(
    context: typer.Context,
    json: Json = False,
    verify: Annotated[bool, typer.Option(help="Read every file and compare its checksum.")] = False,
) -> None:
    """The bases in the catalogue, and whether `config.yaml` serves them."""
    from tuneloom import bases

    settings = read_settings(context)
    served = {base.id for base in settings.bases}
    found = list(bases.catalogue(settings.bases_dir).values())
    if verify:
        for base in found:
            bases.verify(base)
    if json:
        print_json([{**base.__dict__, "path": str(base.path), "served": base.id in served} for base in found])
        return
    rows = [
        [
            base.id,
            f"{base.size_bytes / 1e6:,.0f} MB",
            str(base.context_length),
            base.license or "unknown",
            "yes" if base.id in served else "no",
        ]
        for base in found
    ]
    print_rows(
        ["id", "size", "context", "license", "served"], rows, none="no bases; `tuneloom up` fetches the default one"
    )


@app.command()
def add(
    context: typer.Context,
    source: Annotated[Path | None, typer.Argument(help="A Hugging Face folder or a .gguf file.")] = None,
    id: Annotated[str | None, typer.Option(help="The name to serve it by, such as org/model.")] = None,
) -> None:
    """Add a base from a folder or a GGUF file; without SOURCE, fetch the default one."""
    from tuneloom import bases
    from tuneloom.config import CONFIG_FILE
    from tuneloom.errors import InvalidRequest

    settings = read_settings(context)
    bases_dir = settings.bases_dir
    if source is None:
        base = bases.fetch_default(bases_dir, typer.echo)
    elif id is None:
        raise InvalidRequest("Say by which name the base is served: `--id ORG/MODEL`.")
    elif source.suffix == ".gguf":
        base = bases.add_gguf(bases_dir, source, id, progress=typer.echo)
    else:
        base = bases.add_folder(bases_dir, source, id)
    _record(context, "base.added", base.id, {"source": source.name if source else "default"})
    typer.echo(f"{base.id} is in the catalogue")
    if base.id not in {entry.id for entry in settings.bases}:
        typer.echo(
            f"to serve it: list `- id: {base.id}` under `bases:` in {settings.home / CONFIG_FILE}, then down, up"
        )


@app.command()
def remove(context: typer.Context, id: Annotated[str, typer.Argument(help="The base's id.")]) -> None:
    """Take a base out of the catalogue and delete its files."""
    from tuneloom import bases, cluster
    from tuneloom.errors import Conflict, NotFound

    settings = read_settings(context)
    if id in {base.id for base in settings.bases} and cluster.is_whole(settings.home):
        raise Conflict(f"`{id}` is being served. Take it out of `config.yaml`, or stop with `tuneloom down`, first.")
    if id not in bases.catalogue(settings.bases_dir):
        raise NotFound(f"There is no base `{id}` in the catalogue. `tuneloom bases list` shows what there is.")
    bases.remove(settings.bases_dir, id)
    _record(context, "base.removed", id, {})
    typer.echo(f"removed {id}")


def _record(context: typer.Context, action: str, id: str, data: dict[str, str]) -> None:
    """Write into the audit log what was done to the catalogue, which is no part of the store."""
    from tuneloom.domain import LOCAL_OWNER, AuditTarget
    from tuneloom.store import audit_log

    target = AuditTarget(owner=LOCAL_OWNER, type="base", id=id)
    with open_store(context) as store:
        store.records.commit(audit_log.entry(audit_log.cli_actor(), action, target, data))
