"""The commands as a tree. What they do is in the modules beside this one."""

from pathlib import Path
from typing import Annotated

import typer

from tuneloom.cli import (
    adapters,
    audit,
    bases,
    drafts,
    files,
    jobs,
    keys,
    limits,
    local,
    models,
    reproduce,
    store,
    usage,
    verify,
    webhooks,
)

app = typer.Typer(
    name="tuneloom",
    help="Fine-tune open language models and serve them through an OpenAI-compatible API, on your own machines.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(is_asked: bool) -> None:
    if is_asked:
        from importlib.metadata import version

        typer.echo(f"tuneloom {version('tuneloom')}")
        raise typer.Exit


@app.callback()
def _home(
    context: typer.Context,
    home: Annotated[
        Path | None,
        typer.Option(help="Folder of this installation's state.", envvar="TUNELOOM_HOME", show_default=".tuneloom"),
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    context.obj = home


app.command()(local.up)
app.command()(local.down)
app.command()(local.status)
app.command()(local.env)
app.command()(verify.verify)
app.command()(reproduce.reproduce)
app.command()(usage.usage)
app.command()(audit.audit)
app.add_typer(keys.app, name="keys")
app.add_typer(limits.app, name="limits")
app.add_typer(models.app, name="models")
models.app.command("import")(adapters.import_model)
models.app.command("import-layout")(adapters.import_layout)
models.app.command()(adapters.export)
app.add_typer(jobs.app, name="jobs")
app.add_typer(files.app, name="files")
app.add_typer(drafts.app, name="drafts")
app.add_typer(bases.app, name="bases")
app.add_typer(webhooks.app, name="webhooks")
app.add_typer(store.app, name="store")
