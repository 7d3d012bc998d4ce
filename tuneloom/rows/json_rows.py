"""Rows of a file that is one JSON array, read element by element."""

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from tuneloom.rows.fields import Place, Wrong, WrongAt, kind_of, quoted
from tuneloom.rows.parse import parse, unusable

_CHUNK_BYTES = 1 << 20
_SPACE = re.compile(r"[ \t\n\r]*")


class JsonRows:
    """Iterates over elements as places and text, in the memory of a few; `encode` makes a line of an element."""

    def __init__(self, file: BinaryIO, max_row_bytes: int) -> None:
        self._text = _Text(file)
        self._max_row_bytes = max_row_bytes
        self._decoder = json.JSONDecoder()

    def __iter__(self) -> Iterator[tuple[Place, str]]:
        """Raises Wrong where the file cannot be read on."""
        text, number = self._text, 0
        text.take("[")
        is_over = text.next_mark() == "]" and bool(text.take("]"))
        while not is_over:
            number += 1
            text.need_mark()
            place = Place(number, text.line)
            try:
                yield place, self._element()
                is_over = text.take(",]") == "]"
            except Wrong as problem:
                raise WrongAt(place, str(problem)) from None
        if mark := text.next_mark():
            raise Wrong(f"Not JSON: {quoted(mark)} after the end of the array, at {text.where(text.at)}.")

    def encode(self, element: str) -> tuple[bytes, dict[str, Any]]:
        """The row as a line of JSON and as what that holds. Raises Wrong if the element is no object."""
        if not element.startswith("{"):
            raise Wrong(f"The element is {kind_of(json.loads(element))}, not a JSON object.")
        # Between its tokens JSON may have line ends, and within strings it has none.
        line = element.replace("\r", " ").replace("\n", " ").encode()
        return line, parse(line)

    def _element(self) -> str:
        text = self._text
        while True:
            try:
                _, end = self._decoder.raw_decode(text.buffer, text.at)
            except json.JSONDecodeError as error:
                # Whether the buffer's end cut it or it is wrong is only known with more of the file.
                if len(text.buffer) - text.at > self._max_row_bytes:
                    raise Wrong(f"Not JSON, or longer than {self._max_row_bytes:,} bytes.") from None
                where = text.where(error.pos)
                if not text.read_more():
                    raise Wrong(f"Not JSON: {error.msg.removesuffix(' at')} at {where}.") from None
            except RecursionError:
                raise Wrong("Not usable JSON: it is nested too deeply.") from None
            except ValueError as error:
                raise unusable(error) from None
            else:
                # A number may go on behind the buffer's end.
                if end < len(text.buffer) or not text.read_more():
                    return text.advance(end)


class _Text:
    """The decoded file behind `at`, as far as it is in `buffer`; `line` is that of `at`."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._bad_byte: int | None = None
        self._line_start = 0
        self.buffer = ""
        self.at = 0
        self.line = 1

    def read_more(self) -> bool:
        """Take in as much again, dropping what lies before `at`; False at the end of the file."""
        if self._bad_byte is not None:
            raise Wrong(f"Not UTF-8: the byte 0x{self._bad_byte:02x}. Save the file as UTF-8.")
        rest = self.buffer[self.at :]
        raw = self._file.read(max(_CHUNK_BYTES, len(rest)))
        more = self._decode(raw)
        self._line_start -= self.at
        self.buffer, self.at = rest + more, 0
        return bool(raw) or self._bad_byte is not None

    def advance(self, end: int) -> str:
        """The text up to `end`, which is behind us then."""
        start, self.at = self.at, end
        lines = self.buffer.count("\n", start, end)
        if lines:
            self.line += lines
            self._line_start = self.buffer.rindex("\n", start, end) + 1
        return self.buffer[start:end]

    def skip_space(self) -> None:
        while True:
            match = _SPACE.match(self.buffer, self.at)
            assert match is not None
            self.advance(match.end())
            if self.at < len(self.buffer) or not self.read_more():
                return

    def next_mark(self) -> str:
        """The next character that is no space, not taken; empty at the end of the file."""
        self.skip_space()
        return self.buffer[self.at : self.at + 1]

    def need_mark(self) -> str:
        mark = self.next_mark()
        if not mark:
            raise Wrong("The file ends before its array does.")
        return mark

    def take(self, marks: str) -> str:
        """Raises Wrong unless one of `marks` comes next."""
        mark = self.need_mark()
        if mark not in marks:
            wanted = " or ".join(f"`{each}`" for each in marks)
            raise Wrong(f"Not JSON: {quoted(mark)} instead of {wanted} at {self.where(self.at)}.")
        return self.advance(self.at + 1)

    def where(self, position: int) -> str:
        line = self.line + self.buffer.count("\n", self.at, position)
        last = self.buffer.rfind("\n", self.at, position)
        start = self._line_start if last < 0 else last + 1
        return f"line {line:,}, column {position - start + 1:,}"

    def _decode(self, raw: bytes) -> str:
        try:
            return self._decoder.decode(raw, final=not raw)
        except UnicodeDecodeError as error:
            # The rows before it are read first, so that the right one is named.
            self._bad_byte = error.object[error.start]
            return error.object[: error.start].decode()
