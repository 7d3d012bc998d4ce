"""Rows as they are stored: their numbers, lines and bytes, and a page of them for people. One pass, bounded memory."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from tuneloom.rows.fields import Wrong
from tuneloom.rows.parse import BOM, parse
from tuneloom.rows.scan import MAX_LINE_BYTES, Problem, Scan, numbered_lines


@dataclass(frozen=True)
class RawRow:
    """Row `number`, from 1, on line `line`. `raw` is without a mark or a line end; None: longer than is allowed."""

    number: int
    line: int
    raw: bytes | None


@dataclass(frozen=True)
class SeenRow:
    """A row as a page shows it. `json` is the object as it is stored, every number as it is written, and None where
    there is none; `problems` say why it cannot be learned.
    """

    number: int
    line: int
    json: str | None
    problems: tuple[Problem, ...]


@dataclass(frozen=True)
class RowPage:
    rows: tuple[SeenRow, ...]
    has_more: bool
    format: str | None


def raw_rows(file: BinaryIO, max_bytes: int = MAX_LINE_BYTES) -> Iterator[RawRow]:
    """Every row of a file of JSON Lines; empty lines are none."""
    number = 0
    for line, raw in numbered_lines(file, max_bytes):
        if raw is not None:
            raw = raw.removeprefix(BOM) if line == 1 else raw
            if not raw.strip():
                continue
            raw = raw.strip(b" \t\r\n")
        number += 1
        yield RawRow(number, line, raw)


def read_page(file: BinaryIO, *, after: int, limit: int, max_bytes: int) -> RowPage:
    """At most `limit` rows behind row `after`, and of about `max_bytes`; one at least if there is one.

    Each is checked as an upload's are, against the format of the file's first row.
    """
    scan, found, size, has_more = Scan(method=None), [], 0, False
    for row in raw_rows(file):
        if row.number <= after and scan.format is not None:
            continue
        seen = _seen(scan, row)
        if row.number <= after:
            continue
        if len(found) == limit or (found and size + len(row.raw or b"") > max_bytes):
            has_more = True
            break
        size += len(row.raw or b"")
        found.append(seen)
    return RowPage(tuple(found), has_more, scan.format)


def _seen(scan: Scan, row: RawRow) -> SeenRow:
    text = None
    try:
        if row.raw is None:
            raise Wrong(f"The line is longer than {MAX_LINE_BYTES:,} bytes. Split the row.")
        data = parse(row.raw)
        text = row.raw.decode()
        scan.row(data)
    except Wrong as problem:
        return SeenRow(row.number, row.line, text, (Problem(row.line, str(problem)),))
    return SeenRow(row.number, row.line, text, ())
