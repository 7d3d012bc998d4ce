"""`tuneloom keys`: made, changed and revoked in the store itself, so that it also works when nothing runs."""

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from tuneloom.cli.session import open_store, print_json, print_rows, read_settings
from tuneloom.domain import LOCAL_OWNER
from tuneloom.errors import InvalidRequest

if TYPE_CHECKING:
    from tuneloom.domain import ApiKey, Rates
    from tuneloom.store import Store

app = typer.Typer(help="API keys.", no_args_is_help=True)

Id = Annotated[str, typer.Argument(help="The key's id, `key_...`.")]
Models = Annotated[
    list[str] | None, typer.Option("--model", help="The only model or base that it may use; repeat it. All without.")
]
RequestsPerMinute = Annotated[int | None, typer.Option(min=1, help="At most so many requests.")]
RequestsPerDay = Annotated[int | None, typer.Option(min=1, help="At most so many requests.")]
TokensPerMinute = Annotated[int | None, typer.Option(min=1, help="At most so many tokens.")]


@app.command()
def create(
    context: typer.Context,
    name: Annotated[str, typer.Option(help="What the key is for.")] = "",
    scope: Annotated[list[str] | None, typer.Option(help="inference, training, account or admin; repeat it.")] = None,
    expires_in: Annotated[str | None, typer.Option(help="Such as 12h or 30d; never without it.")] = None,
    owner: Annotated[str, typer.Option(help="Whose files, jobs and models it reaches.")] = LOCAL_OWNER,
    model: Models = None,
    requests_per_minute: RequestsPerMinute = None,
    requests_per_day: RequestsPerDay = None,
    tokens_per_minute: TokensPerMinute = None,
) -> None:
    """Make a key. Its secret goes to stdout, this once; the rest to stderr."""
    from tuneloom.config import read_pepper
    from tuneloom.control import key_fields, keys

    with open_store(context) as store:
        minted = keys.mint(
            store.records,
            read_pepper(read_settings(context)),
            owner=key_fields.check_owner(owner),
            name=name,
            scopes=scope or keys.DEFAULT_SCOPES,
            expires_in=expires_in,
            models=_models(context, store, owner, model or []),
            rates=_rates(requests_per_minute, requests_per_day, tokens_per_minute),
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
        print_json([_public(key) for key in found])
        return
    rows = [
        [
            key.id,
            key.owner,
            key.name,
            key.redacted,
            ",".join(key.scopes),
            ",".join(key.models) or "all",
            _day(key.created_at),
            _day(key.last_used_at),
            _end(key),
        ]
        for key in found
    ]
    header = ["id", "owner", "name", "secret", "scopes", "models", "created", "last used", "ends"]
    print_rows(header, rows, none=f"no keys of {owner}" if owner else "no keys")


@app.command()
def show(context: typer.Context, id: Id) -> None:
    """One key, without its secret."""
    from tuneloom.control import keys

    with open_store(context) as store:
        print_json(_public(keys.find_key(store.records, id).value))


@app.command()
def update(
    context: typer.Context,
    id: Id,
    name: Annotated[str | None, typer.Option(help="What the key is for.")] = None,
    expires_in: Annotated[str | None, typer.Option(help="Such as 30d from now, or `never`.")] = None,
    model: Annotated[
        list[str] | None, typer.Option("--model", help="The only model or base that it may use; repeat it, or `all`.")
    ] = None,
    requests_per_minute: RequestsPerMinute = None,
    requests_per_day: RequestsPerDay = None,
    tokens_per_minute: TokensPerMinute = None,
) -> None:
    """Change a key; what is not named stays. Its secret stays too."""
    import time

    from tuneloom.control import audit, key_fields, keys

    rates = {
        "requests_per_minute": requests_per_minute,
        "requests_per_day": requests_per_day,
        "tokens_per_minute": tokens_per_minute,
    }
    if (name, expires_in, model, *rates.values()) == (None,) * 6:
        raise InvalidRequest("Say what to change, such as `--name phone`.")
    with open_store(context) as store:

        def change(key: "ApiKey") -> "ApiKey":
            changed: dict[str, object] = {}
            if name is not None:
                changed["name"] = key_fields.check_name(name)
            if expires_in is not None:
                changed["expires_at"] = key_fields.expiry(None if expires_in == "never" else expires_in, time.time())
            if model:
                models = () if model == ["all"] else _models(context, store, key.owner, model)
                changed["models"] = key_fields.check_reach(models, key.scopes)
            wanted = {field: value for field, value in rates.items() if value is not None}
            return key.model_copy(update={**changed, "rates": key.rates.model_copy(update=wanted)})

        keys.update(store.records, id, change, audit.cli_actor())
    typer.echo(f"updated {id}")


@app.command()
def rotate(
    context: typer.Context,
    id: Id,
    overlap: Annotated[str | None, typer.Option(help="How long the old secret still works, such as 1h.")] = None,
) -> None:
    """Give a key a new secret. It goes to stdout, this once."""
    from tuneloom.config import read_pepper
    from tuneloom.control import keys

    with open_store(context) as store:
        minted = keys.rotate(store.records, read_pepper(read_settings(context)), id, overlap)
    previous = minted.key.previous
    typer.echo(f"key {id}: the old secret ends {_day(previous.ends_at) if previous else 'now'}", err=True)
    typer.echo(minted.secret)


@app.command()
def revoke(
    context: typer.Context,
    id: Annotated[str | None, typer.Argument(help="The key's id, `key_...`.")] = None,
    owner: Annotated[str | None, typer.Option(help="Instead: all keys of this owner.")] = None,
) -> None:
    """End a key, or all of an owner. Requests with them are refused within seconds."""
    from tuneloom.control import keys

    if (id is None) == (owner is None):
        raise InvalidRequest("Name a key by its id, or with `--owner` whose keys shall all end.")
    with open_store(context) as store:
        found = [] if owner is None else keys.list_keys(store.records, owner)
        ids = [id] if id is not None else [key.id for key in found if key.revoked_at is None]
        for each in ids:
            keys.revoke(store.records, each)
            typer.echo(f"revoked {each}")
    if not ids:
        typer.echo(f"no keys of {owner} that work", err=True)


@app.command("rotate-pepper")
def rotate_pepper(context: typer.Context) -> None:
    """Hash secrets with a new pepper from here on. Keys go on working, and move to it when they are used.

    Peppers before the last are dropped once no working key needs them.
    """
    from tuneloom import config
    from tuneloom.control import audit, keys
    from tuneloom.domain import AuditTarget

    with open_store(context) as store:
        pepper = config.rotate_pepper(read_settings(context), lambda: keys.needed_peppers(store.records))
        waiting = keys.needed_peppers(store.records) - {pepper.id}
        target = AuditTarget(owner=LOCAL_OWNER, type="pepper", id=pepper.id)
        store.records.commit(audit.entry(audit.cli_actor(), "pepper.rotated", target))
    typer.echo(f"secrets are hashed with {pepper.id}; {len(waiting)} older ones are still needed")


def _models(context: typer.Context, store: "Store", owner: str, names: list[str]) -> tuple[str, ...]:
    from tuneloom.config import Pepper
    from tuneloom.control import key_fields
    from tuneloom.control.context import ApiContext

    find_base = ApiContext(read_settings(context), store, Pepper((b"",)), lambda: None).find_base_id
    return key_fields.check_models(store.records, owner, names, find_base)


def _rates(requests_per_minute: int | None, requests_per_day: int | None, tokens_per_minute: int | None) -> "Rates":
    from tuneloom.domain import Rates

    return Rates(
        requests_per_minute=requests_per_minute,
        requests_per_day=requests_per_day,
        tokens_per_minute=tokens_per_minute,
    )


def _public(key: "ApiKey") -> dict[str, object]:
    shown = key.model_dump(exclude={"hash", "pepper", "previous"})
    return {**shown, "previous_secret_ends_at": key.previous.ends_at if key.previous else None}


def _end(key: "ApiKey") -> str:
    return f"revoked {_day(key.revoked_at)}" if key.revoked_at else _day(key.expires_at)


def _day(at: float | None) -> str:
    return "never" if at is None else datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M")
