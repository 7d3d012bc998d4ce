"""`tuneloom audit`: who did what, from the store itself."""

import time
from typing import TYPE_CHECKING, Annotated

import typer

from tuneloom.cli.session import Json, open_store, print_json, print_rows, show_time

if TYPE_CHECKING:
    from tuneloom.domain import AuditEntry


def audit(
    context: typer.Context,
    owner: Annotated[str | None, typer.Option(help="Only what was done to things of this owner.")] = None,
    type: Annotated[list[str] | None, typer.Option(help="Such as api_key.created; repeat it.")] = None,
    actor: Annotated[list[str] | None, typer.Option(help="The id of a key or a person; repeat it.")] = None,
    since: Annotated[str, typer.Option(help="How far back, such as 12h or 30d.")] = "30d",
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="The newest so many.")] = 100,
    json: Json = False,
) -> None:
    """Who did what to keys, jobs, models, files and adapters, newest first."""
    from tuneloom.control.api_audit import Filter, read_entries
    from tuneloom.control.key_fields import parse_duration

    wanted = Filter(
        owner=owner,
        types=frozenset(type or ()),
        actors=frozenset(actor or ()),
        since=time.time() - (parse_duration(since, param="since") or 0),
    )
    with open_store(context) as store:
        entries, has_more = read_entries(store.records, wanted, limit)
    if json:
        print_json([entry.model_dump() for entry in entries])
        return
    print_rows(["time", "action", "owner", "what", "by", "from"], [_row(entry) for entry in entries], none="no entries")
    if has_more:
        typer.echo(f"These are the newest {limit}; `--limit` shows more.", err=True)


def _row(entry: "AuditEntry") -> list[str]:
    return [
        show_time(entry.created_at),
        entry.action,
        entry.owner,
        entry.target.name or entry.target.id,
        f"{entry.actor.kind} {entry.actor.id}",
        entry.actor.address or "-",
    ]
