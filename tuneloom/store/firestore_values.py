"""How a record lies in Firestore, and how it is read back.

A Firestore document has these fields:

- `data`: each top-level scalar of the record under its own name, in Firestore's own types, so that queries, orders,
  cursors and increments are Firestore's. Beside them, for queries only, the scalars inside nested objects.
- `text`: top-level objects, lists and long texts as one JSON text, if there are any. Firestore has no lists in lists,
  sorts the keys of maps, and takes 8 bytes for a digit; this text gives back what was written.
- `id`: its id, since Firestore does not read names backwards.
- `commit`: a random id of the commit that wrote the document last. By it a commit whose answer was lost is recognised,
  and no write leaves a document as it was, which would leave its update time too.

Firestore asks by texts of less than 1500 bytes. A longer one stands in `data` by its beginning and its hash: it is
found by all of it, and ordered by its first 100 bytes.

Firestore indexes each field of each map unless told otherwise. The file `cluster/firestore.indexes.json` switches that
off for all of them, and on again for those that are asked for.

A name that Firestore reserves or does not know (`__x__`, the empty one) gets a `-` at its end, and so does one that
would look like such a name then. Control characters, which Firestore's paths mistake for each other, are written `%0a`;
only names inside objects have any, and those are read from `text`.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from tuneloom.store.base import Scalar, field_path
from tuneloom.store.limits import MAX_PATH_BYTES, MAX_PATH_PARTS

DATA = "data"
TEXT = "text"
ID = "id"
COMMIT = "commit"

# Firestore's limit, and what of it is kept for the name and the other fields.
MAX_FIRESTORE_BYTES = 1_048_576
_RESERVE_BYTES = 6_000
MAX_INDEXED_BYTES = 1_400
LONG_BYTES = 100
# Each indexed value takes index entries, of which a document may have 40,000.
MAX_NESTED = 5_000

_CONTROL = re.compile(r"[\x00-\x1f\x7f%]")
_ESCAPED = re.compile(r"(?:__.*__)?-*", re.DOTALL)

Value = dict[str, Any]


def to_fields(id: str, data: Mapping[str, Any], commit: str) -> dict[str, Value]:
    """The Firestore fields of a record that `limits.encode` has accepted."""
    tree = {escape(name): to_indexed(value) for name, value in data.items() if _is_scalar(value)}
    nested = {name: value for name, value in data.items() if not _is_scalar(value) or is_long(value)}
    fields = {DATA: _map(tree), ID: to_indexed(id), COMMIT: to_value(commit)}
    if nested:
        text = json.dumps(nested, separators=(",", ":"), ensure_ascii=False)
        fields[TEXT] = to_value(text)
        used = len(text.encode()) + sum(_size(name, value) for name, value in data.items() if _is_scalar(value))
        _project(nested, tree, MAX_FIRESTORE_BYTES - _RESERVE_BYTES - used)
    return fields


def from_fields(fields: Mapping[str, Value]) -> dict[str, Any]:
    """The record of a Firestore document."""
    tree = fields[DATA]["mapValue"].get("fields", {})
    data = {unescape(name): from_value(value) for name, value in tree.items() if "mapValue" not in value}
    if TEXT in fields:
        data |= json.loads(fields[TEXT]["stringValue"])
    return data


def commit_of(fields: Mapping[str, Value]) -> str:
    return fields.get(COMMIT, {}).get("stringValue", "")


def path_of(*parts: str) -> str:
    """The Firestore path of a field of a record."""
    return field_path(DATA, *map(escape, parts))


def to_value(value: Scalar) -> Value:
    match value:
        case None:
            return {"nullValue": None}
        case bool():
            return {"booleanValue": value}
        case int():
            return {"integerValue": str(value)}
        case float():
            return {"doubleValue": value}
    return {"stringValue": value}


def to_indexed(value: Scalar) -> Value:
    """The value as it stands in `data`, and as it is asked for."""
    if not is_long(value):
        return to_value(value)
    whole = str(value).encode()
    digest = base64.b64encode(hashlib.sha256(whole).digest()).decode()
    return to_value(whole[:LONG_BYTES].decode(errors="ignore") + digest)


def is_long(value: Any) -> bool:
    return isinstance(value, str) and len(value.encode()) > MAX_INDEXED_BYTES


def from_value(value: Value) -> Scalar:
    ((kind, content),) = value.items()
    match kind:
        case "nullValue":
            return None
        case "integerValue":
            return int(content)
        case "doubleValue":
            return float(content)
    return content


def escape(name: str) -> str:
    name = _CONTROL.sub(lambda found: f"%{ord(found[0]):02x}", name)
    return name + "-" if _ESCAPED.fullmatch(name) else name


def unescape(name: str) -> str:
    return name[:-1] if _ESCAPED.fullmatch(name) else name


def _project(nested: Mapping[str, Any], tree: dict[str, Value], room: int) -> None:
    """Add the scalars of nested objects to `tree`, the outer ones first, as far as the document has room for them.

    There is room for all of them in a record of 200 kB; a larger one is kept whole, but may not be found by all that it
    holds.
    """
    for _, (parts, value) in zip(range(MAX_NESTED), _leaves(nested), strict=False):
        inner, missing = tree, list(map(escape, parts[:-1]))
        while missing and missing[0] in inner:
            inner = inner[missing.pop(0)]["mapValue"]["fields"]
        # A map takes 32 bytes and its name.
        size = sum(33 + len(part.encode()) for part in missing) + _size(parts[-1], value)
        if size > room:
            continue
        room -= size
        for part in missing:
            inner = inner.setdefault(part, _map({}))["mapValue"]["fields"]
        inner[escape(parts[-1])] = to_indexed(value)


def _leaves(nested: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], Scalar]]:
    """(path, scalar) of all scalars inside objects that a path of `where` can name, level by level."""
    level: list[tuple[tuple[str, ...], Mapping[str, Any]]] = [((), nested)]
    while level:
        deeper: list[tuple[tuple[str, ...], Mapping[str, Any]]] = []
        for path, values in level:
            for name, value in values.items():
                parts = (*path, name)
                if len(parts) > MAX_PATH_PARTS or sum(len(part.encode()) for part in parts) > MAX_PATH_BYTES:
                    continue
                if isinstance(value, Mapping):
                    deeper.append((parts, value))
                elif _is_scalar(value) and path:
                    yield parts, value
        level = deeper


def _map(fields: dict[str, Value]) -> Value:
    return {"mapValue": {"fields": fields}}


def _size(name: str, value: Scalar) -> int:
    """Bytes of a field as Firestore counts them."""
    length = LONG_BYTES + 44 if is_long(value) else len(value.encode()) if isinstance(value, str) else 7
    return len(name.encode()) + 2 + length + 1


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)
