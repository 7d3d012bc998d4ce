"""The results as a page: one table for each part of the API, a column for each client, failures with their reasons."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

NO_ANSWER = "the driver ended before this call"


@dataclass
class Column:
    """One client's results. `failures` has the reason of each call that is not ok; `problem` that of the whole run.

    `lacking` are the calls that it does not have.
    """

    title: str
    language: str
    runtime: str = "-"
    passed: set[str] = field(default_factory=set)
    failures: dict[str, str] = field(default_factory=dict)
    lacking: set[str] = field(default_factory=set)
    problem: str | None = None

    def cell(self, name: str, only: str | None) -> str:
        if name in self.lacking or (only is not None and only != self.language):
            return "-"
        return "ok" if name in self.passed else "FAIL"

    def reason(self, name: str) -> str:
        return self.failures.get(name) or self.problem or NO_ANSWER


Cases = Mapping[str, Mapping[str, Sequence[str]]]


def page(cases: Cases, columns: Sequence[Column], *, server: str, date: str) -> str:
    """The whole page, in Markdown."""
    counts = [_count(cases, column) for column in columns]
    head = [
        "# Conformance",
        "",
        f"Every call below, made on {date} against {server} by unmodified clients of OpenAI, each in an environment of "
        "its own. `make conformance` makes this page again from a running server.",
        "",
        "| client | on | calls ok |",
        "|---|---|---|",
        *(
            f"| {column.title} | {column.runtime} | {ok} of {total} |"
            for column, (ok, total) in zip(columns, counts, strict=True)
        ),
        "",
        "A call is ok when the object or the error that the client gives is what is described, field by field; `-` "
        "stands where a client has no such call, or where the server's settings do not allow what it needs.",
    ]
    return "\n".join([*head, *_tables(cases, columns), *_failures(cases, columns)]) + "\n"


def is_green(cases: Cases, columns: Sequence[Column]) -> bool:
    return all(ok == total for ok, total in (_count(cases, column) for column in columns))


def _tables(cases: Cases, columns: Sequence[Column]) -> list[str]:
    lines = []
    for group, calls in cases.items():
        lines += ["", f"## {group}", ""]
        lines += [f"| call | shown | {' | '.join(column.title for column in columns)} |"]
        lines += ["|" + "---|" * (2 + len(columns))]
        for name, (call, shown, *only) in calls.items():
            cells = [column.cell(name, only[0] if only else None) for column in columns]
            lines += [f"| `{call}` | {_escaped(shown)} | {' | '.join(cells)} |"]
    return lines


def _failures(cases: Cases, columns: Sequence[Column]) -> list[str]:
    lines = []
    for column in columns:
        for name, (call, _, *only) in _calls(cases):
            if column.cell(name, only[0] if only else None) == "FAIL":
                reason = re.sub(r"\s+", " ", column.reason(name))[:500]
                lines += [f"- {column.title}, `{call}` ({name}): {reason}"]
    return ["", "## Failures", "", *lines] if lines else []


def _count(cases: Cases, column: Column) -> tuple[int, int]:
    cells = [column.cell(name, only[0] if only else None) for name, (_, _, *only) in _calls(cases)]
    return cells.count("ok"), len(cells) - cells.count("-")


def _calls(cases: Cases) -> list[tuple[str, Sequence[str]]]:
    return [(name, case) for calls in cases.values() for name, case in calls.items()]


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")
