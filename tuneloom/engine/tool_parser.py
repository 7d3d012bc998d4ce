"""Calls found in an answer as it grows: its text in, text and pieces of calls out. No tokens, no grammar.

An answer need not follow a grammar: what begins like a call and turns out to be none is text.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from tuneloom.domain import new_id
from tuneloom.engine.tool_grammar import is_raw, parameters_schema
from tuneloom.engine.tools import PYTHON_TAG, CallFormat, to_json
from tuneloom.generation import ToolCallDelta

_BLOCK = "<parameter="
_BLOCK_END = "\n</parameter>\n"


class CallParser:
    """Reads one answer. Text comes first, then calls, and nothing after them; white space between them is neither.

    With `is_forced` there is no text: the answer is calls, or the beginning of one where it was cut off.
    """

    def __init__(self, format: CallFormat, tools: Sequence[Mapping[str, Any]], *, is_forced: bool = False) -> None:
        self._format, self._is_forced = format, is_forced
        self._schemas = {tool["function"]["name"]: parameters_schema(tool["function"]) for tool in tools}
        self._first = self._openings(format.begin)
        self._next = {} if format.between is None else self._openings(format.between)
        self._held = ""
        self._has_text = self._is_over = False
        self._opened: ToolCallDelta | None = None
        self._arguments: _Arguments | None = None
        self.num_calls = 0

    def push(self, text: str, *, final: bool = False) -> tuple[str, tuple[ToolCallDelta, ...]]:
        """What is new, as text of the answer and as pieces of calls; `final` gives out what was held back."""
        self._held += text
        said = self._read_text(final) if not self.num_calls else ""
        deltas: list[ToolCallDelta] = []
        while self.num_calls and not self._is_over and self._read_call(deltas):
            pass
        return said, tuple(deltas)

    def _openings(self, before: str) -> dict[str, str]:
        """What stands before the arguments of each function, and its name."""
        return {f"{before}{name}{self._format.middle}": name for name in self._schemas}

    def _read_text(self, final: bool) -> str:
        """Text up to where a call may begin; from there on it waits. So does white space, which a call would end."""
        for end, at in self._places():
            if found := _begun(self._held[at:], self._first):
                said = self._held[:end].rstrip()
                self._held = self._held[at + len(found) :]
                self._open(self._first[found])
                return "" if self._is_forced else said
            if not final and _may_begin(self._held[at:], self._first):
                return self._say(len(self._held[:end].rstrip()))
        return self._say(len(self._held if final else self._held.rstrip()))

    def _say(self, end: int) -> str:
        said, self._held = self._held[:end], self._held[end:]
        self._has_text = self._has_text or bool(said)
        return "" if self._is_forced else said

    def _places(self) -> Iterator[tuple[int, int]]:
        """Where text may end and a call begin: at the mark, or only at the start of an answer where there is none."""
        if self._format.marker:
            at = self._held.find(self._format.begin[0])
            while at >= 0:
                yield at, at
                at = self._held.find(self._format.begin[0], at + 1)
        elif not self._has_text:
            at = len(self._held) - len(self._held.lstrip())
            yield at, at + len(PYTHON_TAG) if self._held.startswith(PYTHON_TAG, at) else at

    def _open(self, name: str) -> None:
        self._opened = ToolCallDelta(self.num_calls, id=new_id("call_"), name=name)
        schema = self._schemas[name]
        self._arguments = _JsonArguments() if self._format.arguments == "json" else _BlockArguments(schema)
        self.num_calls += 1

    def _read_call(self, deltas: list[ToolCallDelta]) -> bool:
        """Take what there is of one call, or of what stands between two; say whether there may be more."""
        if self._arguments is None:
            if found := _begun(self._held, self._next):
                self._held = self._held[len(found) :]
                self._open(self._next[found])
                return True
            self._is_over = not _may_begin(self._held, self._next)
            return False
        if self._opened is not None:
            deltas.append(self._opened)
            self._opened = None
        piece, self._held = self._arguments.push(self._held)
        if piece:
            deltas.append(ToolCallDelta(self.num_calls - 1, arguments=piece))
        if not self._arguments.is_whole:
            return False
        self._arguments = None
        return True


class _Arguments(Protocol):
    """Turns the arguments of one call into JSON text."""

    is_whole: bool

    def push(self, text: str) -> tuple[str, str]:
        """New JSON text, and what of `text` is not used: it waits for more, or is not of the arguments."""
        ...


class _JsonArguments:
    """A JSON object, passed on as it comes."""

    def __init__(self) -> None:
        self.is_whole = False
        self._depth = 0
        self._in_string = self._is_escaped = False

    def push(self, text: str) -> tuple[str, str]:
        for at, char in enumerate(text):
            if self._is_escaped:
                self._is_escaped = False
            elif self._in_string:
                self._is_escaped = char == "\\"
                self._in_string = char != '"'
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    self.is_whole = True
                    return text[: at + 1], text[at + 1 :]
        return text, ""


class _BlockArguments:
    """`<parameter=key>` blocks, passed on as members of an object, block by block."""

    def __init__(self, schema: Mapping[str, Any]) -> None:
        self.is_whole = False
        self._properties = schema.get("properties", {})
        self._num_blocks = 0

    def push(self, text: str) -> tuple[str, str]:
        pieces = []
        while text.startswith(_BLOCK) and (end := text.find(_BLOCK_END)) >= 0:
            key, _, value = text[len(_BLOCK) : end].partition(">\n")
            pieces.append(f"{', ' if self._num_blocks else '{'}{to_json(key)}: {self._value(key, value)}")
            self._num_blocks += 1
            text = text[end + len(_BLOCK_END) :]
        if text and not text.startswith(_BLOCK) and not _BLOCK.startswith(text):
            self.is_whole = True
            pieces.append("}" if self._num_blocks else "{}")
        return "".join(pieces), text

    def _value(self, key: str, value: str) -> str:
        if not is_raw(self._properties.get(key)):
            try:
                return to_json(json.loads(value))
            except ValueError:
                pass
        return to_json(value)


def _begun(text: str, openings: Iterable[str]) -> str | None:
    return next((opening for opening in openings if text.startswith(opening)), None)


def _may_begin(text: str, openings: Iterable[str]) -> bool:
    """Whether `text` begins with an opening, or may once there is more of it."""
    return any(text.startswith(opening[: len(text)]) for opening in openings)
