"""Adapters in and out: `tuneloom models import`, `import-layout` and `export`."""

import dataclasses
import json as jsons
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tuneloom.cli.models import AnyName, Owner, holder_of
from tuneloom.cli.session import open_store, print_json, print_rows, read_settings
from tuneloom.config import Pepper
from tuneloom.domain import LOCAL_OWNER
from tuneloom.errors import InvalidRequest

if TYPE_CHECKING:
    from tuneloom.config import Settings
    from tuneloom.domain import AdapterRef
    from tuneloom.store import Store


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
        holder = holder_of(store, owner, name)
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


def _split_pair(pair: str) -> tuple[str, str]:
    old, separator, new = pair.partition("=")
    if not separator or not old or not new:
        raise InvalidRequest(f"Invalid `--base-map`: {pair!r}. Use OLD=NEW.")
    return old, new


def _base_of(settings: "Settings", folder: Path) -> str:
    """The base that the adapter's config names, if it is one of ours; else the only one that we serve."""
    try:
        named = jsons.loads((folder / "adapter_config.json").read_bytes()).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise InvalidRequest(f"{folder} is not an adapter folder: no readable `adapter_config.json`.") from error
    ids = {base.id for base in settings.bases} | set(settings.base_aliases)
    return named if isinstance(named, str) and (named in ids or len(settings.bases) > 1) else settings.bases[0].id
