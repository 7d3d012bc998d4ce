"""Rows replaced, removed, inserted and appended, from one file of JSON Lines into another. One pass, bounded memory.

All numbers are those of the rows of the file that is edited, also where an edit before them adds or removes rows.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from tuneloom.errors import InvalidFile, InvalidRequest
from tuneloom.rows.fields import Wrong
from tuneloom.rows.parse import parse
from tuneloom.rows.raw import raw_rows
from tuneloom.rows.scan import MAX_LINE_BYTES, Scan


@dataclass(frozen=True)
class NewRow:
    """A row as it was given; `param` names it in the request."""

    param: str
    data: dict[str, Any]


@dataclass(frozen=True)
class Appended:
    """Another file's rows; `param` names it in the request."""

    param: str
    file: BinaryIO


@dataclass
class Edit:
    """What to do. `counts` and `scan` (of all rows of the result) are complete when `lines` is exhausted."""

    replaced: dict[int, NewRow] = field(default_factory=dict)
    deleted: dict[int, str] = field(default_factory=dict)
    inserted: dict[int, list[NewRow]] = field(default_factory=dict)
    appended: list[NewRow | Appended] = field(default_factory=list)
    scan: Scan = field(default_factory=lambda: Scan(method=None))
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("kept", "replaced", "deleted", "added"), 0))

    def replace(self, number: int, row: NewRow) -> None:
        self._check_once(number, row.param)
        self.replaced[number] = row

    def delete(self, number: int, param: str) -> None:
        self._check_once(number, param)
        self.deleted[number] = param

    def insert(self, before: int, rows: Iterable[NewRow]) -> None:
        self.inserted.setdefault(before, []).extend(rows)

    def lines(self, file: BinaryIO) -> Iterator[bytes]:
        """The rows of the result, a line each. What is kept stays byte for byte, also where it is wrong.

        Raises:
            InvalidRequest: a number is none of the file's rows, a new row is wrong, or no row is left; `param` says
                which. It may come after lines.
        """
        self.scan.format = self._format_of(file)
        file.seek(0)
        number = 0
        for row in raw_rows(file):
            number = row.number
            for new in self.inserted.pop(number, ()):
                yield self._new(new, "added")
            if number in self.deleted:
                del self.deleted[number]
                self.counts["deleted"] += 1
            elif number in self.replaced:
                yield self._new(self.replaced.pop(number), "replaced")
            else:
                yield self._kept(number, row.raw)
        self._check_used_up(number)
        for more in self.appended:
            yield from self._other(more) if isinstance(more, Appended) else [self._new(more, "added")]
        if not self.scan.num_rows:
            raise InvalidRequest("No row is left. Delete the file instead.", param="operations")

    def _check_once(self, number: int, param: str) -> None:
        if number in self.replaced or number in self.deleted:
            raise InvalidRequest(f"Invalid `{param}`: two operations change row {number:,}.", param=param)

    def _format_of(self, file: BinaryIO) -> str | None:
        """That of the first good row which stays or is replaced."""
        scan = Scan(method=None)
        for row in raw_rows(file):
            try:
                if row.number not in self.deleted and row.number not in self.replaced and row.raw is not None:
                    scan.row(parse(row.raw))
                    return scan.format
            except Wrong:
                continue
        return None

    def _kept(self, number: int, raw: bytes | None) -> bytes:
        if raw is None:
            raise InvalidFile(f"Row {number:,} is longer than {MAX_LINE_BYTES:,} bytes: delete it too.", param="id")
        self.scan.num_rows += 1
        self.counts["kept"] += 1
        try:
            self.scan.row(parse(raw))
        except Wrong as problem:
            self.scan.add(self.scan.num_rows, str(problem))
        return raw + b"\n"

    def _new(self, row: NewRow, count: str) -> bytes:
        try:
            raw = json.dumps(row.data, ensure_ascii=False, allow_nan=False).encode()
            if len(raw) > MAX_LINE_BYTES:
                raise Wrong(f"It is longer than {MAX_LINE_BYTES:,} bytes. Split the row.")
            self.scan.row(row.data)
        except (Wrong, ValueError) as problem:
            raise InvalidRequest(f"Invalid `{row.param}`: {problem}", param=row.param) from None
        self.scan.num_rows += 1
        self.counts[count] += 1
        return raw + b"\n"

    def _other(self, other: Appended) -> Iterator[bytes]:
        for row in raw_rows(other.file):
            try:
                if row.raw is None:
                    raise Wrong(f"It is longer than {MAX_LINE_BYTES:,} bytes.")
                self.scan.row(parse(row.raw))
            except Wrong as problem:
                message = f"Invalid `{other.param}`: row {row.number:,} of that file: {problem}"
                raise InvalidRequest(message, param=other.param) from None
            self.scan.num_rows += 1
            self.counts["added"] += 1
            yield row.raw + b"\n"

    def _check_used_up(self, rows: int) -> None:
        left = {number: row.param for number, row in self.replaced.items()} | self.deleted
        left |= {number: new[0].param for number, new in self.inserted.items()}
        for number, param in left.items():
            raise InvalidRequest(f"Invalid `{param}`: the file has no row {number:,}; it has {rows:,}.", param=param)
