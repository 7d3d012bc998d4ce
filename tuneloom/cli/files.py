"""`tuneloom files`: training files, by the API, and their check on this machine without a server."""

import json as jsons
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import typer

from tuneloom.cli.session import Api, Json, print_json, print_rows, read_settings, show_time

if TYPE_CHECKING:
    from tuneloom.config import Settings
    from tuneloom.domain import JobSpec
    from tuneloom.train.check import Report
    from tuneloom.train.report import FileReport

app = typer.Typer(help="Training files.", no_args_is_help=True)

FILES = "/v1/files"
OURS = "/v1/tuneloom/files"
CHUNK_BYTES = 1 << 20

FileId = Annotated[str, typer.Argument(help="The file's id, `file-...`.")]


@app.command("list")
def list_files(
    context: typer.Context,
    limit: Annotated[int, typer.Option(help="At most so many.", min=1, max=10_000)] = 100,
    json: Json = False,
) -> None:
    """Uploaded files, newest first."""
    found = Api(read_settings(context)).get(FILES, limit=limit)["data"]
    if json:
        print_json(found)
        return
    rows = [
        [file["id"], f"{file['bytes']:,}", show_time(file["created_at"]), file["purpose"], file["filename"]]
        for file in found
    ]
    print_rows(["id", "bytes", "created", "purpose", "name"], rows)


@app.command()
def upload(
    context: typer.Context,
    path: Annotated[Path, typer.Argument(help="A file of rows, such as rows.jsonl.", exists=True, dir_okay=False)],
    purpose: Annotated[str, typer.Option(help="What it is for.")] = "fine-tune",
) -> None:
    """Upload a file and print its id."""
    api = Api(read_settings(context))
    with path.open("rb") as source:
        file = api.post(FILES, files={"file": (path.name, source)}, data={"purpose": purpose})
    typer.echo(file["id"])


@app.command()
def show(context: typer.Context, id: FileId) -> None:
    """All that the API tells of a file."""
    print_json(Api(read_settings(context)).get(f"{FILES}/{id}"))


@app.command()
def delete(context: typer.Context, id: FileId) -> None:
    """Delete a file that no unfinished job needs."""
    Api(read_settings(context)).delete(f"{FILES}/{id}")
    typer.echo(f"deleted {id}")


@app.command()
def rows(
    context: typer.Context,
    id: FileId,
    after: Annotated[int, typer.Option(help="The number of the last row seen.", min=0)] = 0,
    limit: Annotated[int, typer.Option(help="At most so many.", min=1, max=1000)] = 20,
    json: Json = False,
) -> None:
    """Rows of a file, a line of JSON each. What is wrong with them goes to stderr, with their numbers."""
    page = Api(read_settings(context)).get(f"{OURS}/{id}/rows", after=after, limit=limit)
    if json:
        print_json(page)
        return
    for row in page["data"]:
        typer.echo(jsons.dumps(row["data"], ensure_ascii=False))
        for problem in row["problems"]:
            typer.echo(f"row {row['row']}: {problem['message']}", err=True)


@app.command()
def export(
    context: typer.Context,
    id: FileId,
    format: Annotated[str, typer.Option(help="jsonl, json or csv; an upload of it gives equal rows.")] = "jsonl",
    to: Annotated[Path | None, typer.Option(help="The new file.", show_default="ID.FORMAT")] = None,
) -> None:
    """Write a file of rows to this machine."""
    target = to or Path(f"{id}.{format}")
    Api(read_settings(context)).save(f"{OURS}/{id}/export", target, format=format)
    typer.echo(str(target))


@app.command()
def check(
    context: typer.Context,
    path: Annotated[Path, typer.Argument(help="A file of rows on this machine.", exists=True, dir_okay=False)],
    base: Annotated[str | None, typer.Option(help="The base to train on.", show_default="the first served")] = None,
    validation: Annotated[
        Path | None, typer.Option(help="A file of rows for the validation loss.", exists=True, dir_okay=False)
    ] = None,
    method: Annotated[str, typer.Option(help="supervised or dpo.")] = "supervised",
    max_length: Annotated[int | None, typer.Option(help="The longest row, in tokens.")] = None,
    long_rows: Annotated[str, typer.Option(help="What becomes of longer ones: refuse or cut.")] = "refuse",
    loss_on: Annotated[str, typer.Option(help="What is learned: answers or all.")] = "answers",
    validation_share: Annotated[float | None, typer.Option(help="Part of the rows to hold out.")] = None,
    seed: Annotated[int, typer.Option(help="That of the job: it chooses which rows are held out.")] = 0,
    json: Json = False,
) -> None:
    """What there is to say of local files before a job trains on them. Exit code 1 if it could not.

    Nothing needs to run, and nothing is uploaded.
    """
    from tuneloom.rows import InvalidRows
    from tuneloom.train.check import Check, of_unread

    settings = read_settings(context)
    options = {
        "max_length": max_length,
        "long_rows": long_rows,
        "loss_on": loss_on,
        "validation_share": validation_share,
    }
    spec = _spec(settings, base, method, seed, options, has_validation=validation is not None)
    checking = Check(settings, spec)
    report: Report | None = None
    names = {}
    for param, file in (("training_file", path), ("validation_file", validation)):
        if file is None:
            continue
        names[param] = file.name
        try:
            with _open_rows(file) as source:
                checking.read(param, file.name, source)
        except InvalidRows as error:
            report = report or of_unread(param, file.name, error)
    report = report or checking.report()
    if json:
        print_json(report.as_json())
    else:
        _print(report, spec, names)
    if report.error is not None:
        raise typer.Exit(1)


@contextmanager
def _open_rows(path: Path) -> Iterator[BinaryIO]:
    """The file as JSON Lines, as an upload would store it. Raises InvalidRows if a row of CSV or JSON is wrong."""
    from tuneloom.rows import to_json_lines

    with path.open("rb") as source:
        if path.suffix.lower() not in (".csv", ".json"):
            yield source
            return
        with tempfile.TemporaryFile() as lines:
            chunks = iter(lambda: source.read(CHUNK_BYTES), b"")
            for piece in to_json_lines(chunks, "csv" if path.suffix.lower() == ".csv" else "json"):
                lines.write(piece)
            lines.seek(0)
            yield lines


def _spec(
    settings: "Settings", base: str | None, method: str, seed: int, options: dict[str, Any], *, has_validation: bool
) -> "JobSpec":
    """The job that would train on the files. Raises InvalidRequest naming the option that is wrong."""
    from pydantic import ValidationError

    from tuneloom.domain import JobSpec, TrainOptions, check_settings_agree
    from tuneloom.errors import InvalidRequest

    name = base or settings.bases[0].id
    try:
        spec = JobSpec(
            base=settings.base_aliases.get(name, name),
            training_file="training",
            validation_file="validation" if has_validation else None,
            seed=seed,
            method=method,  # type: ignore[arg-type]
            options=TrainOptions(**options),
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidRequest(f"`--{str(first['loc'][-1]).replace('_', '-')}`: {first['msg']}.") from error
    check_settings_agree(spec)
    return spec


def _print(report: "Report", spec: "JobSpec", names: dict[str, str]) -> None:
    typer.echo(f"for {spec.base}, {spec.method}")
    for _, file in report.files:
        typer.echo(f"\n{file.filename}" + (f" ({file.format})" if file.format else ""))
        for label, text in _facts(file, cuts=spec.options.long_rows == "cut"):
            typer.echo(f"  {label:18} {text}")
    if report.error is None:
        if spec.options.validation_share is not None:
            held = report.validation
            typer.echo(f"\nheld out for validation: {held.rows:,} rows, {held.tokens:,} tokens")
        warnings = [note.message for note in report.notes if note.level == "warn"]
        typer.echo("".join(f"\nwarning: {text}" for text in warnings) + "\nit can be trained on")
        return
    typer.echo(f"\nit cannot be trained on: {report.problem_count:,} problem{'' if report.problem_count == 1 else 's'}")
    for problem in report.problems:
        typer.echo(f"  {names[problem.param]}, {problem.text}")
    if rest := report.problem_count - len(report.problems):
        typer.echo(f"  and {rest:,} more")


def _facts(file: "FileReport", *, cuts: bool) -> list[tuple[str, str]]:
    """What is worth a line, with its label."""
    sizes = f"p50 {file.tokens_p50:,}, p95 {file.tokens_p95:,}, max {file.tokens_max:,}, limit {file.limit:,}"
    facts = [
        ("rows", f"{file.rows:,}"),
        ("tokens", f"{file.tokens:,} ({sizes})"),
        ("learned tokens", f"{file.learned_tokens:,}"),
    ]
    if file.long_rows:
        lost = f"{file.lost_tokens:,} tokens are cut" if cuts else f"--long-rows cut would lose {file.lost_tokens:,}"
        facts.append(("rows too long", f"{file.long_rows:,} ({lost})"))
    if file.unlearnable_rows:
        facts.append(("nothing to learn", f"{file.unlearnable_rows:,} rows"))
    if file.duplicate_rows:
        pairs = ", ".join(f"line {line} = {first}" for line, first in file.duplicates)
        rest = ", ..." if file.duplicate_rows > len(file.duplicates) else ""
        facts.append(("repeated rows", f"{file.duplicate_rows:,} ({pairs}{rest})"))
    if file.rewritten_answers:
        facts.append(("rewritten answers", f"{file.rewritten_answers:,}, not learned"))
    return facts
