"""What a model is asked to write for each format, and the training row that is made of it."""

from typing import Any

from tuneloom.domain import DraftFormat

# How a JSON schema names the fields of each format; `messages` is told apart.
FIELDS: dict[DraftFormat, tuple[str, ...]] = {
    "chat": ("messages",),
    "instruction": ("instruction", "input", "output"),
    "text": ("text",),
    "preference": ("prompt", "chosen", "rejected"),
}
ROLES = ("system", "user", "assistant")
# The fields that a row must have some text in.
NEEDED: dict[DraftFormat, tuple[str, ...]] = {
    "chat": (),
    "instruction": ("instruction", "output"),
    "text": ("text",),
    "preference": ("prompt", "chosen", "rejected"),
}


def schema(format_: DraftFormat) -> dict[str, Any]:
    """The JSON schema of a reply: an object with `rows`. Every property is required, as OpenAI's strict mode asks."""
    text = {"type": "string"}
    if format_ == "chat":
        role = {"type": "string", "enum": list(ROLES)}
        properties: dict[str, Any] = {
            "messages": {"type": "array", "items": _object({"role": role, "content": text})},
        }
    else:
        properties = dict.fromkeys(FIELDS[format_], text)
    return _object({"rows": {"type": "array", "items": _object(properties)}})


def to_row(format_: DraftFormat, fields: dict[str, Any]) -> dict[str, Any]:
    """The row as it is trained on. Preferences take OpenAI's form, so that they go through the chat template."""
    if format_ == "preference":
        return {
            "input": {"messages": [{"role": "user", "content": fields["prompt"]}]},
            "preferred_output": [{"role": "assistant", "content": fields["chosen"]}],
            "non_preferred_output": [{"role": "assistant", "content": fields["rejected"]}],
        }
    if format_ == "instruction":
        # All rows have it, as CSV cannot tell an empty one from none.
        return {"instruction": fields["instruction"], "input": fields.get("input", ""), "output": fields["output"]}
    return fields


def from_row(format_: DraftFormat, row: dict[str, Any]) -> dict[str, Any]:
    """A training row as a model is shown it; the inverse of `to_row` where there is one."""
    if format_ == "preference" and "input" in row:
        names = [name for name in row if name.startswith("preferred_")], [name for name in row if name[:4] == "non_"]
        chosen, rejected = (_joined(row[name[0]]) for name in names)
        return {"prompt": _joined(row["input"]["messages"]), "chosen": chosen, "rejected": rejected}
    if format_ == "instruction":
        return {"input": "", **row}
    return row


def text_of(row: dict[str, Any]) -> str:
    """All text of a training row, one piece per line."""
    return "\n".join(_texts(row))


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value] if value else []
    if isinstance(value, list):
        return [text for item in value for text in _texts(item)]
    if isinstance(value, dict):
        return [text for key, item in value.items() if key != "role" for text in _texts(item)]
    return []


def _joined(messages: Any) -> str:
    return "\n\n".join(message["content"] for message in messages if isinstance(message.get("content"), str))


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
