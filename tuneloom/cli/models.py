"""`tuneloom models`: tuned models and their versions, changed in the store itself; a running API follows at once."""

import dataclasses
import json as jsons
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tuneloom.cli.session import Api, Json, open_store, print_json, print_rows, read_settings, show_time
from tuneloom.config import Pepper
from tuneloom.domain import LOCAL_OWNER
from tuneloom.errors import InvalidRequest, ModelNotFound

if TYPE_CHECKING:
    from tuneloom.config import Settings
    from tuneloom.domain import AdapterRef, Checkpoint, Version
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


@app.command("import")
def import_model(
    context: typer.Context,
    folder: Annotated[
        Path, typer.Argument(help="A PEFT adapter folder: adapter_config.json, adapter_model.safetensors.")
    ],
    name: Annotated[str | None, typer.Option(help="The model to add it to; the folder's name without it.")] = None,
    base: Annotated[str | None, typer.Option(help="The base it was trained on, if its config names another.")] = None,
    owner: Owner = LOCAL_OWNER,
) -> None:
    """Add an adapter that was trained elsewhere as a model's next version."""
    from tuneloom import bases
    from tuneloom.control import models
    from tuneloom.control.context import ApiContext

    settings = read_settings(context)
    base_id = base or _base_of(settings, folder)
    entry = next((entry for entry in settings.bases if entry.id == settings.base_aliases.get(base_id, base_id)), None)
    if entry is None:
        served = ", ".join(f"`{entry.id}`" for entry in settings.bases)
        raise InvalidRequest(f"The base `{base_id}` is not served here. Served: {served}. Name one with `--base`.")
    name = name or folder.resolve().name
    with open_store(context) as store:
        ApiContext(settings, store, Pepper((b"",)), lambda: None).check_free_name(name, param="name")
        version = models.import_adapter(
            store, owner, bases.get_base(settings.bases_dir, entry.id), name, folder, max_rank=entry.engine.max_rank
        )
    typer.echo(f"{version.pinned_name} ({version.ft_name})")


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
def export(
    context: typer.Context,
    name: AnyName,
    to: Annotated[Path | None, typer.Option("--to", help="The folder to make; the model's name without it.")] = None,
    merged: Annotated[
        bool, typer.Option("--merged", help="The whole model, the adapter merged into the base's weights.")
    ] = False,
    dtype: Annotated[
        str | None, typer.Option(help="Of merged weights: bf16 or fp32; that of the base without it.")
    ] = None,
    owner: Owner = LOCAL_OWNER,
) -> None:
    """Write an adapter as a folder that plain `peft` loads, or merged as one that plain `transformers` loads."""
    from tuneloom.control import audit, exports, models
    from tuneloom.store.drafts import draft_folder

    if dtype is not None and (not merged or dtype not in ("bf16", "fp32")):
        raise InvalidRequest(
            f"Invalid `--dtype`: {dtype!r}. Use `bf16` or `fp32`." if merged else "`--dtype` goes with `--merged`."
        )
    with open_store(context) as store:
        holder = _holder(store, owner, name)
        ref, base = holder.adapter, holder.base
        target = to or Path(name.replace("@", "-").replace(":", "-").replace("/", "-"))
        with draft_folder(target) as draft:
            if merged:
                said = _merge(read_settings(context), store, ref, draft, name=name, base_id=base, dtype=dtype)
            else:
                exports.write_adapter(store.blobs, ref, draft, name=name, base=base)
                said = f"rank {ref.rank}, {ref.size_bytes / 1e6:.1f} MB"
            store.records.commit(models.download_entry(audit.cli_actor(), holder, merged=merged))
    typer.echo(f"{target} ({said})")


# The name of it before there was a merged form.
app.command("download", hidden=True)(export)


@app.command("import-layout")
def import_layout(
    context: typer.Context,
    source: Annotated[str, typer.Argument(help="A folder or gs://BUCKET/PREFIX with models/NAME/vN/adapter.")],
    base_map: Annotated[
        list[str] | None, typer.Option("--base-map", help="OLD=NEW: the base that OLD is called here; repeatable.")
    ] = None,
    owner: Owner = LOCAL_OWNER,
    json: Annotated[bool, typer.Option("--json", help="For programs: also the settings that were found.")] = False,
) -> None:
    """Add the models and versions of a folder or bucket in the layout `models/NAME/vN/adapter`; again: the rest."""
    from tuneloom.control import layout
    from tuneloom.control.context import ApiContext

    renamed = dict(_split_pair(pair) for pair in base_map or ())
    with open_store(context) as store, layout.at_hand(source) as folder:
        api = ApiContext(read_settings(context), store, Pepper((b"",)), lambda: None)
        results = layout.import_layout(api, owner, folder, renamed)
    if json:
        print_json([dataclasses.asdict(result) for result in results])
    else:
        print_rows(
            ["found", "result", "as", "base", "note"],
            [[r.found, r.result, r.added_as or "-", r.base or "-", r.note] for r in results],
        )
    if any(result.result == "refused" for result in results):
        raise typer.Exit(1)


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
        base = _holder(store, owner, name).base
    path = f"/v1/tuneloom/bases/{base}/{action}"
    done = Api(read_settings(context)).post(path, {"model": name, "owner": owner}, timeout=ACT_TIMEOUT_S)
    rows = [[each["id"], each["error"]["message"] if each["status"] != "ok" else "ok"] for each in done["replicas"]]
    print_rows(["replica", action], rows)
    if not rows:
        typer.echo(f"{base} has no replica at the moment")
    if done["failed"]:
        raise typer.Exit(1)


def _merge(
    settings: "Settings",
    store: "Store",
    ref: "AdapterRef",
    draft: Path,
    *,
    name: str,
    base_id: str,
    dtype: Any,
) -> str:
    """Fill `draft` with the merged model; returns what is to be said of it."""
    import psutil

    from tuneloom import bases
    from tuneloom.control import exports
    from tuneloom.store.artifacts import fetch_adapter
    from tuneloom.train.merge import memory_needed, merge

    base = bases.get_base(settings.bases_dir, base_id)
    needed, free = memory_needed(base), psutil.virtual_memory().available
    if needed > free:
        raise InvalidRequest(
            f"Merging into `{base_id}` takes {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free. "
            "Do it where there is more, or export the adapter without `--merged`."
        )
    with tempfile.TemporaryDirectory(prefix="tuneloom-adapter-") as cache:
        adapter = fetch_adapter(store.blobs, ref, Path(cache))
        made = merge(base, adapter, draft, dtype=dtype, say=lambda text: typer.echo(text, err=True))
    exports.write_merged_readme(draft, name=name, base=base_id)
    exports.copy_lineage(store.blobs, ref, draft)
    return (
        f"{made.dtype}, {made.size_bytes / 1e6:,.0f} MB; logits differ from base and adapter by {made.difference:.1g} "
        f"of the largest, where the adapter changes them by {made.effect:.1g}"
    )


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


def _split_pair(pair: str) -> tuple[str, str]:
    old, separator, new = pair.partition("=")
    if not separator or not old or not new:
        raise InvalidRequest(f"Invalid `--base-map`: {pair!r}. Use OLD=NEW.")
    return old, new


def _holder(store: "Store", owner: str, name: str) -> "Version | Checkpoint":
    """What has the adapter that a name calls."""
    from tuneloom.store.names import find_named

    found = find_named(store.records, owner, name)
    for stored in (found.version, found.checkpoint) if found else ():
        if stored is not None:
            return stored.value
    raise ModelNotFound.named(name)


def _base_of(settings: "Settings", folder: Path) -> str:
    """The base that the adapter's config names, if it is one of ours; else the only one that we serve."""
    try:
        named = jsons.loads((folder / "adapter_config.json").read_bytes()).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise InvalidRequest(f"{folder} is not an adapter folder: no readable `adapter_config.json`.") from error
    ids = {base.id for base in settings.bases} | set(settings.base_aliases)
    return named if isinstance(named, str) and (named in ids or len(settings.bases) > 1) else settings.bases[0].id
