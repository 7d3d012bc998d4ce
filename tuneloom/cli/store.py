"""`tuneloom store`: an installation moved to another store, compared with it, and checked against its own records."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tuneloom.cli.session import Json, home_folder, open_store, print_json
from tuneloom.errors import Conflict, InvalidRequest

if TYPE_CHECKING:
    from tuneloom.config import Settings
    from tuneloom.store import Store
    from tuneloom.store.copy import Difference, Result

app = typer.Typer(help="Where records and blobs are kept.", no_args_is_help=True)

# A job whose trainer has said something since then is at work.
HEARTBEAT_S = 60.0
PLACE = "the home folder of an installation, or `DOCUMENTS_URL,BLOBS_URL`"


@app.command()
def copy(
    context: typer.Context,
    source: Annotated[str, typer.Argument(metavar="FROM", help=f"What is copied: {PLACE}.")],
    target: Annotated[str, typer.Argument(metavar="TO", help=f"Where it goes: {PLACE}.")],
    verify: Annotated[bool, typer.Option("--verify", help="Only compare both; write nothing.")] = False,
    json: Json = False,
) -> None:
    """Copy all records and blobs of an installation to another store, and compare both by their hashes.

    A home folder stands for the pair that its config.yaml names, or for SQLite and files in it. Such as:

      tuneloom store copy .tuneloom firestore:my-project,gs://my-bucket/tuneloom

    Stop both installations first. Nothing at TO is overwritten: what is the same there is left, anything else is told.
    A copy that was interrupted goes on when it is run again. Exit code 1 if both are not the same in the end.
    """
    from tuneloom.store.copy import compare_stores, copy_store

    places = (_Place.named(source), _Place.named(target))
    _refuse_overlap(*places)
    for place in places:
        place.refuse_running()
    places[0].refuse_absent()
    if verify:
        places[1].refuse_absent()
    started = time.monotonic()

    def report(line: str) -> None:
        typer.echo(f"[{time.monotonic() - started:4.0f} s] {line}", err=True)

    with places[0].open() as ours, places[1].open() as theirs:
        places[0].refuse_jobs(ours)
        result = (compare_stores if verify else copy_store)(ours, theirs, report)
    kept = places[0].secrets()
    if json:
        print_json({**result.as_json(), "not_in_the_store": [str(path) for path in kept]})
    else:
        _print_result(result, kept, is_copied=not verify)
    if not result.is_equal:
        raise typer.Exit(1)


@app.command()
def check(
    context: typer.Context,
    json: Json = False,
) -> None:
    """Read every stored file and adapter, and compare their hashes with their records. Exit code 1 if any differs."""
    from tuneloom.store.check import check_store

    _Place.at(home_folder(context)).refuse_absent()
    _Place.named(str(home_folder(context))).refuse_absent()
    with open_store(context) as store:
        checked = check_store(store, lambda line: typer.echo(line, err=True))
    if json:
        print_json(asdict(checked))
    else:
        _print_differences(checked.differences)
        typer.echo(f"{checked.files:,} files and {checked.adapters:,} adapters, {len(checked.differences):,} wrong")
    if checked.differences:
        raise typer.Exit(1)


@dataclass(frozen=True)
class _Place:
    """One side of a copy. `home` is None where its two URLs were given."""

    documents: str
    blobs: str
    home: Path | None = None
    settings: "Settings | None" = None

    @classmethod
    def named(cls, text: str) -> "_Place":
        documents, comma, blobs = (part.strip() for part in text.partition(","))
        if comma:
            return cls(documents, blobs)
        if ":" in text or not documents:
            what = "one URL" if documents else "no place"
            raise InvalidRequest(f"`{text}` is {what}. Name both, `DOCUMENTS_URL,BLOBS_URL`, or a home folder.")
        return cls.at(Path(text).absolute())

    @classmethod
    def at(cls, home: Path) -> "_Place":
        from tuneloom import config

        if home.exists() and not home.is_dir():
            raise InvalidRequest(f"`{home}` is a file. Name the home folder of an installation.")
        settings = config.load(home)
        return cls(settings.documents, settings.blobs, home, settings)

    @property
    def urls(self) -> tuple[str, str]:
        """The same for every spelling of a place."""
        return _plain(self.documents), _plain(self.blobs)

    @contextmanager
    def open(self) -> "Iterator[Store]":
        from tuneloom import store

        opened = store.open_pair(self.documents, self.blobs)
        try:
            yield opened
        finally:
            opened.close()

    def refuse_absent(self) -> None:
        """Opening local stores makes them, and an empty one is easily copied."""
        for url in (self.documents, self.blobs):
            scheme, _, path = url.partition(":")
            if scheme in ("sqlite", "file") and not Path(path).exists():
                raise InvalidRequest(f"There is nothing at `{url}`.")

    def refuse_running(self) -> None:
        from tuneloom import cluster

        if self.home is not None and cluster.processes(self.home):
            raise Conflict(f"tuneloom runs on {self.home}. Stop it first: `tuneloom --home {self.home} down`.")

    def refuse_jobs(self, store: "Store") -> None:
        running = store.records.jobs.query({"state": "running"})
        for job in running:
            said = store.records.progress.find(job.value.id)
            if said is not None and time.time() - said.value.heartbeat_at < HEARTBEAT_S:
                raise Conflict(
                    f"The job {job.value.id} is training. Stop the installation first: `tuneloom down` where it runs. "
                    "The job goes on where it was when one is started on either store."
                )

    def secrets(self) -> list[Path]:
        """What the installation keeps outside of its store, and cannot do without."""
        from tuneloom.config.pepper import pepper_path
        from tuneloom.config.secrets import SIGNING_KEY_FILE

        if self.home is None or self.settings is None:
            return []
        signing_key = self.settings.signing_key or self.home / SIGNING_KEY_FILE
        webhook_key = self.settings.webhooks.key_file or self.home / "webhook-key"
        found = (pepper_path(self.settings), signing_key, webhook_key, self.home / "admin-key")
        return [path for path in found if path.exists()]


def _refuse_overlap(source: _Place, target: _Place) -> None:
    if source.urls == target.urls:
        raise InvalidRequest("FROM and TO are the same store. Name two.")
    (_, here), (_, there) = source.urls, target.urls
    if here != there and (f"{here}/".startswith(f"{there}/") or f"{there}/".startswith(f"{here}/")):
        # Each would hold what the other holds, and a copy would never be done.
        raise InvalidRequest(
            f"The blobs of one lie inside those of the other: `{here}`, `{there}`. Name two places apart."
        )


def _plain(url: str) -> str:
    scheme, _, rest = url.partition(":")
    if scheme in ("sqlite", "file"):
        return f"{scheme}:{Path(rest).resolve()}"
    return f"{url}/(default)" if scheme == "firestore" and "/" not in rest else url.rstrip("/")


def _print_result(result: "Result", kept: list[Path], *, is_copied: bool) -> None:
    _print_differences(result.differences)
    same = f"{sum(result.records.values()):,} records and {result.blobs:,} blobs with {result.blob_bytes:,} bytes"
    typer.echo(f"the same on both sides: {same}")
    if is_copied:
        copied = f"{result.copied_records:,} records and {result.copied_blobs:,} blobs, {result.copied_bytes:,} bytes"
        typer.echo(f"copied now: {copied}")
    if result.differences:
        typer.echo(f"not the same: {len(result.differences):,}")
    if not result.differences:
        typer.echo("not in the store: secrets and bases. Bring the bases in by `tuneloom bases`, and move these:")
        names = [str(path) for path in kept] or [
            "pepper, signing-key.pem, webhook-key and admin-key of the home folder"
        ]
        for name in names:
            typer.echo(f"  {name}")
        typer.echo("Without the same pepper no API key is known any more.")


def _print_differences(differences: "list[Difference]") -> None:
    for difference in differences:
        typer.echo(f"FAIL  {difference}")
