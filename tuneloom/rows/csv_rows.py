"""Rows of a CSV file (RFC 4180) whose header names the columns of a format. Strings, and cells that hold JSON."""

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from json.encoder import encode_basestring
from typing import Any, BinaryIO

from tuneloom.rows.fields import Place, Wrong, WrongAt, first_repeated, quoted
from tuneloom.rows.parse import BOM, check_encoding, parse_value


@dataclass(frozen=True)
class Table:
    """Columns that make a format. Cells of `json` columns hold JSON; in optional ones they may be empty."""

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    json: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"`{','.join([*self.required, *(f'[{name}]' for name in self.optional)])}`"


@dataclass(frozen=True)
class _Column:
    """`start` is how its member of an object begins."""

    name: str
    start: str
    is_json: bool
    is_optional: bool


TABLES = (
    Table(
        ("messages",),
        ("tools", "functions", "parallel_tool_calls"),
        json=("messages", "tools", "functions", "parallel_tool_calls"),
    ),
    Table(("prompt", "completion")),
    Table(("instruction", "output"), ("input",)),
    Table(("input", "output")),
    Table(("text",)),
    Table(("conversations",), ("system", "tools"), json=("conversations", "tools")),
    Table(("prompt", "chosen", "rejected")),
    *(
        Table(columns, json=columns)
        for columns in (
            ("input", "preferred_output", "non_preferred_output"),
            ("input", "preferred_completion", "non_preferred_completion"),
        )
    ),
)


class CsvRows:
    """Iterates over rows as places and cells, in the memory of one; `encode` makes a row's JSON of its cells."""

    def __init__(self, file: BinaryIO, max_row_bytes: int) -> None:
        # The module's one limit for all readers; that of a row, in `_Lines`, is the one that counts.
        csv.field_size_limit(max(csv.field_size_limit(), max_row_bytes))
        self._lines = _Lines(file, max_row_bytes)
        self._reader = csv.reader(self._lines, strict=True)
        self._columns: list[_Column] = []

    def __iter__(self) -> Iterator[tuple[Place, list[str]]]:
        """Raises WrongAt where the file cannot be read on."""
        self._read_header()
        number, line = 0, self._reader.line_num + 1
        while True:
            place = Place(number + 1, line)
            cells = self._next(place)
            if cells is None:
                return
            if cells:
                number += 1
                yield place, cells
            line = self._reader.line_num + 1

    def encode(self, cells: list[str]) -> tuple[bytes, dict[str, Any]]:
        """The row as JSON and as what that holds. Raises Wrong if these cells are no row."""
        if len(cells) != len(self._columns):
            raise Wrong(f"Cells: {len(cells):,}. Columns of the header: {len(self._columns)}.")
        members, data = [], {}
        for column, cell in zip(self._columns, cells, strict=True):
            if column.is_json:
                if column.is_optional and not cell.strip():
                    continue
                data[column.name] = _parsed(column.name, cell)
                # Between its tokens JSON may have line ends, and within strings it has none.
                members.append(column.start + cell.replace("\r", " ").replace("\n", " "))
            else:
                data[column.name] = cell
                members.append(column.start + encode_basestring(cell))
        return f"{{{', '.join(members)}}}".encode(), data

    def _read_header(self) -> None:
        place = Place(None, 1)
        header = self._next(place)
        if not header:
            raise WrongAt(place, "The first line is empty. It holds the names of the columns.")
        names = [name.strip() for name in header]
        try:
            table = _table_of(names)
        except Wrong as problem:
            raise WrongAt(place, str(problem)) from None
        self._columns = [_Column(name, f'"{name}": ', name in table.json, name in table.optional) for name in names]

    def _next(self, place: Place) -> list[str] | None:
        self._lines.start_row()
        try:
            return next(self._reader, None)
        except csv.Error as error:
            raise WrongAt(place, _explained(str(error))) from None
        except Wrong as problem:
            raise WrongAt(place, str(problem)) from None


class _Lines:
    """Lines of text for a `csv.reader`. Those of one row may have `max_bytes` together."""

    def __init__(self, file: BinaryIO, max_bytes: int) -> None:
        self._file = file
        self._max_bytes = max_bytes
        self._left = max_bytes
        self._is_first = True

    def start_row(self) -> None:
        self._left = self._max_bytes

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        raw = self._file.readline(self._left + 1)
        if self._is_first:
            check_encoding(raw)
            raw = raw.removeprefix(BOM)
            self._is_first = False
        if not raw:
            raise StopIteration
        self._left -= len(raw)
        if self._left < 0:
            raise Wrong(f"It is longer than {self._max_bytes:,} bytes. A quote may be missing at the end of a cell.")
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise Wrong(f"Not UTF-8: the byte 0x{raw[error.start]:02x}. Save the file as `CSV UTF-8`.") from None


def _table_of(columns: list[str]) -> Table:
    """Raises Wrong if the columns are those of no format."""
    if (twice := first_repeated(columns)) is not None:
        raise Wrong(f"The header names the column {quoted(twice)} twice.")
    for table in TABLES:
        if {*table.required} <= {*columns} <= {*table.required, *table.optional}:
            return table
    if len(columns) == 1 and (separator := next((mark for mark in ";\t|" if mark in columns[0]), None)):
        raise Wrong(f"The header's columns are separated by {quoted(separator)}. Separate cells by commas.")
    if columns[0].startswith(("[", "{")):
        raise Wrong("The file is JSON, not CSV. Give its name the end `.json`, or `.jsonl` for one object per line.")
    known = [table for table in TABLES if {*table.required} <= {*columns}]
    if known:
        table = max(known, key=lambda table: len(table.required))
        unknown = [name for name in columns if name not in (*table.required, *table.optional)]
        names = ", ".join(quoted(name) for name in unknown[:5])
        raise Wrong(f"Unknown column beside {table.name}: {names}. Remove it.")
    names = ", ".join(quoted(name) for name in columns[:8])
    formats = ", ".join(table.name for table in TABLES)
    raise Wrong(f"The header's columns are those of no format: {names}. Formats are {formats}.")


def _parsed(column: str, cell: str) -> Any:
    try:
        return parse_value(cell.encode())
    except Wrong as problem:
        if cell.lstrip().startswith(("[{'", "{'")):
            raise Wrong(f"`{column}` holds Python's notation. Write it as JSON, by `json.dumps`.") from None
        raise Wrong(f"`{column}`: {problem}") from None


def _explained(message: str) -> str:
    if message.startswith("unexpected end of data"):
        return "A quote is opened and never closed."
    if "expected after" in message:
        return "A quoted cell goes on after its closing quote. Write a quote within a cell twice."
    if message.startswith("new-line character"):
        return "A carriage return stands outside of quotes. Save the file with the line ends of Windows or Unix."
    return f"{message}."
