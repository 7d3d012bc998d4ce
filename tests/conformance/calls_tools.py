"""Calls of `chat.completions` whose answers have a form: calls of tools, JSON, JSON of a schema."""

import json
import warnings
from typing import Any

import openai
from pydantic import BaseModel, ConfigDict

from tests.conformance.session import QUESTION, Session, fails, holds, is_a, same, user

COLOURS = ["blue", "green"]
SCHEMA: Any = {
    "type": "object",
    "properties": {"colour": {"type": "string", "enum": COLOURS}, "sure": {"type": "boolean"}},
    "required": ["colour", "sure"],
    "additionalProperties": False,
}
PAINT: Any = {"type": "function", "function": {"name": "paint", "description": "Paint it.", "parameters": SCHEMA}}
NOW: Any = {"type": "function", "function": {"name": "now"}}
NAMED: Any = {"type": "function", "function": {"name": "paint"}}
FORM: Any = {"type": "json_schema", "json_schema": {"name": "colour", "schema": SCHEMA, "strict": True}}
ROOM: Any = {"max_completion_tokens": 120}


class Paint(BaseModel):
    """Paint it."""

    model_config = ConfigDict(extra="forbid")
    sure: bool


def tools_required(session: Session) -> None:
    choice = session.ask(tools=[PAINT, NOW], tool_choice="required", parallel_tool_calls=False, **ROOM).choices[0]
    same("content and finish_reason", (choice.message.content, choice.finish_reason), (None, "tool_calls"))
    (call,) = choice.message.tool_calls
    holds("id", call.id.startswith("call_"), call.id)
    same("type", call.type, "function")
    holds("name", call.function.name in ("paint", "now"), call.function.name)
    _check(call.function)


def tools_named(session: Session) -> None:
    choice = session.ask(tools=[PAINT, NOW], tool_choice=NAMED, **ROOM).choices[0]
    same("names", [call.function.name for call in choice.message.tool_calls], ["paint"])
    same("finish_reason", choice.finish_reason, "stop")
    _check(choice.message.tool_calls[0].function)


def tools_none(session: Session) -> None:
    message = session.ask(tools=[PAINT], tool_choice="none").choices[0].message
    same("tool_calls", message.tool_calls, None)
    is_a(message.content, str)


def tools_stream(session: Session) -> None:
    options: Any = {"tools": [PAINT], "tool_choice": NAMED, **ROOM}
    chunks = list(session.ask(stream=True, **options))
    deltas = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    first, *others = deltas
    holds("id", (first.id or "").startswith("call_"), first.id)
    same("the first piece", (first.index, first.type, first.function.name), (0, "function", "paint"))
    same("ids, types and names of the others", {(d.index, d.id, d.type, d.function.name) for d in others}, _BARE)
    whole = session.ask(**options).choices[0].message.tool_calls[0].function.arguments
    same("arguments", "".join(delta.function.arguments or "" for delta in deltas), whole)
    same("finish_reason", chunks[-1].choices[0].finish_reason, "stop")


_BARE: Any = {(0, None, None, None)}


def tools_stream_helper(session: Session) -> None:
    options: Any = {"model": session.base, "messages": user(QUESTION), "tools": [PAINT], "tool_choice": NAMED, **ROOM}
    with session.client.chat.completions.stream(**options) as stream:
        kinds = {event.type for event in stream}
        answer = stream.get_final_completion()
    holds("events", "tool_calls.function.arguments.done" in kinds, kinds)
    (call,) = answer.choices[0].message.tool_calls or ()
    _check(call.function)


def tools_parse(session: Session) -> None:
    tool = openai.pydantic_function_tool(Paint)
    options: Any = {"tool_choice": {"type": "function", "function": {"name": "Paint"}}, **ROOM}
    answer = session.client.chat.completions.parse(model=session.base, messages=user(QUESTION), tools=[tool], **options)
    (call,) = answer.choices[0].message.tool_calls or ()
    is_a(call.function.parsed_arguments, Paint)


def tools_conversation(session: Session) -> None:
    options: Any = {"tools": [PAINT], "model": session.base, **ROOM}
    create = session.client.chat.completions.create
    first = create(messages=user(QUESTION), tool_choice=NAMED, **options)
    called: Any = first.choices[0].message
    result: Any = {"role": "tool", "tool_call_id": called.tool_calls[0].id, "content": '{"painted": true}'}
    options["max_completion_tokens"] = 8
    messages: Any = [*user(QUESTION), called, result]
    second = create(messages=messages, tool_choice="none", **options)
    assert first.usage is not None and second.usage is not None
    holds("the prompt has grown", second.usage.prompt_tokens > first.usage.prompt_tokens + 8, second.usage)
    is_a(second.choices[0].message.content, str)


def tools_unknown_choice(session: Session) -> None:
    choice: Any = {"type": "function", "function": {"name": "sing"}}
    ask = lambda: session.ask(tools=[PAINT], tool_choice=choice)  # noqa: E731
    fails(openai.BadRequestError, ask, code="invalid_value", param="tool_choice.function.name")


def format_json_object(session: Session) -> None:
    text = session.ask(response_format={"type": "json_object"}).choices[0].message.content
    holds("it begins as an object", text.startswith("{"), text)


def format_json_schema(session: Session) -> None:
    choice = session.ask(response_format=FORM, **ROOM).choices[0]
    same("finish_reason", choice.finish_reason, "stop")
    value = json.loads(choice.message.content)
    same("fields", list(value), ["colour", "sure"])
    holds("values", value["colour"] in COLOURS and value["sure"] in (True, False), value)
    chunks = list(session.ask(response_format=FORM, stream=True, **ROOM))
    same("streamed", json.loads("".join(chunk.choices[0].delta.content or "" for chunk in chunks)), value)


def format_parse(session: Session) -> None:
    options: Any = {"response_format": Paint, **ROOM}
    answer = session.client.chat.completions.parse(model=session.base, messages=user(QUESTION), **options)
    said: Any = answer.choices[0].message
    is_a(said.parsed, Paint)
    # As every guide does it: the message goes back as it came, of which some clients' own types are surprised.
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        more = session.client.chat.completions.create(
            model=session.base, messages=[*user(QUESTION), said, *user("And now?")], max_completion_tokens=2
        )
    assert more.usage is not None and answer.usage is not None
    holds("the answer is in the prompt", more.usage.prompt_tokens > answer.usage.prompt_tokens, more.usage)


def format_not_enforceable(session: Session) -> None:
    schema: Any = {"type": "object", "properties": {"a": {"not": {}}}}
    form: Any = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}
    ask = lambda: session.ask(response_format=form)  # noqa: E731
    fails(openai.BadRequestError, ask, code="invalid_value", param="response_format")


def _check(function: Any) -> None:
    """The arguments fit what was asked for."""
    arguments = json.loads(function.arguments)
    if function.name == "now":
        same("arguments", arguments, {})
    else:
        same("arguments", list(arguments), ["colour", "sure"])
        holds("colour", arguments["colour"] in COLOURS and arguments["sure"] in (True, False), arguments)
