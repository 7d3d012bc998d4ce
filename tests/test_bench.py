"""Each script of the benchmark runs, on a tiny base and with tiny sizes; the numbers are for quiet machines."""

import itertools
import json
import os
import random
import subprocess
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch

from bench import fairness, gateway_profile, hot_swap, kills, limits, overhead, run_all, vllm_side
from bench.inputs import Work
from bench.report import Report
from bench.work import work_flops

SCRIPTS = [
    "ceilings",
    "work",
    "many_adapters",
    "prefix",
    "fairness",
    "hot_swap",
    "soak",
    "against_vllm",
    "validate",
    "training",
]


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    """Scripts set threads and environment for a process of their own."""
    environment, threads = dict(os.environ), torch.get_num_threads()
    yield
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters are made once for all scripts."""
    return tmp_path_factory.mktemp("bench")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_measures_and_writes_what_it_found(script: str, tiny_base: Path, data: Path, tmp_path: Path):
    path = tmp_path / "found.json"
    options = ["--quick", "--base", str(tiny_base), "--data", str(data), "--dtype", "fp32", "--threads", "1"]
    import_module(f"bench.{script}").main([*options, "--json", str(path)])
    found = json.loads(path.read_text())
    assert found["script"] == script
    assert found["measures"]
    assert all(measure["values"] for measure in found["measures"])
    assert found["machine"]["threads"] == 1


def test_every_script_is_run_for_the_results():
    # Those with a cluster of their own take minutes.
    apart = {"over_http", "beside", "demo", "estimate", "overhead", "kills", "gateway", "limits"}
    assert {*SCRIPTS, *apart, *run_all.VARIANTS} == set(run_all.SCRIPTS)


def test_a_run_with_arguments_of_its_own_has_results_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    commands: list[list[str]] = []

    def run(command: list[str], **more: object) -> subprocess.CompletedProcess[bytes]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    only = ["over_http", "over_http_haproxy"]
    run_all.main(["--results", str(tmp_path), "--page", str(tmp_path / "page.md"), "--only", *only])
    compat, haproxy = commands
    assert compat[2] == haproxy[2] == "bench.over_http" and str(tmp_path / "over_http.json") in compat
    assert haproxy[3:5] == ["--mode", "haproxy"] and str(tmp_path / "over_http_haproxy.json") in haproxy


def test_what_limits_add_is_measured_on_the_real_application(tmp_path: Path):
    limits.main(["--quick", "--json", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["script"] == "limits" and found["ratios"]


def test_the_results_page_has_every_ratio_its_bar_and_its_conditions(tmp_path: Path):
    report = Report("work", {"cpu": "a", "threads": 1, "versions": {"torch": "2"}}, {"dtype": "bf16"})
    report.add("ours", "tok/s", [3.0, 1.0, 2.0])
    report.ratio("ours : theirs", 2.0, 1.5)
    report.ratio("late", 200.0, 150.0, is_limit=True, unit=" ms")
    page = run_all.page([report.as_json()])
    assert "| ours : theirs | 2 | at least 1.5 | yes |" in page
    assert "| late | 200 ms | at most 150 ms | **no** |" in page
    assert "| ours | 2 | 1 | 3 | 3 | tok/s |" in page


def test_a_sample_counts_for_the_innermost_code_that_somebody_here_wrote():
    raw = "\n".join(
        (
            "run (uvicorn/a.py:1);call (ray/serve/b.py:2);app (tuneloom/serve/limits.py:3);dumps (json/c.py:4) 6",
            "run (uvicorn/a.py:1);call (ray/serve/b.py:2);info (logging/d.py:5) 3",
            "wait (threading.py:6) 1",
        )
    )
    assert gateway_profile.shares(raw) == {"limits": 60.0, "Ray Serve": 30.0, gateway_profile.OTHER: 10.0}


def test_jains_index_is_one_for_even_shares_and_low_for_one_who_takes_all():
    assert fairness.jain([5, 5, 5]) == pytest.approx(1)
    assert fairness.jain([9, 0, 0]) == pytest.approx(1 / 3)


def test_a_token_of_another_version_is_wrong_unless_it_was_a_tie():
    expected = hot_swap.Expected((1, 2, 3), second=(7, 8, 9), margins=(1.0, 0.001, 1.0))
    for answer, wrong, ties in [((1, 2, 3), 0, 0), ((1, 8, 5), 0, 1), ((1, 5, 3), 2, 0), ((7, 2, 3), 3, 0)]:
        tally = hot_swap.Tally()
        hot_swap._judge(tally, answer, expected, tie=0.05)
        assert (tally.wrong, tally.ties) == (wrong, ties), answer


def test_the_operations_of_w_grow_with_its_tokens(tiny_base: Path):
    one = work_flops(tiny_base, Work(requests=1, prompt=8, new=1))
    # Two layers of 64 x 64 twice, 64 x 32 twice, 64 x 128 thrice; the head of 512 once; attention over 36 pairs.
    assert one == 2 * 2 * 8 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128) + 2 * 512 * 64 + 4 * 64 * 2 * 36
    assert work_flops(tiny_base, Work(requests=3, prompt=8, new=1)) == 3 * one


def test_the_other_sides_options_are_read_before_vllm_is_loaded(capsys):
    with pytest.raises(SystemExit):
        vllm_side.main(["--help"])
    assert "--eager" in capsys.readouterr().out


def test_points_of_kills_have_a_checkpoint_between_them():
    for seed in range(50):
        points = kills._points(random.Random(seed), 5)
        gaps = [after - before for before, after in itertools.pairwise([0, *points, kills.TOTAL_STEPS])]
        assert min(gaps[1:-1]) >= kills.MIN_GAP and points[0] > 0 and gaps[-1] > kills.CHECKPOINT_STEPS


def test_the_time_of_a_stage_that_was_not_seen_is_that_of_the_one_before():
    marks = [("a", 1.0), ("b", 2.0), ("c", None), ("d", 7.0), ("", 9.5)]
    assert overhead._spans(marks) == {"a": 1.0, "b": 5.0, "c": 0.0, "d": 2.5}
