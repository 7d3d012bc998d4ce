"""Drives a running server with the newest clients of OpenAI, call by call, and writes docs/conformance.md.

The server comes from OPENAI_BASE_URL and OPENAI_API_KEY (an admin's key), as `tuneloom env` prints them. Ends with 0
when every call is ok in every client.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from tests.conformance.environments import CLIENTS, HERE, ROOT, CannotInstall, Client, ignore
from tests.conformance.table import Column, is_green, page

RUN_TIMEOUT_S = 1500
CASES = json.loads((HERE / "cases.json").read_text())


def main() -> int:
    options = parse()
    ignore(options.cache)
    environment = os.environ | {"OPENAI_BASE_URL": options.base_url, "OPENAI_API_KEY": options.api_key}
    chosen = [client for client in CLIENTS if options.only in (None, client.name)]
    columns = [drive(client, options.cache, environment, options.base) for client in chosen]
    server = f"tuneloom {version('tuneloom')}"
    text = page(CASES, columns, server=server, date=datetime.now(UTC).strftime("%d %B %Y"))
    # Addresses belong to the machine that ran it.
    options.out.write_text(text.replace(options.base_url, "(the server)"))
    for column in columns:
        print(f"{column.title}: {len(column.passed)} ok, {len(column.failures)} failed; {column.problem or 'whole'}")
    print(f"written: {options.out}")
    return 0 if is_green(CASES, columns) else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__)
    parser.add_argument("--base-url", default=os.environ.get("OPENAI_BASE_URL"))
    parser.add_argument("--api-key", default=os.environ.get("OPENAI_API_KEY"), help="an admin's key")
    parser.add_argument("--base", help="the base to use; the first one that is served unless given")
    parser.add_argument("--only", choices=[client.name for client in CLIENTS], help="one client instead of all")
    parser.add_argument("--cache", type=Path, default=ROOT / ".conformance", help="where the environments are kept")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "conformance.md")
    options = parser.parse_args()
    if not options.base_url or not options.api_key:
        parser.error('no server is named. Start one (`make up`) and run: eval "$(tuneloom env)"')
    return options


def drive(client: Client, cache: Path, environment: dict[str, str], base: str | None) -> Column:
    """One client's column; what stops its driver as a whole is the column's problem."""
    column = Column(client.name, client.language)
    print(f"{client.name}: installing", flush=True)
    try:
        command = client.command(cache)
    except CannotInstall as error:
        column.problem = str(error)
        return column
    command += ["--base", base] if base else []
    with (
        tempfile.TemporaryFile("w+") as complaints,
        subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=complaints, text=True
        ) as run,
    ):
        killer = threading.Timer(RUN_TIMEOUT_S, run.kill)
        killer.start()
        assert run.stdout is not None
        for line in run.stdout:
            note(column, json.loads(line))
        code = run.wait()
        killer.cancel()
        complaints.seek(0)
        last = complaints.read()[-400:].strip()
    if code not in (0, 1) or (code == 1 and not column.failures):
        column.problem = f"the driver ended with {code}: {last}"
    return column


def note(column: Column, line: dict[str, object]) -> None:
    """Take in one line of a driver: first its client's exact version, then a result each."""
    if "client" in line:
        column.title, column.runtime = str(line["client"]), str(line["runtime"])
        print(f"{column.title} on {column.runtime}", flush=True)
        return
    name = str(line["name"])
    if line.get("lacks"):
        column.lacking.add(name)
    elif line["ok"]:
        column.passed.add(name)
    else:
        column.failures[name] = str(line["reason"])
        print(f"  FAIL {name}: {line['reason']}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
