"""The form that an answer must have: its grammar, and how calls are read out of it. No engine, no frames.

A schema that cannot be enforced is refused, but for that of a tool which is not `strict`: its arguments are then any
JSON object.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tuneloom.engine.grammar import check_grammar, json_object_grammar, json_schema_grammar
from tuneloom.engine.tool_grammar import parameters_schema, spaced, tool_grammar
from tuneloom.engine.tool_parser import CallParser
from tuneloom.engine.tools import PYTHON_TAG
from tuneloom.errors import InvalidRequest
from tuneloom.generation import ChatPrompt, FinishReason, Prompt, ResponseFormat, ToolChoice

if TYPE_CHECKING:
    from tuneloom.engine.text import Codec


@dataclass(frozen=True)
class Form:
    """`grammar` None: any text. `tools`: those whose calls are looked for. `shown`: special tokens that calls have."""

    grammar: str | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    choice: ToolChoice = field(default_factory=ToolChoice)
    shown: frozenset[int] = frozenset()

    def parser(self, codec: "Codec") -> CallParser | None:
        if not self.tools:
            return None
        return CallParser(codec.call_format, self.tools, is_forced=self.choice.mode == "required")

    def finish_reason(self, reason: FinishReason | None, num_calls: int) -> FinishReason | None:
        """A call that the caller has named ends by `stop`, as at OpenAI: it was no decision of the model."""
        is_call = reason == "stop" and num_calls > 0 and self.choice.name is None
        return "tool_calls" if is_call else reason


def form_of(prompt: Prompt, response_format: ResponseFormat | None, codec: "Codec") -> Form:
    """The form of the answers to a prompt. May block for seconds where a schema is new.

    Raises:
        InvalidRequest: a schema cannot be enforced; `param` names it.
        Overloaded: too many schemas are being checked.
    """
    text_grammar = _text_grammar(response_format)
    if not isinstance(prompt, ChatPrompt) or not prompt.tools:
        return Form(text_grammar)
    choice = prompt.tool_choice
    if choice.mode == "none" and text_grammar is not None:
        return Form(text_grammar)
    tools = prompt.tools

    def grammar() -> str:
        schema = _text_schema(response_format)
        return tool_grammar(codec.call_format, tools, choice, codec.marks, text_schema=schema)

    if choice.mode == "none":
        return Form(grammar())
    try:
        check_grammar(grammar(), param="tools")
    except InvalidRequest:
        tools = _enforceable(tools, choice)
        check_grammar(grammar(), param="tools")
    return Form(grammar(), tools, choice, _shown(codec))


def _text_grammar(response_format: ResponseFormat | None) -> str | None:
    if response_format is None:
        return None
    if response_format.schema is None:
        return json_object_grammar()
    return json_schema_grammar(response_format.schema, param="response_format")


def _text_schema(response_format: ResponseFormat | None) -> dict[str, Any] | None:
    if response_format is None:
        return None
    return {"type": "object"} if response_format.schema is None else json.loads(response_format.schema)


def _enforceable(tools: Sequence[Mapping[str, Any]], choice: ToolChoice) -> tuple[Mapping[str, Any], ...]:
    """The tools, those that may be called with schemas that can be enforced."""
    found = []
    for index, tool in enumerate(tools):
        function = tool["function"]
        found.append(tool)
        if choice.name not in (None, function["name"]):
            continue
        param = f"tools[{index}].function.parameters"
        try:
            schema = spaced(parameters_schema(function), param=param)
            check_grammar(json.dumps({"grammars": [{"json_schema": schema}]}), param=param)
        except InvalidRequest:
            if function.get("strict"):
                raise
            found[-1] = {**tool, "function": {**function, "parameters": {"type": "object"}}}
    return tuple(found)


def _shown(codec: "Codec") -> frozenset[int]:
    format = codec.call_format
    text = format.begin + format.middle + (format.between or "") + format.end + PYTHON_TAG
    return frozenset(id for mark, id in codec.marks.ids.items() if mark in text)
