from typing import Any

import pytest

from tuneloom.errors import InvalidRequest
from tuneloom.generation import ChatPrompt, ResponseFormat, ToolChoice
from tuneloom.serve.openai import Call, parse_chat

HI = [{"role": "user", "content": "hi"}]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}


def tool(name: str = "f", **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **more}}


def parse(**fields: Any) -> Call:
    return parse_chat({"model": "m", "messages": HI, **fields})


def prompt(**fields: Any) -> ChatPrompt:
    (prompt,) = parse(**fields).prompts
    assert isinstance(prompt, ChatPrompt)
    return prompt


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def allowed(mode: str, *names: str) -> dict[str, Any]:
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [named(name) for name in names]}}


def test_tools_arrive_as_they_were_sent_without_nulls() -> None:
    given = tool("get-it_2", description="d", parameters=SCHEMA, strict=True)
    assert prompt(tools=[given, tool("g", description=None, strict=None)]).tools == (given, tool("g"))


@pytest.mark.parametrize(
    ("fields", "choice"),
    [
        ({}, ToolChoice("auto")),
        ({"tool_choice": "auto"}, ToolChoice("auto")),
        ({"tool_choice": "none"}, ToolChoice("none")),
        ({"tool_choice": "required"}, ToolChoice("required")),
        ({"tool_choice": named("g")}, ToolChoice("required", "g")),
        ({"parallel_tool_calls": False}, ToolChoice(is_parallel=False)),
    ],
)
def test_each_choice_of_tools_is_understood(fields: dict[str, Any], choice: ToolChoice) -> None:
    read = prompt(tools=[tool("f"), tool("g")], **fields)
    assert (read.tool_choice, len(read.tools)) == (choice, 2)


def test_allowed_tools_leave_only_those() -> None:
    read = prompt(tools=[tool("f"), tool("g"), tool("h")], tool_choice=allowed("required", "h", "f"))
    assert (read.tools, read.tool_choice) == ((tool("f"), tool("h")), ToolChoice("required"))


def test_without_tools_there_is_nothing_to_choose() -> None:
    for fields in ({"tools": []}, {"tools": None, "tool_choice": "none"}, {"parallel_tool_calls": False}):
        assert prompt(**fields) == ChatPrompt(tuple(HI))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, ResponseFormat()),
        ({"type": "json_schema", "json_schema": {"name": "n"}}, ResponseFormat()),
        (
            {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": {"type": "object"}}},
            ResponseFormat('{"type": "object"}'),
        ),
    ],
)
def test_each_response_format_is_understood(value: Any, expected: ResponseFormat | None) -> None:
    assert parse(response_format=value).response_format == expected


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"tools": {}}, "invalid_type", "tools"),
        ({"tools": [1]}, "invalid_type", "tools[0]"),
        ({"tools": [{}]}, "missing_required_parameter", "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "missing_required_parameter", "tools[0].function"),
        ({"tools": [{"type": "custom", "custom": {}}]}, "unsupported_parameter", "tools[0].type"),
        ({"tools": [{"type": "web"}]}, "invalid_value", "tools[0].type"),
        ({"tools": [{**tool(), "x": 1}]}, "unknown_parameter", "tools[0].x"),
        ({"tools": [tool(), named("")]}, "invalid_value", "tools[1].function.name"),
        ({"tools": [tool("a b")]}, "invalid_value", "tools[0].function.name"),
        ({"tools": [tool("a" * 65)]}, "invalid_value", "tools[0].function.name"),
        ({"tools": [tool(1)]}, "invalid_type", "tools[0].function.name"),
        ({"tools": [tool(), tool()]}, "invalid_value", "tools[1].function.name"),
        ({"tools": [tool(f"f{i}") for i in range(129)]}, "invalid_value", "tools"),
        ({"tools": [tool(description=1)]}, "invalid_type", "tools[0].function.description"),
        ({"tools": [tool(parameters="x")]}, "invalid_type", "tools[0].function.parameters"),
        ({"tools": [tool(parameters={"type": "string"})]}, "invalid_value", "tools[0].function.parameters"),
        ({"tools": [tool(strict="yes")]}, "invalid_type", "tools[0].function.strict"),
        ({"tools": [tool(returns={})]}, "unknown_parameter", "tools[0].function.returns"),
        ({"tools": [tool()], "tool_choice": "any"}, "invalid_value", "tool_choice"),
        ({"tools": [tool()], "tool_choice": 1}, "invalid_type", "tool_choice"),
        ({"tools": [tool()], "tool_choice": {}}, "missing_required_parameter", "tool_choice.type"),
        ({"tools": [tool()], "tool_choice": named("g")}, "invalid_value", "tool_choice.function.name"),
        (
            {"tools": [tool()], "tool_choice": {"type": "function"}},
            "missing_required_parameter",
            "tool_choice.function",
        ),
        ({"tools": [tool()], "tool_choice": {"type": "custom"}}, "unsupported_parameter", "tool_choice.type"),
        ({"tool_choice": "required"}, "invalid_value", "tool_choice"),
        ({"tool_choice": named("f")}, "invalid_value", "tool_choice"),
        ({"tools": [tool()], "tool_choice": allowed("auto")}, "invalid_value", "tool_choice.allowed_tools.tools"),
        (
            {"tools": [tool()], "tool_choice": allowed("auto", "g")},
            "invalid_value",
            "tool_choice.allowed_tools.tools[0].function.name",
        ),
        ({"tools": [tool()], "tool_choice": allowed("none", "f")}, "invalid_value", "tool_choice.allowed_tools.mode"),
        ({"tools": [tool()], "parallel_tool_calls": 1}, "invalid_type", "parallel_tool_calls"),
        ({"response_format": "json"}, "invalid_type", "response_format"),
        ({"response_format": {}}, "missing_required_parameter", "response_format.type"),
        ({"response_format": {"type": "xml"}}, "invalid_value", "response_format.type"),
        ({"response_format": {"type": "text", "x": 1}}, "unknown_parameter", "response_format.x"),
        (
            {"response_format": {"type": "json_schema"}},
            "missing_required_parameter",
            "response_format.json_schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
            "missing_required_parameter",
            "response_format.json_schema.name",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": []}}},
            "invalid_type",
            "response_format.json_schema.schema",
        ),
    ],
)
def test_a_wrong_tool_choice_or_format_is_named_by_its_place(fields: dict[str, Any], code: str, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(**fields)
    assert (caught.value.code, caught.value.param) == (code, param)
