"""CSV files and JSON arrays as JSON Lines, streaming, each row checked on the way."""

import io
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from tuneloom.errors import InvalidFile
from tuneloom.rows.csv_rows import CsvRows
from tuneloom.rows.fields import Place, Wrong, WrongAt
from tuneloom.rows.json_rows import JsonRows
from tuneloom.rows.parse import BOM, check_encoding, parse
from tuneloom.rows.scan import MAX_LINE_BYTES, MAX_PROBLEMS, Scan, field_of

MAX_LISTED = 5

CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class RowProblem:
    """One wrong row, by its number and the line that it begins on; both None when it concerns the file."""

    row: int | None
    line: int | None
    field: str | None
    message: str

    @property
    def text(self) -> str:
        return self.message if self.line is None else f"{Place(self.row, self.line)}: {self.message}"


class InvalidRows(InvalidFile):
    """A file of which no rows can be made. `problems` are the first of `problem_count`; the message lists some."""

    code = "invalid_file"

    def __init__(self, message: str, problems: tuple[RowProblem, ...] = (), problem_count: int = 0) -> None:
        super().__init__(message, param="file")
        self.problems = problems
        self.problem_count = problem_count

    def body(self) -> dict[str, Any]:
        """With `problems` and `problem_count` in the error object."""
        error = super().body()["error"]
        listed = [asdict(problem) for problem in self.problems]
        return {"error": {**error, "problems": listed, "problem_count": self.problem_count}}


def to_json_lines(
    chunks: Iterable[bytes], kind: Literal["csv", "json"], *, max_row_bytes: int = MAX_LINE_BYTES
) -> Iterator[bytes]:
    """A file as JSON Lines, in pieces of about a megabyte: its row N is line N. Memory is that of a few rows.

    `json` is an array of objects; JSON Lines under that name come back as they are, unchecked but for the first.

    Raises:
        InvalidRows: rows are wrong, each by number, line, field and what is wrong. It may come after pieces.
    """
    file = io.BufferedReader(_Reader(iter(chunks)), CHUNK_BYTES)
    try:
        if kind == "csv":
            yield from joined(_lines(CsvRows(file, max_row_bytes), max_row_bytes))
        elif _is_array(file):
            yield from joined(_lines(JsonRows(file, max_row_bytes), max_row_bytes))
        else:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk
    except Wrong as problem:
        problems = _Problems()
        problems.add(problem)
        raise problems.error() from None


def _is_array(file: io.BufferedReader) -> bool:
    """Whether it is an array, and then behind its mark; if not, it is JSON Lines. Raises Wrong if it is neither."""
    start = file.peek(CHUNK_BYTES)
    check_encoding(start)
    text = start.removeprefix(BOM).lstrip()
    if not text:
        raise Wrong(f"The file has no rows{f' in its first {len(start):,} bytes' if start.strip() else ''}.")
    if text.startswith(b"["):
        file.read(len(BOM) if start.startswith(BOM) else 0)
        return True
    line, end, _ = text.partition(b"\n")
    if end or len(start) < CHUNK_BYTES:
        try:
            parse(line)
        except Wrong as problem:
            raise Wrong(
                f"The file is no JSON array, and its first line no row: {problem} "
                "Write an array of objects, `[{...}, {...}]`, or one object per line."
            ) from None
    return False


def _lines(rows: CsvRows | JsonRows, max_row_bytes: int) -> Iterator[bytes]:
    scan, problems, number = Scan(method=None), _Problems(), 0
    try:
        for place, row in rows:
            number += 1
            try:
                line, data = rows.encode(row)
                if len(line) > max_row_bytes:
                    raise Wrong(f"As JSON it is longer than {max_row_bytes:,} bytes. Split the row.")
                scan.row(data)
            except Wrong as problem:
                problems.add(problem, place)
            else:
                if not problems.count:
                    yield line + b"\n"
    except Wrong as problem:
        problems.add(problem)
    if problems.count:
        raise problems.error()
    if not number:
        raise Wrong("The file has no rows.")


@dataclass
class _Problems:
    first: list[RowProblem] = field(default_factory=list)
    count: int = 0

    def add(self, problem: Wrong, place: Place | None = None) -> None:
        self.count += 1
        if len(self.first) < MAX_PROBLEMS:
            place = problem.place if isinstance(problem, WrongAt) else place
            row, line = (place.row, place.line) if place else (None, None)
            self.first.append(RowProblem(row, line, field_of(str(problem)), str(problem)))

    def error(self) -> InvalidRows:
        texts = [problem.text for problem in self.first[:MAX_LISTED]]
        rest = self.count - len(texts)
        message = " ".join([*texts, *([f"And {rest:,} more."] if rest else [])])
        return InvalidRows(message, tuple(self.first), self.count)


class _Reader(io.RawIOBase):
    """Chunks as a file; each read is full but for the last."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        filled, view = 0, memoryview(buffer)
        while filled < len(view):
            if not self._rest:
                chunk = next(self._chunks, None)
                if chunk is None:
                    break
                self._rest = memoryview(chunk)
                continue
            piece = self._rest[: len(view) - filled]
            view[filled : filled + len(piece)] = piece
            self._rest = self._rest[len(piece) :]
            filled += len(piece)
        return filled


def joined(lines: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes in pieces of about a megabyte."""
    joined = bytearray()
    for line in lines:
        joined += line
        if len(joined) >= CHUNK_BYTES:
            yield bytes(joined)
            joined.clear()
    if joined:
        yield bytes(joined)
