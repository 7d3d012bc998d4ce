"""Reading fields of a JSON object, each with a message that names what is wrong. No formats."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


class Wrong(Exception):
    """The row cannot be used; the message says why."""


@dataclass(frozen=True)
class Place:
    """Where a row is in a file that is not JSON Lines: its number, None for a header's, and the line it begins on."""

    row: int | None
    line: int

    def __str__(self) -> str:
        return "Header" if self.row is None else f"Row {self.row:,} (line {self.line:,})"


class WrongAt(Wrong):
    """The file cannot be read on from here."""

    def __init__(self, place: Place, reason: str) -> None:
        super().__init__(reason)
        self.place = place


def only(data: dict[str, Any], allowed: tuple[str, ...], where: str) -> None:
    unknown = [key for key in data if key not in allowed]
    if unknown:
        names = ", ".join(quoted(key) for key in unknown[:5])
        raise Wrong(f"Unknown key in {where}: {names}. Known: {', '.join(f'`{key}`' for key in allowed)}.")


def optional(data: dict[str, Any], key: str, kind: type, name: str, where: str | None = None) -> None:
    if data.get(key) is not None and not isinstance(data[key], kind):
        raise Wrong(f"{f'{where}: ' if where else ''}`{key}` is {kind_of(data[key])}, not {name}.")


def first_repeated(names: Iterable[str]) -> str | None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def string(data: dict[str, Any], key: str, *, may_be_empty: bool = True) -> str:
    if key not in data:
        raise Wrong(f"`{key}` is missing.")
    if not isinstance(data[key], str):
        raise Wrong(f"`{key}` is {kind_of(data[key])}, not a string.")
    if not data[key] and not may_be_empty:
        raise Wrong(f"`{key}` is empty.")
    return data[key]


def kind_of(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    for type_, name in ((int | float, "a number"), (str, "a string"), (list, "an array")):
        if isinstance(value, type_):
            return name
    return "an object"


def quoted(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=True, default=str)
    return f"`{text[:60].encode('unicode_escape').decode()}{'...' if len(text) > 60 else ''}`"
