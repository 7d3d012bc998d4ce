"""What this machine can do at best, at the thread count of the measurement: matrix products and reading memory."""

import sys
import time
from collections.abc import Callable

from bench.inputs import open_setup, parser
from bench.machine import ForeignLoad, describe, enter_environment
from bench.report import Report

_GEMM_SIZE = 2048
_READ_BYTES = 1 << 30


def gemm_gflops(
    dtype: str, *, size: int = _GEMM_SIZE, times: int = 5, now: Callable[[], float] = time.perf_counter
) -> float:
    """The best of `times` square matrix products, in GFLOP/s."""
    import torch

    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    left, right = (torch.randn(size, size).to(kind) for _ in range(2))
    return 2 * size**3 / _best_s(lambda: torch.mm(left, right), times, now) / 1e9


def read_gb_per_s(*, size_bytes: int = _READ_BYTES, times: int = 5) -> float:
    """The best of `times` sums over an array that no cache holds, in GB/s."""
    import torch

    values = torch.ones(size_bytes // 4)
    return size_bytes / _best_s(values.sum, times, time.perf_counter) / 1e9


def measure(*, is_quick: bool = False) -> dict[str, float]:
    size = 256 if is_quick else _GEMM_SIZE
    return {
        "bf16 GEMM GFLOP/s": gemm_gflops("bf16", size=size),
        "fp32 GEMM GFLOP/s": gemm_gflops("fp32", size=size),
        "DRAM read GB/s": read_gb_per_s(size_bytes=1 << 24 if is_quick else _READ_BYTES),
    }


def _best_s(work: Callable[[], object], times: int, now: Callable[[], float]) -> float:
    best = float("inf")
    for _ in range(times + 1):
        started = now()
        work()
        best = min(best, now() - started)
    return best


def main(arguments: list[str] | None = None) -> Report:
    setup = open_setup(parser(__doc__).parse_args(arguments))
    report = Report("ceilings", describe(setup.threads), {})
    with ForeignLoad() as load:
        rounds = [measure(is_quick=setup.is_quick) for _ in range(setup.repetitions)]
    report.foreign_share = load.share
    for name in rounds[0]:
        report.ceilings[name] = report.add(name, name.split()[-1], [found[name] for found in rounds]).median
    report.finish(setup.json_path)
    return report


if __name__ == "__main__":
    enter_environment()
    main(sys.argv[1:])
