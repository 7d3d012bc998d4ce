"""What a script measured: repetitions of each side, medians, ratios; as a table for people and JSON for `run_all`."""

import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Measure:
    """One side's repetitions."""

    name: str
    unit: str
    values: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.values)


@dataclass(frozen=True)
class Ratio:
    """A result as it is asked for. `wanted` is the least value, or the largest where `is_limit`."""

    name: str
    value: float
    wanted: float | None = None
    is_limit: bool = False
    unit: str = ""

    @property
    def is_met(self) -> bool | None:
        if self.wanted is None:
            return None
        return self.value <= self.wanted if self.is_limit else self.value >= self.wanted


@dataclass
class Report:
    """All that one run of a script found."""

    script: str
    machine: Mapping[str, Any]
    settings: Mapping[str, Any]
    at: str = field(default_factory=lambda: time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()))
    measures: list[Measure] = field(default_factory=list)
    ratios: list[Ratio] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    ceilings: dict[str, float] = field(default_factory=dict)
    foreign_share: float = 0.0

    def add(self, name: str, unit: str, values: list[float]) -> Measure:
        measure = Measure(name, unit, values)
        self.measures.append(measure)
        return measure

    def ratio(self, name: str, value: float, wanted: float | None = None, **more: Any) -> None:
        self.ratios.append(Ratio(name, value, wanted, **more))

    def as_json(self) -> dict[str, Any]:
        data = asdict(self)
        for row, measure in zip(data["measures"], self.measures, strict=True):
            row["median"] = measure.median
        for row, ratio in zip(data["ratios"], self.ratios, strict=True):
            row["is_met"] = ratio.is_met
        return data

    def finish(self, json_path: Path | None) -> None:
        """Print all of it, and write it where `--json` says."""
        print(self.as_text(), flush=True)
        if json_path is not None:
            json_path.parent.mkdir(parents=True, exist_ok=True)
            json_path.write_text(json.dumps(self.as_json(), indent=2) + "\n", encoding="utf-8")

    def as_text(self) -> str:
        lines = [f"{self.script}  {self.at}  others used {self.foreign_share:.0%} of the machine meanwhile"]
        lines += [f"  {key}: {value}" for key, value in [*self.machine.items(), *self.settings.items()]]
        lines += [f"  ceiling {name}: {value:.1f}" for name, value in self.ceilings.items()]
        rows = [
            [m.name, f"{m.median:.4g}", f"{min(m.values):.4g}", f"{max(m.values):.4g}", str(len(m.values)), m.unit]
            for m in self.measures
        ]
        lines += table(["measured", "median", "least", "most", "times", "unit"], rows)
        lines += table(["result", "value", "wanted", ""], [_result_row(ratio) for ratio in self.ratios])
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def interleave(sides: Mapping[str, Callable[[], Any]], repetitions: int) -> dict[str, list[Any]]:
    """Run all sides `repetitions` times in turn, the order reversed each time, so that drift hits all alike."""
    found: dict[str, list[Any]] = {name: [] for name in sides}
    for repetition in range(repetitions):
        names = list(sides) if repetition % 2 == 0 else list(reversed(sides))
        for name in names:
            found[name].append(sides[name]())
    return found


def _result_row(ratio: Ratio) -> list[str]:
    sign = "<=" if ratio.is_limit else ">="
    wanted = f"{sign} {ratio.wanted:g}{ratio.unit}" if ratio.wanted is not None else ""
    verdict = {True: "met", False: "NOT MET", None: ""}[ratio.is_met]
    return [ratio.name, f"{plain(ratio.value)}{ratio.unit}", wanted, verdict]


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a table with aligned columns, after an empty one."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    return [
        "",
        *("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *rows]),
    ]


def plain(value: float) -> str:
    """Three digits, or all of those before the point."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
