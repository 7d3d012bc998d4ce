"""The row formats: how each is told apart, what it becomes, and which method learns it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from tuneloom.rows.fields import Wrong, kind_of, only, optional, quoted, string
from tuneloom.rows.messages import messages_of, spoken_messages_of, tools_of

Method = Literal["supervised", "dpo"]


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


@dataclass(frozen=True)
class Preference:
    """A prompt and two different answers to it: messages and an assistant message each, or plain text all three."""

    prompt: tuple[dict[str, Any], ...] | str
    preferred: dict[str, Any] | str
    non_preferred: dict[str, Any] | str
    tools: tuple[dict[str, Any], ...] = ()

    def answered(self) -> tuple["Conversation | Pair", "Conversation | Pair"]:
        """The prompt with the preferred answer, and with the other; only the answers are learned."""
        return self._with(self.preferred), self._with(self.non_preferred)

    def _with(self, answer: dict[str, Any] | str) -> "Conversation | Pair":
        if isinstance(self.prompt, str):
            assert isinstance(answer, str)
            return Pair(self.prompt, answer)
        assert isinstance(answer, dict)
        return Conversation((*map(unlearned, self.prompt), answer), self.tools)


Row = Conversation | Pair | Text | Preference


@dataclass(frozen=True)
class Format:
    """`name` is as people read it; `read` raises Wrong."""

    name: str
    read: Callable[[dict[str, Any]], Row]
    is_preference: bool = False


def format_of(data: dict[str, Any]) -> Format:
    """Raises Wrong if the keys are those of no format."""
    for keys, format_ in _FORMATS:
        if not keys.isdisjoint(data):
            return format_
    keys = ", ".join(quoted(key) for key in list(data)[:8]) or "none"
    raise Wrong(
        f"No known format: the keys are {keys}. Use `messages`, `prompt` and `completion`, "
        "`instruction` and `output`, `input` and `output`, `text`, or for preferences `input`, `preferred_output` "
        "and `non_preferred_output`."
    )


def check_method(format_: Format, method: Method) -> None:
    """Raises Wrong if the method cannot learn rows of this format."""
    if method == "supervised" and format_.is_preference:
        raise Wrong(
            f"The format {format_.name} is that of preference rows, which the method `supervised` cannot learn. "
            "Create the job with the method `dpo`, or give rows with `messages`."
        )
    if method == "dpo" and not format_.is_preference:
        raise Wrong(
            f"The method `dpo` learns preference rows, and this one has the format {format_.name}. Give `input`, "
            "`preferred_output` and `non_preferred_output`, or `prompt`, `chosen` and `rejected`; or create the job "
            "with the method `supervised`."
        )


def _chat(data: dict[str, Any]) -> Row:
    only(data, ("messages", "tools", "parallel_tool_calls", "functions"), "the row")
    optional(data, "parallel_tool_calls", bool, "true or false")
    tools = tools_of(data)
    return _conversation(messages_of(data, "messages"), tools, "messages")


def _sharegpt(data: dict[str, Any]) -> Row:
    only(data, ("conversations", "system", "tools", "id"), "the row")
    messages = spoken_messages_of(data, "conversations")
    if data.get("system") is not None and (system := string(data, "system")):
        if messages[0]["role"] == "system":
            raise Wrong("Give `system` or a first message from `system`, not both.")
        messages = [{"role": "system", "content": system}, *messages]
    return _conversation(messages, tools_of(data), "conversations")


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
    prompt = [unlearned(message) for message in messages_of(data, "prompt")]
    return _conversation(prompt + messages_of(data, "completion"), tools_of(data), "completion")


def _text(data: dict[str, Any]) -> Row:
    only(data, ("text",), "the row")
    return Text(string(data, "text", may_be_empty=False))


def _openai_preference(data: dict[str, Any]) -> Row:
    noun = "output" if "preferred_output" in data or "non_preferred_output" in data else "completion"
    preferred, other = f"preferred_{noun}", f"non_preferred_{noun}"
    only(data, ("input", preferred, other), "the row")
    if "input" not in data:
        raise Wrong("`input` is missing.")
    given = data["input"]
    if not isinstance(given, dict):
        raise Wrong(f"`input` is {kind_of(given)}, not an object with `messages`.")
    only(given, ("messages", "tools", "parallel_tool_calls"), "`input`")
    optional(given, "parallel_tool_calls", bool, "true or false", "`input`")
    prompt = _prompt(messages_of(given, "messages", "input."), "input.messages")
    answers = _answer(data, preferred), _answer(data, other)
    return _preference(prompt, *answers, tools_of(given), (preferred, other))


def _trl_preference(data: dict[str, Any]) -> Row:
    names = ("chosen", "rejected")
    if not isinstance(data.get("prompt"), list):
        only(data, ("prompt", *names), "the row")
        prompt = string(data, "prompt")
        chosen, rejected = (string(data, name, may_be_empty=False) for name in names)
        return _preference(prompt, chosen, rejected, (), names)
    only(data, ("prompt", *names, "tools", "parallel_tool_calls"), "the row")
    optional(data, "parallel_tool_calls", bool, "true or false")
    messages = _prompt(messages_of(data, "prompt"), "prompt")
    return _preference(messages, _answer(data, "chosen"), _answer(data, "rejected"), tools_of(data), names)


def _prompt(messages: list[dict[str, Any]], name: str) -> tuple[dict[str, Any], ...]:
    if messages[-1]["role"] == "assistant":
        raise Wrong(f"The last message of `{name}` has the role `assistant`; the answers follow another role's.")
    return tuple(messages)


def _answer(data: dict[str, Any], name: str) -> dict[str, Any]:
    """The one assistant message of a preference."""
    messages = messages_of(data, name)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        roles = ", ".join(f"`{message['role']}`" for message in messages[:5])
        raise Wrong(f"`{name}` holds {roles}; it must be one message with the role `assistant`.")
    if messages[0].get("weight") == 0:
        raise Wrong(f"`{name}[0]` has `weight` 0, and a preference is between two answers that count.")
    return messages[0]


def _preference(
    prompt: tuple[dict[str, Any], ...] | str,
    preferred: Any,
    other: Any,
    tools: tuple[dict[str, Any], ...],
    names: tuple[str, str],
) -> Preference:
    if preferred == other:
        raise Wrong(f"`{names[0]}` and `{names[1]}` are the same answer: there is nothing to prefer.")
    return Preference(prompt, preferred, other, tools)


def unlearned(message: dict[str, Any]) -> dict[str, Any]:
    return {**message, "weight": 0} if message["role"] == "assistant" else message


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


_PREFERRED = {"preferred_output", "non_preferred_output", "preferred_completion", "non_preferred_completion"}
# The first whose keys a row has one of is its format.
_FORMATS: tuple[tuple[frozenset[str], Format], ...] = (
    (frozenset({"messages"}), Format("`messages`", _chat)),
    (frozenset(_PREFERRED), Format("`input`/`preferred_output`", _openai_preference, is_preference=True)),
    (frozenset({"chosen", "rejected"}), Format("`prompt`/`chosen`/`rejected`", _trl_preference, is_preference=True)),
    (frozenset({"instruction"}), Format("`instruction`/`output`", _instruction)),
    (frozenset({"prompt", "completion"}), Format("`prompt`/`completion`", _completion)),
    (frozenset({"text"}), Format("`text`", _text)),
    (frozenset({"conversations"}), Format("`conversations`", _sharegpt)),
    (frozenset({"input", "output"}), Format("`input`/`output`", _input_output)),
)
