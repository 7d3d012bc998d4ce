"""A request's bytes as one JSON object, strictly: what Python reads leniently is refused. No fields, no meaning."""

import json
from typing import Any

from tuneloom.errors import InvalidRequest

JSON_TYPES = {
    type(None): "null",
    bool: "a boolean",
    int: "an integer",
    float: "a number",
    str: "a string",
    list: "an array",
    dict: "an object",
}


def parse_object(raw: bytes) -> dict[str, Any]:
    """The JSON object in `raw`.

    Raises:
        InvalidRequest: empty, not UTF-8, not JSON (NaN and Infinity included), a repeated field, nested too deeply,
            text with half a surrogate pair, or a value that is not an object.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"The body is not UTF-8 (byte {error.start}). Send JSON encoded as UTF-8.") from error
    if not text.strip():
        raise InvalidRequest("The body is empty. Send one JSON object.")
    try:
        value = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique)
    except RecursionError as error:
        raise InvalidRequest("The body is nested too deeply.") from error
    except ValueError as error:
        raise InvalidRequest(f"The body is not valid JSON: {error}. Send one JSON object.") from error
    if not isinstance(value, dict):
        raise InvalidRequest(f"The body is {json_type(value)}. Send one JSON object.")
    # Escapes are the only way to half a surrogate pair, and such text can neither be stored nor answered.
    if "\\ud" in text or "\\uD" in text:
        _refuse_surrogates(value)
    return value


def json_type(value: Any) -> str:
    """The JSON name of a value's type, with its article."""
    return JSON_TYPES[type(value)]


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"`{name}` is not JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field `{twice[:80]}` is given twice")
    return value


def _refuse_surrogates(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            "The body holds half of a surrogate pair (`\\ud800`-`\\udfff`), which is no text."
        ) from error
