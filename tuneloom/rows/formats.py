"""The row formats: how each is told apart, and what it becomes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tuneloom.rows.fields import Wrong, only, optional, quoted, string
from tuneloom.rows.messages import message_of, messages_of, tools_of

_PREFERENCE_KEYS = {"preferred_output", "non_preferred_output", "preferred_completion", "chosen", "rejected"}


@dataclass(frozen=True)
class Conversation:
    """Messages as a chat template takes them; an assistant message with `weight` 0 is not learned."""

    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Pair:
    """Plain text: the completion and its end-of-text are learned, the prompt is not."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Text:
    text: str


Row = Conversation | Pair | Text


def format_of(data: dict[str, Any]) -> tuple[str, Callable[[dict[str, Any]], Row]]:
    if "messages" in data:
        return "`messages`", _chat
    if "instruction" in data:
        return "`instruction`/`output`", _instruction
    if "prompt" in data or "completion" in data:
        return "`prompt`/`completion`", _completion
    if "text" in data:
        return "`text`", _text
    if preference := sorted(_PREFERENCE_KEYS & data.keys()):
        raise Wrong(f"{quoted(preference[0])} belongs to preference rows, which supervised training cannot use.")
    if "input" in data or "output" in data:
        return "`input`/`output`", _input_output
    keys = ", ".join(quoted(key) for key in list(data)[:8]) or "none"
    raise Wrong(
        f"No known format: the keys are {keys}. Use `messages`, `prompt` and `completion`, "
        "`instruction` and `output`, `input` and `output`, or `text`."
    )


def _chat(data: dict[str, Any]) -> Row:
    only(data, ("messages", "tools", "parallel_tool_calls", "functions"), "the row")
    optional(data, "parallel_tool_calls", bool, "true or false")
    tools = tools_of(data)
    messages = [message_of(value, f"`messages[{index}]`") for index, value in enumerate(messages_of(data, "messages"))]
    return _conversation(messages, tools, "messages")


def _instruction(data: dict[str, Any]) -> Row:
    only(data, ("instruction", "input", "output"), "the row")
    question = string(data, "instruction", may_be_empty=False)
    if data.get("input") is not None and (more := string(data, "input")):
        question = f"{question}\n\n{more}"
    return _turn(question, string(data, "output", may_be_empty=False))


def _input_output(data: dict[str, Any]) -> Row:
    only(data, ("input", "output"), "the row")
    return _turn(string(data, "input", may_be_empty=False), string(data, "output", may_be_empty=False))


def _completion(data: dict[str, Any]) -> Row:
    if not isinstance(data.get("prompt"), list):
        only(data, ("prompt", "completion"), "the row")
        return Pair(string(data, "prompt"), string(data, "completion", may_be_empty=False))
    only(data, ("prompt", "completion", "tools", "parallel_tool_calls"), "the row")
    optional(data, "parallel_tool_calls", bool, "true or false")
    prompt = [message_of(value, f"`prompt[{i}]`") for i, value in enumerate(messages_of(data, "prompt"))]
    answer = [message_of(value, f"`completion[{i}]`") for i, value in enumerate(messages_of(data, "completion"))]
    prompt = [{**message, "weight": 0} if message["role"] == "assistant" else message for message in prompt]
    return _conversation(prompt + answer, tools_of(data), "completion")


def _text(data: dict[str, Any]) -> Row:
    only(data, ("text",), "the row")
    return Text(string(data, "text", may_be_empty=False))


def _turn(question: str, answer: str) -> Conversation:
    return Conversation(({"role": "user", "content": question}, {"role": "assistant", "content": answer}))


def _conversation(messages: list[dict[str, Any]], tools: tuple[dict[str, Any], ...], name: str) -> Conversation:
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        raise Wrong(f"`{name}` has no message with the role `assistant`: there is nothing to learn.")
    if messages[-1]["role"] != "assistant":
        raise Wrong(f"The last message of `{name}` has the role `{messages[-1]['role']}`; it must be `assistant`.")
    if all(answer.get("weight") == 0 for answer in answers):
        raise Wrong("Every assistant message has `weight` 0: there is nothing to learn.")
    return Conversation(tuple(messages), tools)
