"""JSON into values: strictly, quickly, and with a message for people when it is none."""

import json
from typing import Any

import jiter

from tuneloom.rows.fields import Wrong, first_repeated, kind_of, quoted

BOM = b"\xef\xbb\xbf"


def check_encoding(start: bytes) -> None:
    """Raises Wrong if a file that starts so is UTF-16 or UTF-32, with a mark or by the zeros between its characters."""
    zeros = [byte == 0 for byte in start[:4]]
    if start.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")) or sum(zeros) == 3:
        raise Wrong("The file is UTF-32. Save it as UTF-8.")
    if start.startswith((b"\xff\xfe", b"\xfe\xff")) or zeros in ([True, False] * 2, [False, True] * 2):
        raise Wrong("The file is UTF-16. Save it as UTF-8.")


def parse(raw: bytes) -> dict[str, Any]:
    """Raises Wrong unless `raw` is one JSON object in UTF-8 without a key that appears twice."""
    data = parse_value(raw)
    if isinstance(data, dict):
        return data
    if isinstance(data, list):
        raise Wrong("The line is a JSON array. Write one JSON object per line, without an array around them.")
    raise Wrong(f"The line is {kind_of(data)}, not a JSON object.")


def parse_value(raw: bytes) -> Any:
    """Raises Wrong unless `raw` is JSON in UTF-8 without a key that appears twice in an object."""
    try:
        return jiter.from_json(raw, allow_inf_nan=False, catch_duplicate_keys=True)
    except ValueError:
        # Slower, and it says what is wrong in words of ours. It also takes what jiter's limit of depth refuses.
        return _explain(raw)


def _explain(raw: bytes) -> Any:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Wrong(f"Not UTF-8: byte {error.start + 1} of the line is 0x{raw[error.start]:02x}.") from None
    try:
        data = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_object)
        if "\\u" in text:
            json.dumps(data, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise Wrong(f"Not JSON: {error.msg} at column {error.colno}.") from None
    except RecursionError:
        raise Wrong("Not usable JSON: it is nested too deeply.") from None
    except UnicodeEncodeError:
        raise Wrong("A string holds half of a character: a `\\ud800`-`\\udfff` escape without its pair.") from None
    except ValueError as error:
        raise unusable(error) from None
    return data


def unusable(error: ValueError) -> Wrong:
    """What to say of JSON that Python does not take. Of long numbers its own words name one of its functions."""
    is_long = "integer string conversion" in str(error)
    return Wrong(f"Not usable JSON: {'a number has too many digits' if is_long else error}.")


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"`{name}` is not a JSON number")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        raise ValueError(f"the key {quoted(first_repeated(name for name, _ in pairs))} appears twice in one object")
    return data
