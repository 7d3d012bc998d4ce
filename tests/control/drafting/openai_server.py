"""What OpenAI's chat completions say on the wire."""

import json
from typing import Any

from tests.control.drafting.model import Ask, ModelServer, Reply

REASONS = {"stop": "stop", "length": "length", "blocked": "content_filter"}


class OpenAIServer(ModelServer):
    kind = "openai"
    path = "/v1"

    def read(self, number: int, path: str, headers: dict[str, str], body: dict[str, Any]) -> Ask:
        assert path == "/v1/chat/completions", path
        return Ask(
            number=number,
            path=path,
            headers=headers,
            body=body,
            data=json.loads(body["messages"][1]["content"]),
            temperature=body["temperature"],
            max_tokens=body.get("max_tokens") or body["max_completion_tokens"],
            has_schema=body.get("response_format", {}).get("type") == "json_schema",
        )

    def write(self, ask: Ask, reply: Reply) -> dict[str, Any]:
        if reply.status != 200:
            error = {"message": reply.message, "type": "invalid_request_error", "param": reply.param, "code": None}
            return {"error": error}
        message = {"role": "assistant", "content": reply.text or None}
        answer: dict[str, Any] = {
            "id": f"chatcmpl-{ask.number}",
            "object": "chat.completion",
            "created": 1,
            "model": "gpt-test-2026",
            "choices": [{"index": 0, "message": message, "finish_reason": REASONS[reply.finish]}],
        }
        if reply.tokens is not None:
            given, made = reply.tokens
            answer["usage"] = {"prompt_tokens": given, "completion_tokens": made, "total_tokens": given + made}
        return answer
