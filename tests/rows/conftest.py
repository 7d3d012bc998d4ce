import io
import json
from typing import Any

from tuneloom.rows import Row, Scan

USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "hello"}
OTHER = {"role": "assistant", "content": "go away"}
SKIPPED = {**ANSWER, "weight": 0}


def scan(*lines: bytes | str | dict[str, Any], **options: Any) -> tuple[list[Row], Scan]:
    """The good rows and the finished scan of a file made of these lines."""
    encoded = [line if isinstance(line, bytes) else _text(line).encode() for line in lines]
    result = Scan(**options)
    rows = [row for _, row in result.rows(io.BytesIO(b"\n".join(encoded)))]
    return rows, result


def _text(line: str | dict[str, Any]) -> str:
    return line if isinstance(line, str) else json.dumps(line)


def chat(*messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": list(messages), **more}


def only_problem(line: bytes | str | dict[str, Any], *, after: dict[str, Any] | None = None, **options: Any) -> str:
    """What is said of the second line of a file whose first is good."""
    rows, result = scan(after or chat(USER, ANSWER), line, **options)
    assert len(rows) == 1, result.problems
    assert result.problem_count == 1
    assert result.problems[0].line == 2
    return result.problems[0].message
