"""The `messages` of a chat request, checked and brought to one form: `role` and `content` as text. No template."""

import json
from typing import Any

from tuneloom.errors import InvalidRequest, InvalidType, MissingParameter, UnknownParameter, UnsupportedParameter
from tuneloom.serve.body import json_type

ROLES = ("developer", "system", "user", "assistant", "tool", "function")

# Older and newer names of the roles that chat templates know; training rows are read alike.
_TEMPLATE_ROLES = {"developer": "system", "function": "tool"}

# What a message may carry besides `role` and `content`. Null is accepted in each, as clients send back what they got.
_FIELDS: dict[str, frozenset[str]] = {
    "name": frozenset(ROLES),
    "tool_call_id": frozenset({"tool"}),
    "tool_calls": frozenset({"assistant"}),
    "function_call": frozenset({"assistant"}),
    "refusal": frozenset({"assistant"}),
    "annotations": frozenset({"assistant"}),
    # What the client's `parse` has made of the content.
    "parsed": frozenset({"assistant"}),
    "audio": frozenset(),
}


def read_messages(messages: Any) -> tuple[dict[str, Any], ...]:
    """The messages as `ChatPrompt` wants them, in the words of chat templates; text parts are joined.

    Raises:
        InvalidRequest: naming the place as OpenAI does, such as `messages[1].content`.
    """
    if not isinstance(messages, list):
        raise InvalidType(
            f"Invalid type for `messages`: expected an array of objects, got {json_type(messages)}.", param="messages"
        )
    if not messages:
        raise InvalidRequest("`messages` is an empty array. Send at least one message.", param="messages")
    return tuple(_read(message, f"messages[{index}]") for index, message in enumerate(messages))


def _read(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise InvalidType(f"Invalid type for `{where}`: expected an object, got {json_type(message)}.", param=where)
    role = _role(message, where)
    read = {"role": _TEMPLATE_ROLES.get(role, role), "content": _content(message, role, where)}
    for name, value in message.items():
        if name in ("role", "content") or (name in _FIELDS and value is None):
            continue
        param = f"{where}.{name[:80]}"
        if name not in _FIELDS:
            raise UnknownParameter(f"Unknown parameter: `{param}`.", param=param)
        if role not in _FIELDS[name]:
            raise UnsupportedParameter(f"`{param}` is not supported in a message of role `{role}`.", param=param)
        if name in ("name", "tool_call_id"):
            read[name] = _text(value, param)
        elif name == "tool_calls" and value != []:
            read[name] = _tool_calls(value, param)
        elif name == "function_call":
            read["tool_calls"] = [{"type": "function", "function": _function(value, param)}]
    required = {"tool": "tool_call_id", "function": "name"}.get(role)
    if required and required not in read:
        raise MissingParameter(f"Missing required parameter: `{where}.{required}`.", param=f"{where}.{required}")
    return read


def _role(message: dict[str, Any], where: str) -> str:
    param = f"{where}.role"
    if "role" not in message:
        raise MissingParameter(f"Missing required parameter: `{param}`.", param=param)
    role = _text(message["role"], param)
    if role not in ROLES:
        raise InvalidRequest(f"Invalid `{param}`: {role[:80]!r}. Use one of {', '.join(ROLES)}.", param=param)
    return role


def _content(message: dict[str, Any], role: str, where: str) -> str:
    param = f"{where}.content"
    content = message.get("content")
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return _parts(content, role, param)
    if content is not None:
        raise InvalidType(
            f"Invalid type for `{param}`: expected a string or an array of parts, got {json_type(content)}.",
            param=param,
        )
    if role == "assistant":
        if isinstance(message.get("refusal"), str):
            return message["refusal"]
        if message.get("tool_calls") or message.get("function_call"):
            return ""
    if "content" not in message:
        raise MissingParameter(f"Missing required parameter: `{param}`.", param=param)
    raise InvalidType(f"Invalid type for `{param}`: expected a string or an array of parts, got null.", param=param)


def _parts(parts: list[Any], role: str, param: str) -> str:
    if not parts:
        raise InvalidRequest(f"`{param}` is an empty array. Send text.", param=param)
    texts = []
    for index, part in enumerate(parts):
        where = f"{param}[{index}]"
        if not isinstance(part, dict):
            raise InvalidType(f"Invalid type for `{where}`: expected an object, got {json_type(part)}.", param=where)
        kind = _text(part.get("type"), f"{where}.type")
        field = {"text": "text", "refusal": "refusal" if role == "assistant" else None}.get(kind)
        if field is None:
            raise InvalidRequest(
                f"Invalid `{where}.type`: {kind[:80]!r}. This model takes text: send parts of type `text`.",
                param=f"{where}.type",
            )
        if unknown := set(part) - {"type", field, "prompt_cache_breakpoint"}:
            name = f"{where}.{min(unknown)[:80]}"
            raise UnknownParameter(f"Unknown parameter: `{name}`.", param=name)
        texts.append(_text(part.get(field), f"{where}.{field}"))
    return "".join(texts)


def _tool_calls(calls: Any, param: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise InvalidType(f"Invalid type for `{param}`: expected an array, got {json_type(calls)}.", param=param)
    read = []
    for index, call in enumerate(calls):
        where = f"{param}[{index}]"
        if not isinstance(call, dict):
            raise InvalidType(f"Invalid type for `{where}`: expected an object, got {json_type(call)}.", param=where)
        if call.get("type", "function") != "function":
            raise UnsupportedParameter(f"`{where}.type` must be `function`.", param=f"{where}.type")
        function = _function(call.get("function"), f"{where}.function")
        read.append({"id": _text(call.get("id"), f"{where}.id"), "type": "function", "function": function})
    return read


def _function(function: Any, param: str) -> dict[str, str]:
    if not isinstance(function, dict):
        raise InvalidType(f"Invalid type for `{param}`: expected an object, got {json_type(function)}.", param=param)
    read = {name: _text(function.get(name), f"{param}.{name}") for name in ("name", "arguments")}
    try:
        # Clients send nothing for a call without arguments.
        arguments = json.loads(read["arguments"].strip() or "{}")
    except ValueError as error:
        raise _wrong_arguments(f"{param}.arguments", f"not JSON: {error}") from error
    if not isinstance(arguments, dict):
        raise _wrong_arguments(f"{param}.arguments", json_type(arguments))
    return read


def _wrong_arguments(param: str, what: str) -> InvalidRequest:
    return InvalidRequest(f"Invalid `{param}`: they are {what}. Send the text of a JSON object.", param=param)


def _text(value: Any, param: str) -> str:
    if not isinstance(value, str):
        raise InvalidType(f"Invalid type for `{param}`: expected a string, got {json_type(value)}.", param=param)
    return value
