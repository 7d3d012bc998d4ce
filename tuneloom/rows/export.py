"""JSON Lines as CSV or as a JSON array, so that an upload of either gives equal rows. Two passes, bounded memory.

What a format cannot express is refused by the number of the row before the first byte comes.
"""

import csv
import io
import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Literal

from tuneloom.errors import InvalidFile
from tuneloom.rows.convert import joined
from tuneloom.rows.csv_rows import TABLES, Table
from tuneloom.rows.fields import Wrong, kind_of, quoted
from tuneloom.rows.parse import parse
from tuneloom.rows.raw import RawRow, raw_rows
from tuneloom.rows.scan import MAX_LINE_BYTES, Scan

ExportFormat = Literal["jsonl", "json", "csv"]


def plan_export(file: BinaryIO, kind: Literal["json", "csv"]) -> list[str]:
    """The first pass: the columns of the CSV file, none for JSON.

    Raises:
        InvalidFile: a row is wrong, or `kind` cannot express it; the message names the row and the reason.
    """
    scan, columns, row = Scan(method=None), _Columns(), None
    for row in raw_rows(file):
        try:
            data = _parsed(row)
            scan.row(data)
            if kind == "csv":
                columns.add(row.number, data)
        except Wrong as problem:
            raise _refused(kind, f"Row {row.number:,} (line {row.line:,}): {problem}") from None
    if row is None:
        raise _refused(kind, "It has no rows.")
    return columns.names


def export(file: BinaryIO, kind: Literal["json", "csv"], columns: list[str]) -> Iterator[bytes]:
    """The second pass: the rows in pieces of about a megabyte. Closes the file at its end, or when it is closed."""
    with closing(file):
        yield from joined(_json(file) if kind == "json" else _csv(file, columns))


def _refused(kind: str, reason: str) -> InvalidFile:
    name = "CSV" if kind == "csv" else "JSON"
    return InvalidFile(
        f"The file cannot be exported as {name}. {reason} The format `jsonl` gives it as it is stored.",
        param="format",
        code="not_exportable",
    )


def _parsed(row: RawRow) -> dict[str, Any]:
    if row.raw is None:
        raise Wrong(f"The line is longer than {MAX_LINE_BYTES:,} bytes.")
    return parse(row.raw)


def _json(file: BinaryIO) -> Iterator[bytes]:
    start = b"[\n"
    for row in raw_rows(file):
        yield start + (row.raw or b"")
        start = b",\n"
    yield b"\n]\n"


def _csv(file: BinaryIO, columns: list[str]) -> Iterator[bytes]:
    yield _line(columns)
    for row in raw_rows(file):
        yield _line(_cells(parse(row.raw or b""), columns))


def _cells(data: dict[str, Any], columns: list[str]) -> list[str]:
    """Strings as they are, everything else as JSON, nothing for what is missing."""
    table = _table_of(data)
    return [
        "" if name not in data else _json_text(data[name]) if name in table.json else data[name] for name in columns
    ]


def _line(cells: list[str]) -> bytes:
    out = io.StringIO(newline="")
    csv.writer(out, quoting=csv.QUOTE_ALL, lineterminator="\r\n").writerow(cells)
    return out.getvalue().encode()


def _json_text(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise Wrong("It holds a number that is too large to be written again.") from None


def _table_of(data: dict[str, Any]) -> Table:
    tables = [table for table in TABLES if {*table.required} <= data.keys()]
    if not tables:
        keys = ", ".join(quoted(key) for key in list(data)[:8])
        raise Wrong(f"No CSV columns make a row with the keys {keys}.")
    return max(tables, key=lambda table: len(table.required))


@dataclass
class _Columns:
    """The columns that the rows need so far. CSV knows no difference between an empty string and none at all."""

    names: list[str] = field(default_factory=list)
    _without: dict[str, int] = field(default_factory=dict)
    _rows: int = 0

    def add(self, number: int, data: dict[str, Any]) -> None:
        """Raises Wrong if the row cannot be written so that it comes back."""
        table = _table_of(data)
        known = (*table.required, *table.optional)
        for name in data:
            if name not in known:
                raise Wrong(f"CSV has no column for {quoted(name)} beside {table.name}.")
        # In the order of the rows themselves, so that they come back with it.
        for name in (*data, *(name for name in known if name not in data)):
            if name not in table.json:
                self._add_string(number, name, data)
            elif name in data and name not in self.names:
                self.names.append(name)
        self._rows += 1
        size = max(len(_line(_cells(data, self.names))), len(_json_text(data).encode()))
        if size > MAX_LINE_BYTES:
            raise Wrong(f"As CSV it is longer than {MAX_LINE_BYTES:,} bytes.")

    def _add_string(self, number: int, name: str, data: dict[str, Any]) -> None:
        if name not in data:
            self._without.setdefault(name, number)
            if name in self.names:
                raise Wrong(f"It has no `{name}` and rows before it have one; CSV cannot tell that from an empty one.")
            return
        if not isinstance(data[name], str):
            raise Wrong(f"`{name}` is {kind_of(data[name])}; a column of this name holds strings.")
        if name in self._without:
            raise Wrong(
                f"It has `{name}` and row {self._without[name]:,} has none; CSV cannot tell that from an empty one."
            )
        if name not in self.names:
            self.names.append(name)
