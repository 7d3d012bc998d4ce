"""One pass over a file of rows in bounded memory: lines, encoding, JSON, and the list of problems."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from tuneloom.rows.fields import Wrong
from tuneloom.rows.formats import Method, Row, check_method, format_of
from tuneloom.rows.parse import BOM, check_encoding, parse

MAX_PROBLEMS = 100
MAX_LINE_BYTES = 8 << 20


# `messages[0]`: `content` is ...; or: Unknown key in `messages[0]`: `foo`.
_FIELD = re.compile(r"(?:Unknown key in )?((?:`[^` ]+`: )*`[^` ]+`)(?=[ :.,])")


@dataclass(frozen=True)
class Problem:
    """One thing wrong; `line` counts from 1, None when it concerns the file."""

    line: int | None
    message: str

    @property
    def field(self) -> str | None:
        """The path in the row with which the sentence begins, such as `messages[0].content`."""
        return field_of(self.message)


def field_of(message: str) -> str | None:
    """The path in a row with which a sentence about it begins; None if it begins otherwise."""
    found = _FIELD.match(message)
    return found[1].replace("`: `", ".").strip("`") if found else None


@dataclass
class Scan:
    """One pass over a file. `rows` yields the good rows; counts and problems are complete when it is exhausted.

    `limit` is the number of problems kept; `problem_count` counts all. Rows that `method` cannot learn are problems;
    None takes those of any.
    """

    method: Method | None = "supervised"
    min_rows: int = 1
    limit: int = MAX_PROBLEMS
    max_line_bytes: int = MAX_LINE_BYTES
    num_rows: int = 0
    format: str | None = None
    problem_count: int = 0
    problems: list[Problem] = field(default_factory=list)

    def add(self, line: int | None, message: str) -> None:
        """Note a problem; beyond `limit` it is only counted."""
        self.problem_count += 1
        if len(self.problems) < self.limit:
            self.problems.append(Problem(line, message))

    def rows(self, file: BinaryIO) -> Iterator[tuple[int, Row]]:
        """Good rows with their line numbers, in order."""
        for number, raw in numbered_lines(file, self.max_line_bytes):
            if raw is None:
                self.num_rows += 1
                self.add(number, f"The line is longer than {self.max_line_bytes:,} bytes. Split the row.")
                continue
            if number == 1:
                try:
                    check_encoding(raw)
                    raw = raw.removeprefix(BOM)
                    _check_lines(raw)
                except Wrong as problem:
                    self.num_rows += 1
                    self.add(1, str(problem))
                    return
            if not raw.strip():
                continue
            self.num_rows += 1
            try:
                row = self.row(parse(raw))
            except Wrong as problem:
                self.add(number, str(problem))
            else:
                yield number, row
        self._finish()

    def row(self, data: dict[str, Any]) -> Row:
        """The row that an object is, of the same format as those before. Raises Wrong; counts nothing."""
        format_ = format_of(data)
        if self.method is not None:
            check_method(format_, self.method)
        if self.format is None:
            self.format = format_.name
        elif format_.name != self.format:
            raise Wrong(f"This row has the format {format_.name}, the first row {self.format}. A file has one format.")
        return format_.read(data)

    def _finish(self) -> None:
        if self.num_rows == 0:
            self.add(None, "The file is empty. It needs one JSON object per line.")
        elif self.num_rows < self.min_rows:
            self.add(None, f"The file has {_count(self.num_rows, 'row')}; at least {self.min_rows} are needed.")


def _check_lines(first: bytes) -> None:
    """Raises Wrong if a file whose first line this is has an array over several lines, each of which would be wrong."""
    if first.strip() in (b"[", b"[{"):
        raise Wrong(
            "The file is a JSON array over several lines. Write one JSON object per line, without an array around "
            "them, or give the file a name that ends in `.json`."
        )


def numbered_lines(file: BinaryIO, max_bytes: int) -> Iterator[tuple[int, bytes | None]]:
    """Numbered lines without reading more than `max_bytes` at once; None stands for a longer line."""
    number = 0
    while line := file.readline(max_bytes + 1):
        number += 1
        if len(line) <= max_bytes or line.endswith(b"\n"):
            yield number, line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(1 << 20)
        yield number, None


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
