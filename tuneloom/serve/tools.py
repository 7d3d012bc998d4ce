"""`tools`, `tool_choice` and `response_format` of a chat request, checked and brought to our words. No templates.

Schemas are not judged here: whether one can be enforced is known where grammars are made.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

from tuneloom.errors import InvalidRequest, InvalidType, MissingParameter, UnknownParameter, UnsupportedParameter
from tuneloom.generation import ResponseFormat, ToolChoice
from tuneloom.serve.body import json_type

MAX_TOOLS = 128
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
Tool = dict[str, Any]


def read_tools(tools: Any) -> tuple[Tool, ...]:
    """The tools, each `{"type": "function", "function": {"name", ...}}` with what was given.

    Raises:
        InvalidRequest: naming the place, such as `tools[0].function.name`.
    """
    if tools is None:
        return ()
    for_each = _typed(tools, list, "tools")
    if len(for_each) > MAX_TOOLS:
        raise InvalidRequest(f"`tools` has {len(for_each)} entries; the most is {MAX_TOOLS}.", param="tools")
    read = tuple(_tool(tool, f"tools[{index}]") for index, tool in enumerate(for_each))
    names = [tool["function"]["name"] for tool in read]
    for index, name in enumerate(names):
        if name in names[:index]:
            param = f"tools[{index}].function.name"
            raise InvalidRequest(f"Two functions have the name `{name}`. Give each its own.", param=param)
    return read


def read_tool_choice(choice: Any, parallel: Any, tools: Sequence[Tool]) -> tuple[ToolChoice, tuple[Tool, ...]]:
    """What `tool_choice` and `parallel_tool_calls` ask for, and the tools that they leave.

    Raises:
        InvalidRequest: naming the place; also when it asks for a tool that is not there.
    """
    is_parallel = parallel is None or _typed(parallel, bool, "parallel_tool_calls")
    if choice is None:
        return ToolChoice(is_parallel=is_parallel), tuple(tools)
    if isinstance(choice, str):
        mode = _one_of(choice, ("none", "auto", "required"), "tool_choice")
        _need_tools(tools, mode)
        return ToolChoice(mode, is_parallel=is_parallel), tuple(tools)
    if not isinstance(choice, dict):
        raise InvalidType(
            f"Invalid type for `tool_choice`: expected a string or an object, got {json_type(choice)}.",
            param="tool_choice",
        )
    kind = _function_type(choice, "tool_choice", also=("allowed_tools",))
    if kind == "allowed_tools":
        mode, allowed = _allowed(choice, tools)
        return ToolChoice(mode, is_parallel=is_parallel), allowed
    _only(choice, ("type", "function"), "tool_choice")
    name = _chosen(choice, tools, "tool_choice")
    return ToolChoice("required", name, is_parallel), tuple(tools)


def read_response_format(value: Any) -> ResponseFormat | None:
    """The form that the answer must have, None for any text.

    Raises:
        InvalidRequest: naming the place.
    """
    if value is None:
        return None
    where = "response_format"
    kind = _required(_typed(value, dict, where), "type", where)
    _one_of(kind, ("text", "json_object", "json_schema"), f"{where}.type")
    _only(value, ("type", "json_schema") if kind == "json_schema" else ("type",), where)
    if kind == "text":
        return None
    if kind == "json_object":
        return ResponseFormat()
    inner = f"{where}.json_schema"
    form = _typed(_required(value, "json_schema", where), dict, inner)
    _only(form, ("name", "description", "schema", "strict"), inner)
    _name(_required(form, "name", inner), f"{inner}.name")
    _optional(form, "description", str, inner)
    _optional(form, "strict", bool, inner)
    schema = _optional(form, "schema", dict, inner)
    return ResponseFormat(None if schema is None else json.dumps(schema, ensure_ascii=False))


def _tool(tool: Any, where: str) -> Tool:
    _typed(tool, dict, where)
    _function_type(tool, where)
    _only(tool, ("type", "function"), where)
    inner = f"{where}.function"
    function = _typed(_required(tool, "function", where), dict, inner)
    _only(function, ("name", "description", "parameters", "strict"), inner)
    _name(_required(function, "name", inner), f"{inner}.name")
    _optional(function, "description", str, inner)
    _optional(function, "strict", bool, inner)
    schema = _optional(function, "parameters", dict, inner)
    if schema and schema.get("type", "object") != "object":
        param = f"{inner}.parameters"
        raise InvalidRequest(
            f"Invalid `{param}`: the schema of a function's parameters has the type `object`, not "
            f"{json.dumps(schema['type'])[:80]}.",
            param=param,
        )
    given = {name: value for name, value in function.items() if value is not None}
    return {"type": "function", "function": given}


def _allowed(choice: dict[str, Any], tools: Sequence[Tool]) -> tuple[Any, tuple[Tool, ...]]:
    where = "tool_choice.allowed_tools"
    _only(choice, ("type", "allowed_tools"), "tool_choice")
    allowed = _typed(_required(choice, "allowed_tools", "tool_choice"), dict, where)
    _only(allowed, ("mode", "tools"), where)
    mode = _one_of(_required(allowed, "mode", where), ("auto", "required"), f"{where}.mode")
    listed = _typed(_required(allowed, "tools", where), list, f"{where}.tools")
    names = set()
    for index, entry in enumerate(listed):
        place = f"{where}.tools[{index}]"
        _function_type(_typed(entry, dict, place), place)
        names.add(_chosen(entry, tools, place))
    if not names:
        raise InvalidRequest(f"`{where}.tools` is empty. Name at least one tool.", param=f"{where}.tools")
    return mode, tuple(tool for tool in tools if tool["function"]["name"] in names)


def _chosen(entry: dict[str, Any], tools: Sequence[Tool], where: str) -> str:
    """The name of the function that `entry` is about, which must be one of `tools`."""
    inner = f"{where}.function"
    function = _typed(_required(entry, "function", where), dict, inner)
    _only(function, ("name",), inner)
    name = _typed(_required(function, "name", inner), str, f"{inner}.name")
    _need_tools(tools, "function")
    if name not in [tool["function"]["name"] for tool in tools]:
        raise InvalidRequest(
            f"`{inner}.name` is `{name[:80]}`, which is not in `tools`. Name one of them.", param=f"{inner}.name"
        )
    return name


def _need_tools(tools: Sequence[Tool], mode: str) -> None:
    if not tools and mode not in ("none", "auto"):
        raise InvalidRequest("`tool_choice` asks for a call, but there are no `tools`. Send some.", param="tool_choice")


def _function_type(value: dict[str, Any], where: str, *, also: tuple[str, ...] = ()) -> str:
    param = f"{where}.type"
    kind = _typed(_required(value, "type", where), str, param)
    if kind == "custom":
        raise UnsupportedParameter(f"`{param}` `custom` is not supported. Use `function`.", param=param)
    return _one_of(kind, ("function", *also), param)


def _name(value: Any, param: str) -> None:
    if not _NAME.fullmatch(_typed(value, str, param)):
        raise InvalidRequest(
            f"Invalid `{param}`: {value[:80]!r}. Use 1 to 64 letters, digits, `_` or `-`.", param=param
        )


def _one_of(value: Any, allowed: tuple[str, ...], param: str) -> Any:
    if _typed(value, str, param) not in allowed:
        raise InvalidRequest(f"Invalid `{param}`: {value[:80]!r}. Use one of {', '.join(allowed)}.", param=param)
    return value


def _required(value: dict[str, Any], name: str, where: str) -> Any:
    if value.get(name) is None:
        param = f"{where}.{name}"
        raise MissingParameter(f"Missing required parameter: `{param}`.", param=param)
    return value[name]


def _optional(value: dict[str, Any], name: str, kind: type, where: str) -> Any:
    found = value.get(name)
    return None if found is None else _typed(found, kind, f"{where}.{name}")


def _only(value: dict[str, Any], names: tuple[str, ...], where: str) -> None:
    if unknown := value.keys() - set(names):
        param = f"{where}.{min(unknown)[:80]}"
        raise UnknownParameter(f"Unknown parameter: `{param}`.", param=param)


def _typed(value: Any, kind: type, param: str) -> Any:
    if not isinstance(value, kind):
        expected = json_type(kind())
        raise InvalidType(f"Invalid type for `{param}`: expected {expected}, got {json_type(value)}.", param=param)
    return value
