"""The check of training rows, on one core: a file of 512 MB of chats, one of preferences, and CSV made into JSON Lines.

Speed is bytes by processor time, so other processes hardly matter. Needs no base. The files are removed at the end.
"""

import csv
import io
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from bench.inputs import parser
from bench.machine import ForeignLoad, describe
from bench.report import Report
from tuneloom.rows import Scan, to_json_lines

WANTED_MB_PER_S = 20.0
MAX_GROWTH_MB = 300.0
CHUNK_BYTES = 1 << 20

_ASCII_WORDS = "the of and a to in is it that for was on are as with they be at one have this from"
# Different rows in a file; it repeats them in random order.
_POOL = 20_000
_SAMPLE_EVERY = 10_000
_WORDS = [*_ASCII_WORDS.split(), "naïve", "“so”"]
_TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


class Peak:
    """How far the resident size of this process rises above what it was at the start."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._start = self._process.memory_info().rss
        self.growth_mb = 0.0

    def sample(self) -> None:
        self.growth_mb = max(self.growth_mb, (self._process.memory_info().rss - self._start) / 2**20)


def chat(draw: random.Random) -> dict[str, Any]:
    """One to four turns of a few to 200 words, one in ten with a tool, one in three with a system message."""
    messages = [_message(draw, "system")] if draw.random() < 0.3 else []
    for _ in range(draw.choice((1, 1, 1, 2, 3, 4))):
        messages += [_message(draw, "user"), _message(draw, "assistant")]
    if draw.random() >= 0.1:
        return {"messages": messages}
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}
    messages[-1:] = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": _text(draw)},
        messages[-1],
    ]
    return {"messages": messages, "tools": [_TOOL]}


def preference(draw: random.Random) -> dict[str, Any]:
    return {
        "input": {"messages": [_message(draw, "user")]},
        "preferred_output": [_message(draw, "assistant")],
        "non_preferred_output": [_message(draw, "assistant")],
    }


def json_line(row: dict[str, Any], draw: random.Random) -> bytes:
    """Half of the lines have all but ASCII escaped, as `json.dumps` has it by default."""
    return json.dumps(row, ensure_ascii=draw.random() < 0.5).encode() + b"\n"


def csv_line(draw: random.Random) -> bytes:
    out = io.StringIO()
    csv.writer(out).writerow([_text(draw), _text(draw) + "\n" + _text(draw)])
    return out.getvalue().encode()


def write(path: Path, size_bytes: int, line: Callable[[random.Random], bytes], header: bytes = b"") -> None:
    draw = random.Random(0)
    pool = [line(draw) for _ in range(_POOL)]
    with path.open("wb") as file:
        written = file.write(header)
        while written < size_bytes:
            written += file.write(b"".join(draw.choices(pool, k=1000)))


def check(path: Path, method: Any) -> tuple[float, float]:
    """MB/s and the growth in MB of one check."""
    scan, peak = Scan(method=method), Peak()
    started = time.process_time()
    with path.open("rb") as file:
        for number, _ in scan.rows(file):
            if number % _SAMPLE_EVERY == 0:
                peak.sample()
    took_s = time.process_time() - started
    assert scan.problems == [], scan.problems[:1]
    return path.stat().st_size / 1e6 / took_s, peak.growth_mb


def convert(path: Path) -> tuple[float, float]:
    peak = Peak()
    started = time.process_time()
    with path.open("rb") as file:
        for _ in to_json_lines(_chunks(file), "csv"):
            peak.sample()
    return path.stat().st_size / 1e6 / (time.process_time() - started), peak.growth_mb


def _chunks(file: io.BufferedReader) -> Iterator[bytes]:
    while chunk := file.read(CHUNK_BYTES):
        yield chunk


def _message(draw: random.Random, role: str) -> dict[str, Any]:
    return {"role": role, "content": _text(draw)}


def _text(draw: random.Random) -> str:
    return " ".join(draw.choices(_WORDS, k=min(200, int(2 + draw.expovariate(1 / 30)))))


def main(arguments: list[str] | None = None) -> Report:
    options = parser(__doc__, repetitions=3)
    options.add_argument("--megabytes", type=int, default=512)
    parsed = options.parse_args(arguments)
    megabytes = 4 if parsed.quick else parsed.megabytes
    report = Report("validate", describe(1), {"file": f"{megabytes} MB"})
    folder = (parsed.data or parsed.home / "bench").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix="rows-") as scratch, ForeignLoad() as load:
        path = Path(scratch) / "rows"
        for name, line, header, run in (
            ("chats", lambda draw: json_line(chat(draw), draw), b"", lambda: check(path, "supervised")),
            ("preferences", lambda draw: json_line(preference(draw), draw), b"", lambda: check(path, "dpo")),
            ("CSV to JSON Lines", csv_line, b"prompt,completion\r\n", lambda: convert(path)),
        ):
            write(path, megabytes << 20, line, header)
            found = [run() for _ in range(1 if parsed.quick else parsed.reps)]
            speed = report.add(f"{name}: speed", "MB/s", [speed for speed, _ in found])
            growth = report.add(f"{name}: growth", "MB", [growth for _, growth in found])
            report.ratio(f"{name}: MB/s on one core", speed.median, WANTED_MB_PER_S)
            report.ratio(f"{name}: growth", max(growth.values), MAX_GROWTH_MB, is_limit=True, unit=" MB")
    report.foreign_share = load.share
    report.finish(parsed.json)
    return report


if __name__ == "__main__":
    main(sys.argv[1:])
