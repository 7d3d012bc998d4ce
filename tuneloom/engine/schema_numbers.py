"""Numbers of a JSON schema as llguidance can hold them: it keeps doubles, and writes long ones with another last digit.

Literals that would come out as other numbers are refused; bounds give way inward, so that no number outside is allowed.
"""

from collections.abc import Mapping
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from typing import Any

from tuneloom.errors import InvalidRequest

# So many survive a double and back (IEEE 754), and integers up to 2**53 do.
_DIGITS = 15
_MAX_INTEGER = 1 << 53
_ROUNDING = {
    "minimum": ROUND_CEILING,
    "exclusiveMinimum": ROUND_CEILING,
    "maximum": ROUND_FLOOR,
    "exclusiveMaximum": ROUND_FLOOR,
}
# Their keys are names, not keywords.
_MAPS = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})


def held(schema: Mapping[str, Any], *, param: str) -> dict[str, Any]:
    """`schema` with bounds that are held exactly.

    Raises:
        InvalidRequest: a number of an `enum` or `const` is not, or it is nested too deeply.
    """
    try:
        return {key: _value(key, value, param) for key, value in schema.items()}
    except RecursionError as error:
        raise InvalidRequest(f"The schema in `{param}` is nested too deeply. Make it flatter.", param=param) from error


def _held(schema: Any, param: str) -> Any:
    if isinstance(schema, list):
        return [_held(each, param) for each in schema]
    if not isinstance(schema, Mapping):
        return schema
    return {key: _value(key, value, param) for key, value in schema.items()}


def _value(key: str, value: Any, param: str) -> Any:
    if key in _MAPS and isinstance(value, Mapping):
        return {name: _held(each, param) for name, each in value.items()}
    if key == "const" or (key == "enum" and isinstance(value, list)):
        _check_literal(value, param)
        return value
    if key in _ROUNDING and _is_number(value) and not _is_held(value):
        rounded = Context(prec=_DIGITS, rounding=_ROUNDING[key]).create_decimal(repr(value))
        return int(rounded) if isinstance(value, int) else float(rounded)
    return _held(value, param)


def _check_literal(value: Any, param: str) -> None:
    if isinstance(value, list | Mapping):
        for each in value.values() if isinstance(value, Mapping) else value:
            _check_literal(each, param)
    elif _is_number(value) and not _is_held(value):
        raise InvalidRequest(
            f"The schema in `{param}` cannot be enforced: the number {str(value)[:40]} has more than {_DIGITS} digits, "
            "which JSON does not promise to keep. Make it a string, or shorter.",
            param=param,
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_held(value: float) -> bool:
    if isinstance(value, int) and abs(value) <= _MAX_INTEGER:
        return True
    number = Decimal(repr(value))
    return not number.is_finite() or len(number.normalize(Context(prec=400)).as_tuple().digits) <= _DIGITS
