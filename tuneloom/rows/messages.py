"""Chat messages and tools of a row, brought to the form that a chat template takes."""

from typing import Any

from tuneloom.rows.fields import Wrong, kind_of, only, optional, quoted
from tuneloom.rows.parse import parse_value

_MESSAGE_KEYS = {
    "system": ("role", "content", "name"),
    "developer": ("role", "content", "name"),
    "user": ("role", "content", "name"),
    "assistant": ("role", "content", "name", "weight", "tool_calls", "function_call", "refusal"),
    "tool": ("role", "content", "name", "tool_call_id"),
    "function": ("role", "content", "name"),
}


_PLAIN_KEYS = ["role", "content"]
_PLAIN_ROLES = ("user", "assistant", "system", "developer")
# Keys of answers that OpenAI's API gives and that say nothing when they are null or empty.
_EMPTY_KEYS = ("annotations", "audio")

# ShareGPT's names of roles.
_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}


def messages_of(data: dict[str, Any], key: str, within: str = "") -> list[dict[str, Any]]:
    """The messages under `key`, each with `content` as a string and what its role allows besides.

    `within` is the path of `data` in the row, such as `input.`.
    """
    name = f"{within}{key}"
    return [
        value if _is_plain(value) else _message(value, f"`{name}[{index}]`")
        for index, value in enumerate(_array(data, key, name))
    ]


def spoken_messages_of(data: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """The same from ShareGPT's `from` and `value`; messages with `role` and `content` are taken as they are."""
    return [_spoken(value, f"`{key}[{index}]`") for index, value in enumerate(_array(data, key, key))]


def _array(data: dict[str, Any], key: str, name: str) -> list[Any]:
    value = data.get(key)
    if key not in data:
        raise Wrong(f"`{name}` is missing.")
    if not isinstance(value, list):
        raise Wrong(f"`{name}` is {kind_of(value)}, not an array of messages.")
    if not value:
        raise Wrong(f"`{name}` is empty.")
    return value


def _is_plain(value: Any) -> bool:
    """Whether it is what `_message` would make of it: so are most, and this is ten times faster."""
    if type(value) is not dict or list(value) != _PLAIN_KEYS:
        return False
    content = value["content"]
    return type(content) is str and content != "" and value["role"] in _PLAIN_ROLES


def _spoken(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict) or "role" in value:
        return _message(value, where)
    only(value, ("from", "value", "weight"), where)
    speaker = value.get("from")
    if not isinstance(speaker, str):
        raise Wrong(f"{where}: `from` is {'missing' if speaker is None else kind_of(speaker)}.")
    if speaker not in _SPEAKERS:
        known = ", ".join(f"`{name}`" for name in _SPEAKERS)
        raise Wrong(f"{where}: unknown `from` {quoted(speaker)}. Known: {known}.")
    if not isinstance(value.get("value"), str):
        raise Wrong(f"{where}: `value` is {kind_of(value.get('value'))}, not a string.")
    message = {"role": _SPEAKERS[speaker], "content": value["value"]}
    return _message(message | ({"weight": value["weight"]} if "weight" in value else {}), where)


def _message(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Wrong(f"{where} is {kind_of(value)}, not an object.")
    role = value.get("role")
    if not isinstance(role, str):
        raise Wrong(f"{where}: `role` is missing." if role is None else f"{where}: `role` is {kind_of(role)}.")
    if role not in _MESSAGE_KEYS:
        raise Wrong(f"{where}: unknown role {quoted(role)}. Roles are {', '.join(f'`{r}`' for r in _MESSAGE_KEYS)}.")
    if role == "assistant":
        value = {key: given for key, given in value.items() if given or key not in _EMPTY_KEYS}
    only(value, _MESSAGE_KEYS[role], where)
    for key in ("name", "tool_call_id", "refusal"):
        optional(value, key, str, "a string", where)
    if role == "assistant":
        return _assistant(value, where)
    message = {"role": role, "content": _content(value, where)}
    if role == "function":
        message["role"] = "tool"
    return message | {key: value[key] for key in ("name", "tool_call_id") if value.get(key) is not None}


def _assistant(value: dict[str, Any], where: str) -> dict[str, Any]:
    weight = 1 if value.get("weight") is None else value["weight"]
    if isinstance(weight, bool) or weight not in (0, 1):
        given = f"a string, {quoted(weight)}" if isinstance(weight, str) else quoted(weight)
        raise Wrong(f"{where}: `weight` is {given}; it must be the number 0 or 1.")
    calls = _tool_calls(value, where)
    content = value.get("content")
    if content is None and value.get("refusal"):
        content = value["refusal"]
    if content is None and not calls:
        raise Wrong(f"{where}: `content` is missing, and there are no `tool_calls`.")
    text = "" if content is None else _content({"content": content}, where)
    if not text and not calls:
        raise Wrong(f"{where}: `content` is empty: there is nothing to learn.")
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if weight == 0:
        message["weight"] = 0
    if value.get("name") is not None:
        message["name"] = value["name"]
    return message | ({"tool_calls": calls} if calls else {})


def _content(value: dict[str, Any], where: str) -> str:
    content = value.get("content")
    if isinstance(content, str):
        return content
    if content is None:
        raise Wrong(f"{where}: `content` is missing.")
    if not isinstance(content, list):
        raise Wrong(f"{where}: `content` is {kind_of(content)}, not a string or an array of text parts.")
    texts = []
    for index, part in enumerate(content):
        type_ = part.get("type") if isinstance(part, dict) else None
        if not isinstance(part, dict) or type_ not in ("text", "refusal"):
            what = f"of type {quoted(type_)}" if isinstance(part, dict) else kind_of(part)
            raise Wrong(f"{where}: `content[{index}]` is {what}; only parts of type `text` can be learned.")
        only(part, ("type", type_), f"{where}: `content[{index}]`")
        if not isinstance(part.get(type_), str):
            raise Wrong(f"{where}: `content[{index}].{type_}` is {kind_of(part.get(type_))}, not a string.")
        texts.append(part[type_])
    return "".join(texts)


def _tool_calls(value: dict[str, Any], where: str) -> list[dict[str, Any]]:
    calls = value.get("tool_calls")
    if value.get("function_call") is not None:
        if calls is not None:
            raise Wrong(f"{where}: give `tool_calls` or the older `function_call`, not both.")
        calls = [{"type": "function", "function": value["function_call"]}]
    if calls is None:
        return []
    if not isinstance(calls, list):
        raise Wrong(f"{where}: `tool_calls` is {kind_of(calls)}, not an array.")
    return [_tool_call(call, f"{where}: `tool_calls[{index}]`") for index, call in enumerate(calls)]


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    if not isinstance(call, dict):
        raise Wrong(f"{where} is {kind_of(call)}, not an object.")
    only(call, ("id", "type", "function"), where)
    optional(call, "id", str, "a string", where)
    if call.get("type", "function") != "function":
        raise Wrong(f"{where}: `type` is {quoted(call['type'])}; it must be `function`.")
    function = call.get("function")
    if not isinstance(function, dict):
        raise Wrong(f"{where}: `function` is {kind_of(function)}, not an object.")
    only(function, ("name", "arguments"), where)
    for key in ("name", "arguments"):
        if not isinstance(function.get(key), str):
            raise Wrong(f"{where}: `function.{key}` is {kind_of(function.get(key))}, not a string.")
    try:
        # Nothing stands for no arguments.
        parse_value(function["arguments"].strip().encode() or b"{}")
    except (Wrong, UnicodeEncodeError) as problem:
        raise Wrong(f"{where}: `function.arguments`: {problem}") from None
    return {**({"id": call["id"]} if call.get("id") else {}), "type": "function", "function": function}


def tools_of(data: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    tools, functions = data.get("tools"), data.get("functions")
    if functions is not None:
        if tools is not None:
            raise Wrong("Give `tools` or the older `functions`, not both.")
        if not isinstance(functions, list):
            raise Wrong(f"`functions` is {kind_of(functions)}, not an array.")
        tools = [{"type": "function", "function": function} for function in functions]
    if tools is None:
        return ()
    if not isinstance(tools, list):
        raise Wrong(f"`tools` is {kind_of(tools)}, not an array.")
    for index, tool in enumerate(tools):
        _check_tool(tool, f"`tools[{index}]`")
    return tuple(tools)


def _check_tool(tool: Any, where: str) -> None:
    if not isinstance(tool, dict):
        raise Wrong(f"{where} is {kind_of(tool)}, not an object.")
    only(tool, ("type", "function"), where)
    if tool.get("type") != "function":
        raise Wrong(f"{where}: `type` is {quoted(tool.get('type'))}; it must be `function`.")
    function = tool.get("function")
    if not isinstance(function, dict):
        raise Wrong(f"{where}: `function` is {kind_of(function)}, not an object.")
    only(function, ("name", "description", "parameters", "strict"), where)
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise Wrong(f"{where}: `function.name` is {kind_of(function.get('name'))}; it must be a non-empty string.")
    optional(function, "description", str, "a string", where)
    optional(function, "parameters", dict, "an object", where)
    optional(function, "strict", bool, "true or false", where)
