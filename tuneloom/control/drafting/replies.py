"""A model's reply into rows: what can be repaired is, and what cannot is dropped and counted by reason."""

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from tuneloom.control.drafting import shapes
from tuneloom.domain import DraftFormat
from tuneloom.rows import Scan
from tuneloom.rows.fields import Wrong
from tuneloom.rows.parse import parse

# A model may write a line end in a string as it is.
_DECODER = json.JSONDecoder(strict=False)
# What a reasoning model says before its answer; all of it where the answer did not come.
_THOUGHT = re.compile(r"\s*<think>.*?(?:</think>|\Z)", re.DOTALL)
_FENCE = re.compile(r"```[a-zA-Z]*[ \t]*\n(.*?)(?:\n```|\Z)", re.DOTALL)
_ENVELOPES = ("rows", "data", "examples", "items", "dataset", "samples", "conversations", "results")

# Names that models give to fields, all in lower case.
_SYNONYMS: dict[DraftFormat, dict[str, str]] = {
    "chat": dict.fromkeys(("conversation", "conversations", "dialogue", "dialog", "chat", "turns"), "messages"),
    "instruction": {
        **dict.fromkeys(("prompt", "question", "query", "task"), "instruction"),
        **dict.fromkeys(("context",), "input"),
        **dict.fromkeys(("response", "answer", "completion", "reply", "result"), "output"),
    },
    "text": dict.fromkeys(("content", "document", "passage", "body"), "text"),
    "preference": {
        **dict.fromkeys(("instruction", "question", "query", "input", "request"), "prompt"),
        **dict.fromkeys(
            ("preferred", "preferred_output", "preferred_completion", "good", "accepted", "better", "chosen_response"),
            "chosen",
        ),
        **dict.fromkeys(
            ("non_preferred", "non_preferred_output", "non_preferred_completion", "bad", "worse", "rejected_response"),
            "rejected",
        ),
    },
}
_SPEAKERS = {
    **dict.fromkeys(("user", "human", "customer", "client"), "user"),
    **dict.fromkeys(("assistant", "bot", "ai", "gpt", "model", "agent"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}


@dataclass
class Reply:
    """`received` counts the rows that came, `dropped` those of them that are of no use."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    received: int = 0
    repaired: int = 0
    dropped: Counter[str] = field(default_factory=Counter)


def read_reply(format_: DraftFormat, text: str) -> Reply:
    """The rows of a reply, checked as those of an upload are."""
    reply = Reply()
    items, was_repaired = _items(text, reply)
    for item in items:
        reply.received += 1
        if not isinstance(item, dict):
            reply.dropped["wrong_shape"] += 1
            continue
        row, reason = _row(format_, item)
        if row is None:
            reply.dropped[reason] += 1
            continue
        reply.rows.append(row)
        reply.repaired += was_repaired or bool(reason)
    return reply


def _items(text: str, reply: Reply) -> tuple[list[Any], bool]:
    """What stands for rows in the text, and whether the text as a whole was no JSON."""
    stripped = text.strip()
    try:
        return _unwrapped(json.loads(stripped)), False
    except (ValueError, RecursionError):
        pass
    stripped = _THOUGHT.sub("", stripped, count=1) if _THOUGHT.match(stripped) else stripped
    if fenced := _FENCE.findall(stripped):
        stripped = "\n".join(fenced)
    items, is_whole = _whole_items(stripped)
    if not is_whole or not items:
        # The row that was cut off, or the reply that is no JSON at all.
        reply.received += 1
        reply.dropped["truncated" if items else "not_json"] += 1
    return items, True


def _unwrapped(data: Any) -> list[Any]:
    if isinstance(data, list):
        return data
    if isinstance(data, dict):
        for name in _ENVELOPES:
            inner = data.get(name)
            if isinstance(inner, list) and not any(map(_is_message, inner)):
                return inner
        (only, *others) = data.values() or [None]
        if not others and isinstance(only, list) and not any(map(_is_message, only)):
            return only
    return [data]


def _is_message(item: Any) -> bool:
    """A list of these is a row: `conversations` may be those of many or the turns of one."""
    return isinstance(item, dict) and bool({"role", "from", "speaker"} & item.keys())


def _whole_items(text: str) -> tuple[list[Any], bool]:
    """The objects that are whole in a text which is not: an array cut off, lines of objects, words around JSON."""
    start = min((at for at in (text.find("["), text.find("{")) if at >= 0), default=-1)
    if start < 0:
        return [], False
    with_rows = re.compile(r'"(?:' + "|".join(_ENVELOPES) + r')"\s*:\s*\[').search(text, start)
    try:
        whole, end = _DECODER.raw_decode(text, start)
    except (ValueError, RecursionError):
        at = with_rows.end() if with_rows else start + (text[start] == "[")
        return _objects(text, at)
    items = _unwrapped(whole)
    more, is_whole = _objects(text, end)
    return [*items, *(item for each in more for item in _unwrapped(each))], is_whole


def _objects(text: str, at: int) -> tuple[list[Any], bool]:
    """Objects one after another from `at`, with anything but a brace between them."""
    items: list[Any] = []
    while (start := text.find("{", at)) >= 0:
        try:
            item, at = _DECODER.raw_decode(text, start)
        except (ValueError, RecursionError):
            return items, False
        items.append(item)
    return items, True


def _row(format_: DraftFormat, item: dict[str, Any]) -> tuple[dict[str, Any] | None, str]:
    """The training row, with `repaired` if it is not as it came; or None, with the reason."""
    fields, was_repaired = _named(format_, item)
    if any(name not in fields for name in shapes.NEEDED[format_]):
        return None, "wrong_shape"
    if format_ == "chat":
        messages, was_changed = _messages(fields.get("messages"))
        if messages is None:
            return None, "wrong_shape"
        if messages[-1]["role"] != "assistant" or not messages[-1]["content"].strip():
            return None, "no_answer"
        said = [message["content"].strip() for message in messages if message["role"] == "user"]
        if not all(said) or not said:
            return None, ("empty" if said else "wrong_shape")
        fields, was_repaired = {"messages": messages}, was_repaired or was_changed
    else:
        for name, value in fields.items():
            text, was_changed = _text(value)
            if text is None:
                return None, "wrong_shape"
            fields[name], was_repaired = text, was_repaired or was_changed
        if any(not fields[name].strip() for name in shapes.NEEDED[format_]):
            return None, "empty"
    row = shapes.to_row(format_, fields)
    try:
        Scan(method="dpo" if format_ == "preference" else "supervised").row(parse(encode(row)))
    except (Wrong, UnicodeEncodeError):
        return None, "invalid"
    return row, "repaired" if was_repaired else ""


def encode(row: dict[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode()


def _named(format_: DraftFormat, item: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """The fields under their own names, without those of no meaning; and whether anything changed."""
    wanted = shapes.FIELDS[format_]
    fields = {name: item[name] for name in wanted if name in item}
    lowered = {name.lower().replace("-", "_").replace(" ", "_"): value for name, value in item.items()}
    for name, value in lowered.items():
        known = name if name in wanted else _SYNONYMS[format_].get(name)
        if known is not None and known not in fields:
            fields[known] = value
    return fields, fields.keys() != item.keys()


def _messages(value: Any) -> tuple[list[dict[str, str]] | None, bool]:
    if not isinstance(value, list) or not value:
        return None, False
    messages, was_repaired = [], False
    for item in value:
        if not isinstance(item, dict):
            return None, False
        role = item.get("role", item.get("from", item.get("speaker")))
        given = item.get("content", item.get("value", item.get("text")))
        speaker = _SPEAKERS.get(role.lower()) if isinstance(role, str) else None
        content, was_changed = _text(given)
        if speaker is None or content is None:
            return None, False
        messages.append({"role": speaker, "content": content})
        was_repaired |= was_changed or item != messages[-1]
    return messages, was_repaired


def _text(value: Any) -> tuple[str | None, bool]:
    """Text, also of numbers and of lists of lines."""
    if isinstance(value, str):
        return value, False
    if value is None:
        return "", True
    if isinstance(value, bool | int | float):
        return json.dumps(value), True
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        return "\n".join(value), True
    return None, False
