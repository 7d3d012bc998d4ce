"""Drives a running server call by call with the `openai` package that is installed, of major version 1, 2 or 3.

Needs nothing else: it runs in environments that hold that package alone. As a program it prints one JSON line for each
call; `run` gives the same as objects.
"""

import argparse
import asyncio
import inspect
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import openai

from tests.conformance import (
    calls_account,
    calls_async,
    calls_chat,
    calls_completions,
    calls_errors,
    calls_files,
    calls_jobs,
    calls_models,
    calls_service,
    calls_tools,
)
from tests.conformance.session import Lacking, Session, Unmet, clean_up, open_session

CASES: dict[str, dict[str, list[str]]] = json.loads((Path(__file__).parent / "cases.json").read_text())
MODULES: dict[str, ModuleType] = {
    "Files": calls_files,
    "Uploads": calls_files,
    "Fine-tuning jobs": calls_jobs,
    "Chat completions": calls_chat,
    "Tools and forms": calls_tools,
    "Completions": calls_completions,
    "Errors": calls_errors,
    "Service": calls_service,
    "A finished job": calls_jobs,
    "Models": calls_models,
    "Async client": calls_async,
    "Webhooks": calls_account,
    "Keys": calls_account,
    "Administration": calls_account,
}


@dataclass(frozen=True)
class Result:
    """What came of one call: `name` is its key in cases.json; `reason` says why it is not ok.

    `lacks`: it was not made, since the client has no such call or the server's settings do not allow what it needs.
    """

    name: str
    ok: bool
    seconds: float
    reason: str | None = None
    lacks: bool = False


def run(base_url: str, api_key: str, base: str | None = None) -> list[Result]:
    """Make every call, in order, as a new owner that an admin's `api_key` creates; about a minute on a tiny base."""
    return list(results(base_url, api_key, base))


def results(base_url: str, api_key: str, base: str | None = None) -> Iterator[Result]:
    session = open_session(base_url, api_key, base)
    try:
        for group, cases in CASES.items():
            for name, (_, _, *only) in cases.items():
                if only and only[0] != "python":
                    continue
                yield attempt(name, vars(MODULES[group])[name], session)
    finally:
        clean_up(session)


def attempt(name: str, call: Callable[[Session], Any], session: Session) -> Result:
    started = time.monotonic()
    reason, lacks = None, False
    try:
        outcome = call(session)
        if inspect.iscoroutine(outcome):
            asyncio.run(outcome)
    except Lacking:
        lacks = True
    except Unmet as unmet:
        reason = str(unmet)
    except Exception as error:
        # Whatever a call raises is its result; the others go on.
        reason = f"{type(error).__name__}: {error}"
    return Result(name, reason is None, round(time.monotonic() - started, 2), reason, lacks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base-url", default=os.environ.get("OPENAI_BASE_URL"))
    parser.add_argument("--api-key", default=os.environ.get("OPENAI_API_KEY"))
    parser.add_argument("--base", default=None, help="which base to use; the first one that is served unless given")
    options = parser.parse_args()
    runtime = f"Python {platform.python_version()}"
    print(json.dumps({"client": f"openai-python {openai.__version__}", "runtime": runtime}), flush=True)
    ok = True
    for result in results(options.base_url, options.api_key, options.base):
        ok = ok and result.ok
        print(json.dumps(asdict(result)), flush=True)
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()
