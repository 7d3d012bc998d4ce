"""What a document and a blob may be, the same in every implementation, so that none accepts what another refuses."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tuneloom.errors import InvalidRequest, TooLarge
from tuneloom.store.base import MAX_WRITES, Create, Increment, Range, Replace, Scalar, Write

MAX_DOCUMENT_BYTES = 1_000_000
MAX_ID_BYTES = 1500
MAX_KEY_LENGTH = 900
MAX_DEPTH = 20
MAX_FIELDS = 128
MAX_COMMIT_BYTES = 3_000_000
# A condition looks so deep into a record, by names of so many bytes together.
MAX_PATH_PARTS = 16
MAX_PATH_BYTES = 1400

_COLLECTION = re.compile(r"[a-z][a-z0-9_]{0,63}")
_FIELD = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_RESERVED_ID = re.compile(r"\.|\.\.|__.*__", re.DOTALL)
_KEY_PART = re.compile(r"(?!\.{1,2}(?:/|$))[A-Za-z0-9._-]{1,255}")


def is_document_id(id: str) -> bool:
    """Whether a document can have this id: text without `/` and NUL, up to 1500 bytes, no `.`, `..` or `__x__`."""
    if not id or "/" in id or "\0" in id or _RESERVED_ID.fullmatch(id):
        return False
    return len(id.encode(errors="surrogatepass")) <= MAX_ID_BYTES and not _has_surrogate(id)


def check_collection(name: str) -> str:
    if not _COLLECTION.fullmatch(name):
        raise InvalidRequest(f"`{name[:80]}` cannot name a collection. Use lower-case letters, digits and `_`.")
    return name


def check_field(name: str) -> str:
    if not _FIELD.fullmatch(name):
        raise InvalidRequest(f"`{name[:80]}` cannot name a field. Use letters, digits and `_`.")
    return name


def check_key(key: str) -> str:
    """Return `key` if it is a blob key as the seam defines it."""
    parts = key.split("/") if len(key) <= MAX_KEY_LENGTH else []
    if not 1 <= len(parts) <= 8 or not all(_KEY_PART.fullmatch(part) for part in parts):
        raise InvalidRequest(
            f"`{key[:80]}` is not a blob key. Use 1 to 8 parts of letters, digits, `.`, `_` or `-`, joined by `/`."
        )
    return key


def check_writes(writes: Sequence[Write]) -> None:
    """Raise InvalidRequest unless these writes may be one commit; their data is checked by `encode`."""
    if len(writes) > MAX_WRITES:
        raise InvalidRequest(f"A commit has {len(writes)} writes and may have {MAX_WRITES}. Split it.")
    seen = set()
    for write in writes:
        check_collection(write.collection)
        if not is_document_id(write.id):
            raise InvalidRequest(f"`{write.id[:80]!r}` cannot be the id of a document in `{write.collection}`.")
        if (write.collection, write.id) in seen:
            raise InvalidRequest(f"A commit writes `{write.collection}/{write.id}` twice. Make it one write.")
        seen.add((write.collection, write.id))
        if isinstance(write, Increment):
            check_field(write.field)
            check_value(write.by, write.field)
        elif isinstance(write, Create | Replace):
            if len(write.data) > MAX_FIELDS:
                raise InvalidRequest(
                    f"`{write.collection}/{write.id}` has {len(write.data)} fields and may have {MAX_FIELDS}."
                )
            for name in write.data:
                check_field(name)


def check_size(texts: Sequence[str]) -> None:
    """Raise TooLarge unless records of these JSON texts may be written by one commit."""
    if sum(map(len, texts)) > MAX_COMMIT_BYTES:
        raise TooLarge(f"The records of a commit may have {MAX_COMMIT_BYTES:,} bytes together. Split it.")


def check_path(parts: tuple[str, ...]) -> tuple[str, ...]:
    """Return the parts of a key of `where` if it may be one."""
    check_field(parts[0])
    if len(parts) > MAX_PATH_PARTS or sum(len(part.encode(errors="surrogatepass")) for part in parts) > MAX_PATH_BYTES:
        raise InvalidRequest(
            f"A condition on `{parts[0]}` names {len(parts)} fields inside each other; it may name {MAX_PATH_PARTS}, "
            f"of {MAX_PATH_BYTES} bytes together."
        )
    if any(_has_surrogate(part) for part in parts):
        raise InvalidRequest(f"A condition on `{parts[0]}` holds half of a surrogate pair, which is not text.")
    return parts


def check_bounds(order_by: str, bounds: Range) -> None:
    """Raise InvalidRequest if one of the bounds has no place in an order."""
    for value in (bounds.above, bounds.at_least, bounds.below, bounds.at_most):
        if not is_searchable(value):
            raise InvalidRequest(f"`{value!r}` cannot bound `{order_by}`.")


def check_cursor(order_by: str, after: tuple[Scalar, str]) -> None:
    """Raise InvalidRequest unless this is a place in the order of `order_by`."""
    value, id = after
    if not is_searchable(value) or not isinstance(id, str) or not is_searchable(id):
        raise InvalidRequest(f"`{after!r}` is not a place in the order of `{order_by}`.")


def is_searchable(value: Any) -> bool:
    """Whether any document can hold this scalar."""
    try:
        check_value(value, "where")
    except InvalidRequest:
        return False
    return rank_of(value) < 4


def rank_of(value: Any) -> int:
    """The place of a value's type in the order: null, booleans, numbers, text; then what has no order."""
    match value:
        case None:
            return 0
        case bool():
            return 1
        case int() | float():
            return 2
        case str():
            return 3
    return 4


def check_value(value: Any, path: str, depth: int = 1) -> None:
    """Raise InvalidRequest, naming `path`, unless JSON and Firestore can both hold `value` exactly."""
    match value:
        case None | bool():
            pass
        case int():
            if not -(2**63) <= value < 2**63:
                raise InvalidRequest(f"`{path}` is {value}; a stored integer has at most 64 bits.")
        case float():
            if not math.isfinite(value):
                raise InvalidRequest(f"`{path}` is {value}; a stored number is finite.")
        case str():
            if _has_surrogate(value):
                raise InvalidRequest(f"`{path}` holds half of a surrogate pair, which is not text.")
        case Mapping() | list() | tuple() if depth > MAX_DEPTH:
            raise InvalidRequest(f"`{path}` is nested deeper than {MAX_DEPTH} levels.")
        case Mapping():
            for key, inner in value.items():
                if not isinstance(key, str):
                    raise InvalidRequest(f"`{path}` has the key `{key!r}`; stored keys are text.")
                check_value(key, path)
                check_value(inner, f"{path}.{key}", depth + 1)
        case list() | tuple():
            for index, inner in enumerate(value):
                check_value(inner, f"{path}[{index}]", depth + 1)
        case _:
            raise InvalidRequest(f"`{path}` is a {type(value).__name__}, which cannot be stored.")


def encode(data: Mapping[str, Any]) -> str:
    """The JSON text of a document, in ASCII.

    Raises:
        InvalidRequest: a value cannot be stored exactly; the message names the field.
        TooLarge: it is over a megabyte.
    """
    for name, value in data.items():
        check_value(value, name)
    text = json.dumps(data, separators=(",", ":"))
    if len(text) > MAX_DOCUMENT_BYTES and len(json.dumps(data, ensure_ascii=False).encode()) > MAX_DOCUMENT_BYTES:
        raise TooLarge(f"A record may have {MAX_DOCUMENT_BYTES:,} bytes; this one is larger. Store bytes as a blob.")
    return text


def _has_surrogate(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False
