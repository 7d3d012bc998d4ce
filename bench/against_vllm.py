"""W against vLLM's CPU build in an environment of its own, eager and compiled, without adapters and with LoRA.

`--python` is the interpreter of that environment (see requirements-vllm.txt). Each of its modes runs in a process of
its own, in turn with ours, on prompts of the same kind and with as many threads. `--preload` names libraries that vLLM
recommends (tcmalloc; Intel's OpenMP is found in its environment).
"""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.inputs import Setup, Work, adapters, open_setup, parser, prompts
from bench.machine import ForeignLoad, describe, enter_environment
from bench.ours import Ours, open_engine
from bench.report import Report, interleave
from bench.work import NUM_ADAPTERS, OURS, OURS_BASE, ours_sides
from tuneloom.domain import AdapterRef

ROOT = Path(__file__).parent.parent
_LOAD_TIMEOUT_S = 1800.0
_numbers = itertools.count()


@dataclass(frozen=True)
class Mode:
    """One way in which vLLM runs W, and our side of it."""

    name: str
    is_eager: bool
    has_lora: bool

    @property
    def ours(self) -> str:
        return OURS if self.has_lora else OURS_BASE


MODES = {
    "eager": Mode("vLLM eager, no adapters", True, False),
    "compiled": Mode("vLLM compiled (its default), no adapters", False, False),
    "lora-eager": Mode("vLLM eager, 8 adapters", True, True),
    "lora-compiled": Mode("vLLM compiled (its default), 8 adapters", False, True),
}


class VllmSide:
    """A process of `vllm_side` and what it said when it was ready."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        self.about = self._read()

    def run(
        self, asked: Sequence[Sequence[int]], new_tokens: int, refs: Sequence[AdapterRef], clock: str
    ) -> dict[str, Any]:
        loras = [(ref.sha256[:12], i + 1, ref.uri) for i, ref in enumerate(refs)]
        work = {"id": str(next(_numbers)), "prompts": asked, "new": new_tokens, "adapters": loras, "clock": clock}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(work) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("vLLM's process has ended; see its log")
        return json.loads(line)


@contextmanager
def open_vllm(options: Any, setup: Setup, mode: Mode, work: Work) -> Iterator[VllmSide]:
    command = [str(options.python), "-m", "bench.vllm_side", "--base", str(setup.base)]
    command += ["--dtype", "bfloat16" if setup.dtype == "bf16" else "float32", "--requests", str(work.requests)]
    command += ["--eager"] if mode.is_eager else []
    command += ["--adapters", str(NUM_ADAPTERS)] if mode.has_lora else []
    environment = {**os.environ, "OMP_NUM_THREADS": str(setup.threads), "LD_PRELOAD": preload(options)}
    log = setup.data / "vllm.log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        try:
            yield VllmSide(process)
        except RuntimeError as error:
            raise SystemExit(f"{error}: {log}") from error
        finally:
            process.kill()
            process.wait()


def preload(options: Any) -> str:
    """The libraries that vLLM's own warnings recommend, as far as they are here."""
    found = [str(path) for path in options.preload]
    found += [str(path) for path in (options.python.parent.parent / "lib").glob("libiomp5.so")]
    return ":".join(found)


def main(arguments: list[str] | None = None) -> Report:
    options = parser(__doc__, repetitions=3)
    options.add_argument("--python", type=Path, help="the Python that has vLLM; without it only ours is measured")
    options.add_argument("--preload", type=Path, nargs="*", default=[], help="libraries, such as libtcmalloc")
    options.add_argument("--modes", nargs="*", default=list(MODES), choices=list(MODES))
    parsed = options.parse_args(arguments)
    setup = open_setup(parsed)
    work = Work.of(setup)
    refs = adapters(setup, NUM_ADAPTERS)
    report = Report(
        "against_vllm",
        describe(setup.threads),
        {"base": setup.base.name, "dtype": setup.dtype, "clock": setup.now.__name__},
    )
    found: dict[str, dict[str, list[float]]] = {}
    with open_engine(setup) as ours, ForeignLoad() as load:
        sides = ours_sides(ours, setup, work, refs)
        for side in sides.values():
            side()
        if parsed.python is None:
            found[""] = interleave(sides, setup.repetitions)
        else:
            names = [Path(path).name for path in preload(parsed).split(":") if path]
            report.notes.append(f"vLLM's process preloads {', '.join(names) or 'nothing'}")
            for mode in (MODES[name] for name in parsed.modes):
                found[mode.name] = _pair(ours, sides[mode.ours], parsed, setup, mode, work, refs, report)
    report.foreign_share = load.share
    _evaluate(report, found)
    report.finish(setup.json_path)
    return report


def _pair(
    ours: Ours,
    our_side: Callable[[], float],
    options: Any,
    setup: Setup,
    mode: Mode,
    work: Work,
    refs: list[AdapterRef],
    report: Report,
) -> dict[str, list[float]]:
    """Our side and one mode of vLLM's in turn, in answer tokens per second."""
    with open_vllm(options, setup, mode, work) as theirs:
        report.notes.append(f"{mode.name}: {theirs.about}")
        chosen = refs if mode.has_lora else []

        def their_side(new_tokens: int = work.new) -> float:
            asked = prompts(setup.base, work.requests, work.prompt)
            return work.answered_tokens / theirs.run(asked, new_tokens, chosen, setup.now.__name__)["elapsed_s"]

        their_side(2)
        return interleave({mode.ours: our_side, mode.name: their_side}, setup.repetitions)


def _evaluate(report: Report, found: dict[str, dict[str, list[float]]]) -> None:
    ratios: dict[bool, list[float]] = {False: [], True: []}
    for name, pair in found.items():
        medians = {}
        for side, values in pair.items():
            label = side if side == name or not name else f"{side} (beside {name})"
            medians[side] = report.add(label, "tok/s", values).median
        for mode in MODES.values():
            if mode.name == name:
                ratio = medians[mode.ours] / medians[name]
                ratios[mode.has_lora].append(ratio)
                report.ratio(f"ours : {name}", ratio)
    if ratios[False]:
        report.ratio("W without adapters, ours : the better of vLLM's modes", min(ratios[False]), 1.1)
    if ratios[True]:
        report.ratio("W over 8 adapters, ours : the better of vLLM's modes with LoRA", min(ratios[True]), 8)


if __name__ == "__main__":
    enter_environment()
    main(sys.argv[1:])
