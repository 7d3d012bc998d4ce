"""`tuneloom keys`: made, listed and revoked in the store itself, so that it also works when nothing runs."""

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from tuneloom.cli.session import open_store, print_json, print_rows, read_settings
from tuneloom.domain import LOCAL_OWNER

if TYPE_CHECKING:
    from tuneloom.domain import ApiKey

app = typer.Typer(help="API keys.", no_args_is_help=True)


@app.command()
def create(
    context: typer.Context,
    name: Annotated[str, typer.Option(help="What the key is for.")] = "",
    scope: Annotated[list[str] | None, typer.Option(help="inference, training or admin; repeat it.")] = None,
    expires_in: Annotated[str | None, typer.Option(help="Such as 12h or 30d; never without it.")] = None,
    owner: Annotated[str, typer.Option(help="Whose files, jobs and models it reaches.")] = LOCAL_OWNER,
) -> None:
    """Make a key. Its secret goes to stdout, this once; the rest to stderr."""
    from tuneloom.config import read_pepper
    from tuneloom.control import keys

    with open_store(context) as store:
        minted = keys.mint(
            store.records,
            read_pepper(read_settings(context)),
            owner=owner,
            name=name,
            scopes=scope or keys.DEFAULT_SCOPES,
            expires_in=expires_in,
        )
    key = minted.key
    typer.echo(f"key {key.id} of {key.owner} for {', '.join(key.scopes)}, expires {_day(key.expires_at)}", err=True)
    typer.echo(minted.secret)


@app.command("list")
def list_keys(
    context: typer.Context,
    owner: Annotated[str | None, typer.Option(help="Only the keys of this owner.")] = None,
    json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """The keys, newest first, without their secrets."""
    from tuneloom.control import keys

    with open_store(context) as store:
        found = keys.list_keys(store.records, owner)
    if json:
        print_json([key.model_dump(exclude={"hash"}) for key in found])
        return
    rows = [
        [key.id, key.owner, key.name, key.redacted, ",".join(key.scopes), _day(key.created_at), _end(key)]
        for key in found
    ]
    print_rows(["id", "owner", "name", "secret", "scopes", "created", "ends"], rows)


@app.command()
def revoke(context: typer.Context, id: Annotated[str, typer.Argument(help="The key's id, `key_...`.")]) -> None:
    """End a key. Requests with it are refused within seconds."""
    from tuneloom.control import keys

    with open_store(context) as store:
        keys.revoke(store.records, id)
    typer.echo(f"revoked {id}")


def _end(key: "ApiKey") -> str:
    return f"revoked {_day(key.revoked_at)}" if key.revoked_at else _day(key.expires_at)


def _day(at: float | None) -> str:
    return "never" if at is None else datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M")
