"""Grammars that an answer must follow, in llguidance's form: made from JSON schemas and checked. No sampling, no torch.

Between JSON tokens there may be one space, or a new line and its indent. Models answer worse in a form that they are
not used to, and weak ones write whitespace without end where they may.
"""

import functools
import json
import re
import subprocess
import sys
import threading

from tuneloom.engine import grammar_check
from tuneloom.engine.schema_numbers import held
from tuneloom.errors import InvalidRequest, Overloaded

MAX_GRAMMAR_BYTES = 256 * 1024
_WHITESPACE = r" |\n {0,16}"
# Longer texts, and those with keywords whose cost is not bounded by their length, are judged by a process of its own.
_SIMPLE_BYTES = 16 * 1024
_COSTLY = re.compile(r'"(?:pattern|patternProperties|allOf|oneOf)"')
# Beside the CPU time that the check may take, for a busy machine.
_CHECK_TIMEOUT_S = 4.0 * grammar_check.CPU_S
_QUEUE_TIMEOUT_S = 30.0
_CHECKS = threading.BoundedSemaphore(2)


def json_object_grammar() -> str:
    """Any JSON object."""
    return _grammar_of({"type": "object"})


def json_schema_grammar(schema: str, *, param: str = "response_format") -> str:
    """What the JSON schema in `schema` (text) allows, with object keys in the order of `properties`.

    Blocks for up to seconds with an unknown schema; call it in a thread.

    Raises:
        InvalidRequest: the schema is none, or uses what cannot be enforced; the message names it.
        Overloaded: too many other schemas are being checked.
    """
    try:
        parsed = json.loads(schema)
        if not isinstance(parsed, dict):
            raise InvalidRequest(f"The schema in `{param}` is not a JSON object. Send a JSON schema.", param=param)
        grammar = _grammar_of(held(parsed, param=param))
    except ValueError as error:
        raise InvalidRequest(f"The schema in `{param}` is not valid JSON: {error}.", param=param) from error
    except RecursionError as error:
        raise InvalidRequest(f"The schema in `{param}` is nested too deeply. Make it flatter.", param=param) from error
    check_grammar(grammar, param=param)
    return grammar


def check_grammar(grammar: str, *, param: str = "response_format") -> None:
    """Raise if a grammar is too large or costly, or is none. Blocks like `json_schema_grammar`.

    Raises:
        InvalidRequest: the message says what is wrong with it.
        Overloaded: too many others are being checked.
    """
    size = len(grammar.encode())
    if size > MAX_GRAMMAR_BYTES:
        raise InvalidRequest(
            f"The schema in `{param}` has {size} bytes; at most {MAX_GRAMMAR_BYTES} are allowed. Make it smaller.",
            param=param,
        )
    if fault := _fault_of(grammar):
        raise InvalidRequest(f"The schema in `{param}` cannot be enforced: {fault}", param=param)


def _grammar_of(schema: dict[str, object]) -> str:
    # The library's own key would let a caller change our options.
    options = {"whitespace_pattern": _WHITESPACE, "lenient": False, "coerce_one_of": False}
    return json.dumps({"grammars": [{"json_schema": {**schema, "x-guidance": options}}]}, ensure_ascii=False)


@functools.lru_cache(maxsize=64)
def _fault_of(grammar: str) -> str:
    is_simple = len(grammar) <= _SIMPLE_BYTES and not _COSTLY.search(grammar)
    return _readable(grammar_check.fault_of(grammar) if is_simple else _fault_by_process(grammar))


def _fault_by_process(grammar: str) -> str:
    if not _CHECKS.acquire(timeout=_QUEUE_TIMEOUT_S):
        raise Overloaded("Too many schemas are being checked. Retry in a moment.", retry_after_s=5.0)
    try:
        done = subprocess.run(
            [sys.executable, "-m", grammar_check.__name__],
            input=grammar,
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=_CHECK_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return "schema too costly"
    finally:
        _CHECKS.release()
    return done.stdout if done.returncode == 0 else "schema too costly"


def _readable(fault: str) -> str:
    """The library's words for people: the first line that says something, and what to do."""
    if not fault:
        return ""
    text = " ".join(fault.partition("<backtrace>")[0].split())[:300]
    if found := re.match(r"Unimplemented keys: \[(.*)\]", text):
        return f"the keywords {found[1].replace(chr(34), '`')} are not supported. Leave them out."
    if text.startswith("oneOf"):
        return "the alternatives of a `oneOf` are not told apart. Use `anyOf`."
    if "too costly" in text or "too large" in text:
        return "it is too complex. Use fewer patterns, alternatives and combinations of them."
    if "recursion limit" in text:
        return "it is nested too deeply. Make it flatter."
    return f"{text.rstrip('.')}. Change that part of it."
