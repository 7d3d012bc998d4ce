"""What each route costs, in one table. Only URLs under `/v1/` cost anything: health is never limited."""

import re
from typing import Literal

# `call` of a model: counted once the model and the tokens are known. `costly` takes the service long or much room, and
# is refused while nobody counts for all gateways; `spending` is costly and uses up quota and budget too.
Cost = Literal["call", "costly", "spending", "light"]

_TABLE: tuple[tuple[str, str, Cost], ...] = (
    ("POST", r"/v1/(.+/)?(chat/)?completions", "call"),
    ("POST", r"/v1/fine_tuning/jobs(/[^/]+/resume)?", "spending"),
    ("POST", r"/v1/tuneloom/drafts", "spending"),
    ("POST", r"/v1/files", "costly"),
    ("POST", r"/v1/uploads", "costly"),
    ("POST", r"/v1/tuneloom/files/[^/]+/(check|edit)", "costly"),
    ("POST", r"/v1/tuneloom/estimate", "costly"),
    ("POST", r"/v1/tuneloom/models/import", "costly"),
    ("POST", r"/v1/tuneloom/keys(/[^/]+/rotate)?", "costly"),
    ("POST", r"/v1/organization/admin_api_keys", "costly"),
    ("POST", r"/v1/tuneloom/models/.+/keys", "costly"),
    ("POST", r"/v1/(tuneloom/webhooks|webhook_endpoints)/[^/]+/(test|deliveries/[^/]+/replay)", "costly"),
)
_COSTS = tuple((method, re.compile(path + "/?", re.DOTALL), cost) for method, path, cost in _TABLE)


def cost_of(method: str, path: str) -> Cost:
    return next((cost for wanted, paths, cost in _COSTS if wanted == method and paths.fullmatch(path)), "light")
