"""What Google's `generateContent` says on the wire, as recorded from the real client and the API's reference."""

import json
from typing import Any

from tests.control.drafting.model import Ask, ModelServer, Reply

STATUSES = {400: "INVALID_ARGUMENT", 403: "PERMISSION_DENIED", 429: "RESOURCE_EXHAUSTED", 503: "UNAVAILABLE"}
REASONS = {"stop": "STOP", "length": "MAX_TOKENS", "blocked": "SAFETY"}


class GeminiServer(ModelServer):
    kind = "gemini"

    def read(self, number: int, path: str, headers: dict[str, str], body: dict[str, Any]) -> Ask:
        assert path.endswith(":generateContent"), path
        config = body["generationConfig"]
        return Ask(
            number=number,
            path=path,
            headers=headers,
            body=body,
            data=json.loads(body["contents"][0]["parts"][0]["text"]),
            temperature=config["temperature"],
            max_tokens=config["maxOutputTokens"],
            has_schema="responseJsonSchema" in config and config["responseMimeType"] == "application/json",
        )

    def write(self, ask: Ask, reply: Reply) -> dict[str, Any]:
        if reply.status != 200:
            status = STATUSES.get(reply.status, "UNKNOWN")
            error = {"code": reply.status, "message": reply.message, "status": status}
            return {"error": {**error, "details": reply.details} if reply.details else error}
        answer: dict[str, Any] = {"modelVersion": "gemini-test-001", "responseId": f"r{ask.number}"}
        if reply.tokens is not None:
            given, made = reply.tokens
            answer["usageMetadata"] = {"promptTokenCount": given, "totalTokenCount": given + made}
            answer["usageMetadata"]["candidatesTokenCount"] = made
        if reply.finish == "blocked" and not reply.text:
            answer["promptFeedback"] = {"blockReason": "SAFETY"}
            return answer
        content = {"parts": [{"text": reply.text}], "role": "model"}
        answer["candidates"] = [{"content": content, "finishReason": REASONS[reply.finish], "index": 0}]
        return answer
