"""Grammars of answers that may, must or must not call tools, in llguidance's form. Made of text; nothing is compiled.

What a base writes as one token (`<tool_call>` say) is asked for by its id; where it has no such token, by its letters.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tuneloom.engine.schema_numbers import held
from tuneloom.engine.tools import PYTHON_TAG, CallFormat
from tuneloom.generation import ToolChoice

_OPEN = re.compile(r'"[^"]*"?|\S')
_PLAIN_STRING = frozenset({"type", "description", "title", "default", "examples", "enum", "const"})


@dataclass(frozen=True)
class Tokens:
    """The tokens of a base that are marks: `ids` by text. `free` may occur in text: neither its stops nor control."""

    ids: Mapping[str, int]
    free: frozenset[int]


def tool_grammar(
    format: CallFormat,
    tools: Sequence[Mapping[str, Any]],
    choice: ToolChoice,
    tokens: Tokens,
    *,
    text_schema: Mapping[str, Any] | None = None,
) -> str:
    """The grammar of an answer. Where it is text, it follows `text_schema` if there is one.

    `tools` are those that may be called; with `choice.name` only that one, and once.
    """
    return _Lark(format, [tool["function"] for tool in tools], choice, tokens, text_schema).text()


def parameters_schema(function: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON schema of a function's arguments: an object that has no more than what it declares.

    A function without parameters takes none. Where a schema leaves open whether there is more, there is not, unless
    it is made of several schemas that would then exclude each other.
    """
    schema = dict(function.get("parameters") or {"properties": {}})
    schema.setdefault("type", "object")
    composed = {"anyOf", "allOf", "oneOf", "$ref", "patternProperties", "additionalProperties", "unevaluatedProperties"}
    if "properties" in schema and not composed & schema.keys():
        schema["additionalProperties"] = False
    return schema


def is_raw(schema: Any) -> bool:
    """Whether an argument of this schema is written as plain text where arguments are `<parameter=key>` blocks."""
    return isinstance(schema, dict) and schema.get("type") == "string" and schema.keys() <= _PLAIN_STRING


def spaced(schema: Mapping[str, Any], *, param: str = "tools") -> dict[str, Any]:
    """A schema whose JSON is spaced as chat templates space it, so that a call reads the same when it comes back.

    Raises:
        InvalidRequest: it has numbers that cannot be enforced.
    """
    options = {
        "whitespace_flexible": False,
        "item_separator": ", ",
        "key_separator": ": ",
        "lenient": False,
        "coerce_one_of": False,
    }
    return {**held(schema, param=param), "x-guidance": options}


class _Lark:
    def __init__(
        self,
        format: CallFormat,
        functions: Sequence[Mapping[str, Any]],
        choice: ToolChoice,
        tokens: Tokens,
        text_schema: Mapping[str, Any] | None,
    ) -> None:
        self._format, self._tokens, self._choice = format, tokens, choice
        self._functions = [f for f in functions if choice.name in (None, f["name"])]
        self._schema = text_schema
        self._rules: list[str] = []
        marks = sorted(tokens.ids, key=len, reverse=True)
        self._marks = re.compile("|".join(map(re.escape, marks))) if marks else None

    def text(self) -> str:
        choice = self._choice
        if choice.mode == "none":
            start = self._text()
        elif choice.mode == "required":
            start = self._calls(self._format.begin)
        else:
            start = self._text_or_calls()
        lark = "\n".join(["%llguidance {}", f"start: {start}", *self._rules])
        return json.dumps({"grammars": [{"lark_grammar": lark}]}, ensure_ascii=False)

    def _text_or_calls(self) -> str:
        mark, begin = self._format.marker, self._format.begin
        if self._schema is not None:
            return f"{self._text()} | {self._calls(begin) if mark else self._bare_calls()}"
        if not mark:
            calls = self._calls(begin)
            if (tag := self._tokens.ids.get(PYTHON_TAG)) is not None:
                calls = f"<[{tag}]>? {calls}"
            return f"{self._text()} | {calls}"
        if mark in self._tokens.ids:
            return f"{self._text()} | {self._text()} {self._calls(begin)}"
        # The first mark that is spelled out begins a call, whatever else the text might have gone on with.
        self._rules.append(f"head[lazy]: /(?s:.*){_in_regex(mark)}/")
        before = "".join(f"(TEXT? {ids})* " for ids in self._free_ids())
        return f"{self._text()} | {before}head {self._calls(begin.removeprefix(mark))}"

    def _text(self) -> str:
        """A rule for what is not a call."""
        if self._schema is not None:
            return f"%json {json.dumps(spaced(self._schema), ensure_ascii=False)}"
        if not any(rule.startswith("free:") for rule in self._rules):
            first = "TEXT"
            if not self._format.marker:
                first = "FIRST"
                self._rules.append(f"FIRST: /(?s:.+)/ & ~/{self._opening()}/")
            more = "".join(f" ({ids} TEXT?)*" for ids in self._free_ids())
            self._rules += [f"free: {first}?{more}", "TEXT: /(?s:.+)/"]
        return "free"

    def _opening(self) -> str:
        """How a call begins that is told from text by its form only, however it is spaced."""
        opening = r"\s*".join(map(_in_regex, _OPEN.findall(self._format.begin)))
        names = "|".join(_in_regex(function["name"]) for function in self._functions)
        return rf'\s*{opening}({names})"(?s:.*)'

    def _free_ids(self) -> list[str]:
        format = self._format
        used = {
            id
            for mark, id in self._tokens.ids.items()
            if mark in format.begin + format.middle + (format.between or "") + format.end
        }
        ids = sorted(self._tokens.free - used)
        return [f"<[{','.join(map(str, ids))}]>"] if ids else []

    def _calls(self, begin: str) -> str:
        """A rule for one or more calls, from `begin` on.

        What stands before the arguments is one piece: text that ends there too could not be told from its beginning.
        """
        format, choice = self._format, self._choice
        arguments = [self._arguments(number, function) for number, function in enumerate(self._functions)]

        def one(before: str) -> str:
            heads = [self._literal(before + function["name"] + format.middle) for function in self._functions]
            return " | ".join(f"{head} {rule}" for head, rule in zip(heads, arguments, strict=True))

        self._rules.append(f"first: {one(begin)}")
        if not choice.is_parallel or choice.name is not None or format.between is None:
            return f"first {self._literal(format.end)}"
        self._rules.append(f"next: {one(format.between)}")
        return f"first next* {self._literal(format.end)}"

    def _bare_calls(self) -> str:
        """Calls beside an answer that is JSON too: only two JSON schemas share the tokens that both begin with."""
        (name_key,) = re.findall(r'"(\w+)"', self._format.begin)[-1:]
        (arguments_key,) = re.findall(r'"(\w+)"', self._format.middle)[-1:]
        schemas = [
            {
                "type": "object",
                "properties": {
                    name_key: {"const": function["name"]},
                    arguments_key: _moved(parameters_schema(function), f"#/anyOf/{at}/properties/{arguments_key}"),
                },
                "required": [name_key, arguments_key],
                "additionalProperties": False,
            }
            for at, function in enumerate(self._functions)
        ]
        return f"%json {json.dumps(spaced({'anyOf': schemas}), ensure_ascii=False)}"

    def _arguments(self, number: int, function: Mapping[str, Any]) -> str:
        schema = parameters_schema(function)
        if self._format.arguments == "json":
            self._rules.append(f"arguments{number}: %json {json.dumps(spaced(schema), ensure_ascii=False)}")
            return f"arguments{number}"
        required = schema.get("required", [])
        blocks = [
            self._block(f"p{number}x{index}", key, value, schema) + ("" if key in required else "?")
            for index, (key, value) in enumerate(schema.get("properties", {}).items())
        ]
        return " ".join(blocks)

    def _block(self, name: str, key: str, value: Any, schema: Mapping[str, Any]) -> str:
        """A rule for one `<parameter=key>` block."""
        head, tail = f"<parameter={key}>\n", "\n</parameter>\n"
        if not is_raw(value):
            local = {**value, **{k: schema[k] for k in ("$defs", "definitions") if k in schema}} if value else {}
            self._rules.append(f"{name}: {self._literal(head)} %json {json.dumps(spaced(local))} {self._literal(tail)}")
        elif choices := value.get("enum", [value["const"]] if "const" in value else None):
            either = " | ".join(self._literal(choice) for choice in choices)
            self._rules.append(f"{name}: {self._literal(head)} ({either}) {self._literal(tail)}")
        else:
            self._rules.append(f"{name}: {self._literal(head)} {name}v")
            self._rules.append(f"{name}v[lazy]: /(?s:.*){_in_regex(tail)}/")
        return name

    def _literal(self, text: str) -> str:
        """`text` to be written exactly, with its marks as tokens."""
        parts, at = [], 0
        for mark in self._marks.finditer(text) if self._marks else ():
            parts += [json.dumps(text[at : mark.start()])] if mark.start() > at else []
            parts.append(f"<[{self._tokens.ids[mark[0]]}]>")
            at = mark.end()
        parts += [json.dumps(text[at:])] if at < len(text) else []
        return " ".join(parts)


def _moved(schema: Any, to: str) -> Any:
    """A schema that stands at `to` in another, with its references."""
    if isinstance(schema, list):
        return [_moved(item, to) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: to + value[1:] if key == "$ref" and isinstance(value, str) and value[:1] == "#" else _moved(value, to)
        for key, value in schema.items()
    }


def _in_regex(text: str) -> str:
    """`text` literally, within the slashes of a grammar's regular expression."""
    return "".join(rf"\x{ord(char):02x}" if char in "/\n" else re.escape(char) for char in text)
