"""How a base is told of tools and how it writes calls of them, found out by asking its chat template. No torch, no ids.

A template that knows tools is rendered once with calls of two made-up tools: what stands around their names and
arguments is the format. Where a template has no place for tools, or writes calls in a way that is not understood,
tools, calls and results go into the text of messages: every base can work with tools, trained and served alike.
"""

import hashlib
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tuneloom.engine.vocabulary import MARK
from tuneloom.errors import InvalidRequest

Message = dict[str, Any]
Render = Callable[[Sequence[Message], Sequence[Mapping[str, Any]], bool], str]

# What Llama 3 may write before a call; no part of what its template writes.
PYTHON_TAG = "<|python_tag|>"


@dataclass(frozen=True)
class CallFormat:
    """Calls as text: `begin` NAME `middle` ARGUMENTS, then `between` NAME ... for each further one, at last `end`.

    `between` None: one call at most. `arguments` are a JSON object, or written as `<parameter=key>` blocks.
    """

    begin: str
    middle: str
    between: str | None
    end: str
    arguments: Literal["json", "parameters"] = "json"

    @property
    def marker(self) -> str:
        """The mark that a call begins with; empty if a call is told from text by its form only."""
        found = MARK.match(self.begin)
        return found[0] if found else ""

    def write(self, calls: Sequence[Mapping[str, Any]]) -> str:
        """The text of calls, which are `function` objects with `name` and `arguments`."""
        written = [call["name"] + self.middle + self._write_arguments(call["arguments"]) for call in calls]
        if self.between is not None:
            return self.begin + self.between.join(written) + self.end
        return "\n".join(self.begin + call + self.end for call in written)

    def _write_arguments(self, arguments: Any) -> str:
        if self.arguments == "json" or not isinstance(arguments, Mapping):
            return to_json(arguments)
        return "".join(
            f"<parameter={key}>\n{value if isinstance(value, str) else to_json(value)}\n</parameter>\n"
            for key, value in arguments.items()
        )


# As Hermes and Qwen write calls: what small models have seen most of.
TAGGED = CallFormat(
    begin='<tool_call>\n{"name": "',
    middle='", "arguments": ',
    between='}\n</tool_call>\n<tool_call>\n{"name": "',
    end="}\n</tool_call>",
)
# As Gemma 3 is asked to, having no template for it.
BARE = CallFormat(begin='{"name": "', middle='", "parameters": ', between=None, end="}")

_TAGGED_TEXT = """# Tools

You can call functions to answer the user. These are the functions, each with the JSON schema of its arguments:
<tools>
{tools}
</tools>

To call a function, write its name and arguments as a JSON object within tags, once for each call:
<tool_call>
{{"name": <name of the function>, "arguments": <object with the arguments>}}
</tool_call>"""
_BARE_TEXT = """You have access to functions. To call one of them, answer with this JSON object and nothing else:
{{"name": <name of the function>, "parameters": <object with the arguments>}}

These are the functions, each with the JSON schema of its arguments:
{tools}"""


@dataclass(frozen=True)
class ToolUse:
    """What one base is given: where it is `shown` tools, and how it writes calls (`format`).

    `shown`: by the template's own `tools`, by a field `tools` of the system message, or in the text of that message.
    `writes_calls`: the template itself writes the calls of earlier answers. `short_ids`: it insists on ids of nine
    letters and digits. `takes_system`: it knows system messages.
    """

    format: CallFormat
    shown: Literal["template", "system", "text"]
    writes_calls: bool
    short_ids: bool = False
    takes_system: bool = True

    def prepare(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]
    ) -> tuple[list[Message], list[Mapping[str, Any]]]:
        """Messages and tools as the template takes them."""
        prepared = [self._prepare(message) for message in messages]
        functions = [_plain_function(tool["function"]) for tool in tools]
        if self.shown == "text":
            prepared = _join_results(prepared)
        if not functions:
            return prepared, []
        if self.shown == "template":
            return prepared, [{"type": "function", "function": function} for function in functions]
        if self.shown == "text":
            return self._tell(prepared, functions), []
        if prepared[0].get("role") != "system":
            prepared.insert(0, {"role": "system", "content": ""})
        prepared[0]["tools"] = to_json(functions)
        return prepared, []

    def _prepare(self, message: Message) -> Message:
        prepared = dict(message)
        if self.short_ids and "tool_call_id" in message:
            prepared["tool_call_id"] = _short_id(message["tool_call_id"])
        calls = prepared.get("tool_calls")
        if not calls:
            return prepared
        if not self.writes_calls:
            text = self.format.write([call["function"] for call in calls])
            del prepared["tool_calls"]
            content = prepared.get("content") or ""
            return {**prepared, "content": f"{content}\n{text}" if content else text}
        if self.short_ids:
            prepared["tool_calls"] = [{**c, "id": _short_id(c.get("id") or c["function"]["name"])} for c in calls]
        return prepared

    def _tell(self, messages: list[Message], functions: Sequence[Mapping[str, Any]]) -> list[Message]:
        """The messages with the functions in the text of the first one."""
        lines = "\n".join(map(to_json, functions))
        text = (_BARE_TEXT if self.format == BARE else _TAGGED_TEXT).format(tools=lines)
        first, *rest = messages
        if first.get("role") == "system":
            return [{**first, "content": f"{first['content']}\n\n{text}"}, *rest]
        if self.takes_system or first.get("role") != "user":
            return [{"role": "system", "content": text}, *messages]
        return [{**first, "content": f"{text}\n\n{first['content']}"}, *rest]


def find_tool_use(render: Render, template: str, stops: Collection[str]) -> ToolUse:
    """Ask a template. `render` raises InvalidRequest where it refuses; `stops` are the tokens that end an answer."""
    takes_system = _renders(render, [{"role": "system", "content": _VALUE}, _USER])
    shown = _where_shown(render)
    if shown != "text":
        for short_ids in (False, True):
            if found := _probe_format(render, _TOOLS if shown == "template" else (), stops, short_ids=short_ids):
                return ToolUse(found, shown, True, short_ids, takes_system)
        if "<|tool_call|>" in template:
            # Granite 3 and Phi 4: the calls of earlier answers are left to whoever writes the message.
            end = "}]<|/tool_call|>" if shown == "system" else "}]"
            listed = CallFormat('<|tool_call|>[{"name": "', '", "arguments": ', '}, {"name": "', end)
            return ToolUse(listed, shown, False, False, takes_system)
    is_gemma = "<start_of_turn>" in template
    return ToolUse(BARE if is_gemma else TAGGED, "text", False, False, takes_system)


_NAMES = ("probe_one", "probe_two")
_KEY, _VALUE = "probe_key", "probe_value"
_USER: Message = {"role": "user", "content": "a"}
_ARGUMENTS = {
    "json": rf'\{{\s*"{_KEY}":\s*"{_VALUE}"\s*\}}',
    "parameters": rf"<parameter={_KEY}>\n{_VALUE}\n</parameter>\n",
}


_FUNCTION = {
    "name": "probe",
    "description": "a",
    "parameters": {"type": "object", "properties": {"probed": {"type": "string", "description": "a"}}},
}
_TOOLS = [{"type": "function", "function": _FUNCTION}]


def _where_shown(render: Render) -> Literal["template", "system", "text"]:
    if _renders(render, [_USER], _TOOLS, sought="probe"):
        return "template"
    system = {"role": "system", "content": "a", "tools": json.dumps([_FUNCTION])}
    return "system" if _renders(render, [system, _USER], sought="probe") else "text"


def _renders(
    render: Render, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = (), *, sought: str = _VALUE
) -> bool:
    try:
        return sought in render(messages, tools, False)
    except InvalidRequest:
        return False


def _probe_format(
    render: Render, tools: Sequence[Mapping[str, Any]], stops: Collection[str], *, short_ids: bool
) -> CallFormat | None:
    """The format by which the template writes two calls, or one if it refuses two.

    It is given tools too: some bases have a template of its own for that.
    """
    ids = ["prb000001", "prb000002"] if short_ids else ["call_prb000001", "call_prb000002"]
    for names in (_NAMES, _NAMES[:1]):
        calls = [
            {"id": id, "type": "function", "function": {"name": name, "arguments": {_KEY: _VALUE}}}
            for id, name in zip(ids, names, strict=False)
        ]
        results = [{"role": "tool", "tool_call_id": call["id"], "content": "a"} for call in calls]
        conversation = [_USER, {"role": "assistant", "content": "", "tool_calls": calls}, *results]
        try:
            start, whole = render([_USER], tools, True), render(conversation, tools, False)
        except InvalidRequest:
            continue
        # A template may leave out the line break after the role where calls follow.
        shared = next((at for at, (a, b) in enumerate(zip(start, whole, strict=False)) if a != b), len(start))
        found = None if start[shared:].strip() else _read_format(whole[shared:], names, ids, stops)
        if found:
            return found
    return None


def _read_format(text: str, names: Sequence[str], ids: Sequence[str], stops: Collection[str]) -> CallFormat | None:
    for id in ids:
        # Ids are ours to make: no model has to write them.
        text = re.sub(rf',\s*"(?:id|call_id)":\s*"{id[-9:]}"|\[CALL_ID\]\w*{id[-9:]}', "", text.replace(id, id[-9:]))
    for kind, arguments in _ARGUMENTS.items():
        pattern = rf"(?P<begin>.*?){names[0]}(?P<middle>.*?){arguments}"
        if len(names) > 1:
            pattern += rf"(?P<between>.*?){names[1]}(?P=middle){arguments}"
        found = re.match(pattern + "(?P<end>.*)", text, re.DOTALL)
        if not found:
            continue
        ends = [at for stop in stops if (at := found["end"].find(stop)) >= 0]
        end = found["end"][: min(ends)] if ends else ""
        # What a template writes before the call that is no part of it: an empty thought.
        begin = re.sub(r"^\s*(<think>\s*</think>)?\s*", "", found["begin"])
        if begin and found["middle"]:
            return CallFormat(begin, found["middle"], found.groupdict().get("between"), end.rstrip(), kind)
    return None


def _join_results(messages: list[Message]) -> list[Message]:
    """Results of tools as messages of the user, those that follow each other in one."""
    joined: list[Message] = []
    was_result = False
    for message in messages:
        is_result = message.get("role") == "tool"
        if is_result:
            text = f"<tool_response>\n{message['content']}\n</tool_response>"
            if was_result:
                joined[-1] = {"role": "user", "content": f"{joined[-1]['content']}\n{text}"}
            else:
                joined.append({"role": "user", "content": text})
        else:
            joined.append(message)
        was_result = is_result
    return joined


def _plain_function(function: Mapping[str, Any]) -> dict[str, Any]:
    """A function as templates expect it. `strict` is between the client and us."""
    plain = {key: value for key, value in function.items() if key != "strict" and value is not None}
    plain.setdefault("parameters", {"type": "object", "properties": {}})
    return plain


def _short_id(id: str) -> str:
    return id if re.fullmatch("[A-Za-z0-9]{9}", id) else hashlib.sha256(id.encode()).hexdigest()[:9]


def to_json(value: Any) -> str:
    """As chat templates write JSON."""
    return json.dumps(value, ensure_ascii=False)
