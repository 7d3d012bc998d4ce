"""Every route of the application, with each way in which a name of somebody's gets into it."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

JOBS = "/v1/fine_tuning/jobs"
OURS = "/v1/tuneloom"
HI = [{"role": "user", "content": "hello"}]
ROWS = b"".join(
    json.dumps({"messages": [*HI, {"role": "assistant", "content": f"yes {i}"}]}).encode() + b"\n" for i in range(12)
)
DRAFT = {"description": "Yes and no.", "format": "instruction", "rows": 10}
WORDS = [
    "FILE",
    "DRAFT",
    "JOB",
    "UPLOAD",
    "KEY",
    "HOOK",
    "SENT",
    "EVENT",
    "ENTRY",
    "MODEL",
    "PINNED",
    "CHECK",
    "FT",
    "OWNER",
    "BASE",
]
WORD = re.compile(rf"\b(?:{'|'.join(WORDS)})\b")


@dataclass(frozen=True)
class Call:
    """One way to call a route. Words in capitals stand for ids of some owner; `json` and `files` may hold them too."""

    method: str
    path: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def fill(self, names: Mapping[str, str]) -> tuple[str, str, dict[str, Any]]:
        def put(value: Any) -> Any:
            match value:
                case str():
                    return WORD.sub(lambda word: names[word[0]], value)
                case dict():
                    return {key: put(inner) for key, inner in value.items()}
                case list():
                    return [put(inner) for inner in value]
            return value

        path = WORD.sub(lambda word: names[word[0]].replace("/", "%2F"), self.path)
        return self.method, path, put(dict(self.options))

    def words(self) -> set[str]:
        """Those of somebody's names that it takes."""
        return set(WORD.findall(f"{self.path} {self.options}")) - {"BASE"}


def get(*paths: str) -> list[Call]:
    return [Call("GET", path) for path in paths]


def post(path: str, body: Any = None, **options: Any) -> Call:
    return Call("POST", path, options if body is None else {"json": body, **options})


# By route, each way in which a name of somebody's gets into it. A route that is missing here fails the first test.
CALLS: dict[str, list[Call]] = {
    "/healthz": get("/healthz"),
    "/readyz": get("/readyz"),
    "/v1/chat/completions": [
        post("/v1/chat/completions", {"model": name, "messages": HI}) for name in ("MODEL", "PINNED", "CHECK", "BASE")
    ],
    "/v1/completions": [post("/v1/completions", {"model": name, "prompt": "a"}) for name in ("MODEL", "FT", "CHECK")],
    "/v1/{model:path}/chat/completions": [
        post(f"/v1/{name}/chat/completions", {"messages": HI}) for name in ("MODEL", "PINNED", "FT", "CHECK")
    ],
    "/v1/{model:path}/completions": [post("/v1/MODEL/completions", {"prompt": "a"})],
    "/v1/{model:path}/models": get("/v1/MODEL/models", "/v1/FT/models"),
    f"{OURS}/bases": get(f"{OURS}/bases"),
    f"{OURS}/bases/{{base:path}}/adapters": get(f"{OURS}/bases/BASE/adapters"),
    f"{OURS}/bases/{{base:path}}/prewarm": [post(f"{OURS}/bases/BASE/prewarm", {"model": "MODEL"})],
    f"{OURS}/bases/{{base:path}}/pin": [post(f"{OURS}/bases/BASE/pin", {"model": "MODEL"})],
    f"{OURS}/bases/{{base:path}}/unpin": [post(f"{OURS}/bases/BASE/unpin", {"model": "MODEL"})],
    f"{OURS}/bases/{{base:path}}/unload": [post(f"{OURS}/bases/BASE/unload", {"model": "MODEL"})],
    f"{OURS}/bases/{{base:path}}": get(f"{OURS}/bases/BASE"),
    "/v1/files": [
        *get("/v1/files", "/v1/files?after=FILE&limit=1"),
        post("/v1/files", files={"file": ("mine.jsonl", ROWS)}, data={"purpose": "fine-tune"}),
    ],
    "/v1/files/{id}": [*get("/v1/files/FILE"), Call("DELETE", "/v1/files/FILE")],
    "/v1/files/{id}/content": get("/v1/files/FILE/content"),
    f"{OURS}/files/{{id}}": get(f"{OURS}/files/FILE"),
    f"{OURS}/files/{{id}}/rows": get(f"{OURS}/files/FILE/rows"),
    f"{OURS}/files/{{id}}/edit": [
        post(f"{OURS}/files/FILE/edit", {"operations": [{"op": "delete", "rows": [1]}]}),
    ],
    f"{OURS}/files/{{id}}/export": get(f"{OURS}/files/FILE/export?format=csv"),
    f"{OURS}/files/{{id}}/check": [post(f"{OURS}/files/FILE/check", {"model": "BASE"})],
    f"{OURS}/estimate": [post(f"{OURS}/estimate", {"model": "BASE", "training_file": "FILE"})],
    "/v1/uploads": [
        post("/v1/uploads", {"filename": "a.jsonl", "purpose": "fine-tune", "bytes": 1, "mime_type": "text/jsonl"})
    ],
    "/v1/uploads/{id}/parts": [post("/v1/uploads/UPLOAD/parts", files={"data": ("part", b"x")})],
    "/v1/uploads/{id}/complete": [post("/v1/uploads/UPLOAD/complete", {"part_ids": ["part_x"]})],
    "/v1/uploads/{id}/cancel": [post("/v1/uploads/UPLOAD/cancel")],
    JOBS: [
        *get(JOBS, f"{JOBS}?after=JOB&limit=1"),
        post(JOBS, {"model": "BASE", "training_file": "FILE"}),
        post(JOBS, {"model": "MODEL", "training_file": "FILE"}),
        post(JOBS, {"model": "FT", "training_file": "FILE"}),
        post(JOBS, {"model": "BASE", "training_file": "FILE", "suffix": "MODEL", "tuneloom": {"first_key": True}}),
    ],
    f"{JOBS}/{{id}}": get(f"{JOBS}/JOB"),
    f"{JOBS}/{{id}}/cancel": [post(f"{JOBS}/JOB/cancel")],
    f"{JOBS}/{{id}}/pause": [post(f"{JOBS}/JOB/pause")],
    f"{JOBS}/{{id}}/resume": [post(f"{JOBS}/JOB/resume")],
    f"{JOBS}/{{id}}/events": get(f"{JOBS}/JOB/events", f"{JOBS}/JOB/events?after=EVENT"),
    f"{JOBS}/{{id}}/checkpoints": get(f"{JOBS}/JOB/checkpoints"),
    "/v1/fine_tuning/checkpoints/{name:path}/permissions": [
        *get("/v1/fine_tuning/checkpoints/CHECK/permissions"),
        post("/v1/fine_tuning/checkpoints/CHECK/permissions", {"project_ids": ["p"]}),
    ],
    "/v1/fine_tuning/checkpoints/{name:path}/permissions/{permission}": [
        Call("DELETE", "/v1/fine_tuning/checkpoints/CHECK/permissions/p")
    ],
    "/v1/models": get("/v1/models"),
    "/v1/models/{name:path}": [
        *get("/v1/models/MODEL", "/v1/models/PINNED", "/v1/models/FT", "/v1/models/CHECK"),
        Call("DELETE", "/v1/models/CHECK"),
        Call("DELETE", "/v1/models/FT"),
        Call("DELETE", "/v1/models/MODEL"),
    ],
    f"{OURS}/models": get(f"{OURS}/models"),
    f"{OURS}/models/import": [
        post(f"{OURS}/models/import", files={"files": ("adapter_config.json", b"{}")}, data={"name": "x"})
    ],
    f"{OURS}/models/{{name}}/activate": [post(f"{OURS}/models/MODEL/activate", {"version": 1})],
    f"{OURS}/models/{{name}}/rollback": [post(f"{OURS}/models/MODEL/rollback")],
    f"{OURS}/models/{{name:path}}/adapter": get(f"{OURS}/models/MODEL/adapter", f"{OURS}/models/FT/adapter"),
    f"{OURS}/models/{{name}}": get(f"{OURS}/models/MODEL"),
    f"{OURS}/models/{{name:path}}/keys": [
        *get(f"{OURS}/models/MODEL/keys", f"{OURS}/models/BASE/keys"),
        Call("POST", f"{OURS}/models/MODEL/keys"),
    ],
    f"{OURS}/keys": [*get(f"{OURS}/keys"), post(f"{OURS}/keys", {"name": "mine", "models": ["MODEL"]})],
    f"{OURS}/keys/{{id}}": [
        *get(f"{OURS}/keys/KEY"),
        post(f"{OURS}/keys/KEY", {"name": "other"}),
        Call("DELETE", f"{OURS}/keys/KEY"),
    ],
    f"{OURS}/keys/{{id}}/revoke": [post(f"{OURS}/keys/KEY/revoke")],
    f"{OURS}/keys/{{id}}/rotate": [post(f"{OURS}/keys/KEY/rotate", {"overlap": "1h"})],
    f"{OURS}/webhooks": [
        *get(f"{OURS}/webhooks", f"{OURS}/webhooks?after=HOOK"),
        post(f"{OURS}/webhooks", {"url": "https://example.com/mine", "event_types": ["fine_tuning.job.succeeded"]}),
    ],
    f"{OURS}/webhooks/{{id}}": [
        *get(f"{OURS}/webhooks/HOOK"),
        post(f"{OURS}/webhooks/HOOK", {"description": "other"}),
        Call("DELETE", f"{OURS}/webhooks/HOOK"),
    ],
    f"{OURS}/webhooks/{{id}}/test": [post(f"{OURS}/webhooks/HOOK/test")],
    f"{OURS}/webhooks/{{id}}/rotate": [post(f"{OURS}/webhooks/HOOK/rotate", {"overlap": "1h"})],
    f"{OURS}/webhooks/{{id}}/deliveries": get(
        f"{OURS}/webhooks/HOOK/deliveries", f"{OURS}/webhooks/HOOK/deliveries?after=SENT"
    ),
    f"{OURS}/webhooks/{{id}}/deliveries/{{delivery}}": get(f"{OURS}/webhooks/HOOK/deliveries/SENT"),
    f"{OURS}/webhooks/{{id}}/deliveries/{{delivery}}/replay": [post(f"{OURS}/webhooks/HOOK/deliveries/SENT/replay")],
    "/v1/webhook_endpoints": [
        *get("/v1/webhook_endpoints", "/v1/webhook_endpoints?after=HOOK"),
        post("/v1/webhook_endpoints", {"url": "https://example.com/mine", "name": "mine", "event_types": ["x"]}),
    ],
    "/v1/webhook_endpoints/{id}": [
        *get("/v1/webhook_endpoints/HOOK"),
        post("/v1/webhook_endpoints/HOOK", {"name": "other"}),
        Call("DELETE", "/v1/webhook_endpoints/HOOK"),
    ],
    "/v1/webhook_endpoints/{id}/test": [post("/v1/webhook_endpoints/HOOK/test")],
    "/v1/webhook_endpoints/{id}/rotate_secret": [post("/v1/webhook_endpoints/HOOK/rotate_secret")],
    "/v1/webhook_event_types": get("/v1/webhook_event_types"),
    f"{OURS}/drafts": [
        *get(f"{OURS}/drafts", f"{OURS}/drafts?after=DRAFT&limit=1"),
        post(f"{OURS}/drafts", DRAFT),
        post(f"{OURS}/drafts", {**DRAFT, "seed_file": "FILE"}),
    ],
    f"{OURS}/drafts/{{id}}": get(f"{OURS}/drafts/DRAFT"),
    f"{OURS}/drafts/{{id}}/cancel": [post(f"{OURS}/drafts/DRAFT/cancel")],
    f"{OURS}/drafts/{{id}}/rows": get(f"{OURS}/drafts/DRAFT/rows"),
    f"{OURS}/drafts/{{id}}/events": get(f"{OURS}/drafts/DRAFT/events?timeout_s=1"),
    f"{OURS}/limits": get(f"{OURS}/limits"),
    f"{OURS}/limits/{{owner}}": [
        *get(f"{OURS}/limits/OWNER"),
        *(Call(method, f"{OURS}/limits/OWNER", {"json": {"jobs": 1}}) for method in ("PUT", "POST", "DELETE")),
    ],
    f"{OURS}/audit": get(
        f"{OURS}/audit",
        f"{OURS}/audit?after=ENTRY",
        f"{OURS}/audit?before=ENTRY",
        f"{OURS}/audit?resource_ids[]=JOB&actor_ids[]=KEY",
    ),
    "/v1/organization/audit_logs": get("/v1/organization/audit_logs?actor_ids[]=KEY"),
    "/v1/organization/admin_api_keys": [
        *get("/v1/organization/admin_api_keys"),
        post("/v1/organization/admin_api_keys", {"name": "mine"}),
    ],
    "/v1/organization/admin_api_keys/{id}": [
        *get("/v1/organization/admin_api_keys/KEY"),
        Call("DELETE", "/v1/organization/admin_api_keys/KEY"),
    ],
    f"{OURS}/usage": get(f"{OURS}/usage?start_time=1", f"{OURS}/usage?start_time=1&api_key_ids=KEY&models=MODEL"),
    "/v1/organization/usage/completions": get("/v1/organization/usage/completions?start_time=1&project_ids=OWNER"),
    "/v1/organization/costs": get("/v1/organization/costs?start_time=1&project_ids=OWNER"),
    f"{OURS}/me": [*get(f"{OURS}/me"), Call("DELETE", f"{OURS}/me", {"json": {}})],
}
