"""Runs every script, one after another, each in a process of its own, and writes RESULTS.md from what they found.

`--only` runs some of them; the page then keeps what earlier runs have left in the folder of `--results`.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.report import plain

ROOT = Path(__file__).parent.parent
COMMAND = "python -m bench.run_all --vllm-python VENV/bin/python --vllm-preload LIBTCMALLOC"
GROUPS = {
    "Serving": (
        *("ceilings", "work", "against_vllm", "over_http", "over_http_haproxy", "many_adapters", "prefix"),
        *("fairness", "hot_swap", "soak"),
    ),
    "Gateway": ("gateway", "limits"),
    "Training": ("validate", "training", "demo", "beside", "estimate", "overhead", "kills"),
}
SCRIPTS = tuple(script for scripts in GROUPS.values() for script in scripts)
# Runs of a script with arguments of their own.
VARIANTS = {"over_http_haproxy": ("over_http", "--mode", "haproxy")}


def main(arguments: list[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    options.add_argument("--home", type=Path, default=Path(os.environ.get("TUNELOOM_HOME") or ".tuneloom"))
    options.add_argument("--threads", type=int, default=0, help="0: the cores less one, at least one")
    options.add_argument("--vllm-python", type=Path, help="the Python that has vLLM; without it that row is left out")
    options.add_argument("--vllm-preload", type=Path, nargs="*", default=[], help="libraries, such as libtcmalloc")
    options.add_argument("--only", nargs="*", default=list(SCRIPTS), choices=SCRIPTS)
    options.add_argument("--results", type=Path, help="where the JSON files go; by default `bench/results` in the home")
    options.add_argument("--page", type=Path, default=ROOT / "bench" / "RESULTS.md")
    options.add_argument("--quick", action="store_true", help="tiny sizes: to see that the scripts work")
    parsed = options.parse_args(arguments)
    folder = (parsed.results or parsed.home / "bench" / "results").absolute()
    failed = [script for script in parsed.only if not _run(script, parsed, folder)]
    found = [
        json.loads(path.read_text()) for path in (folder / f"{script}.json" for script in SCRIPTS) if path.exists()
    ]
    parsed.page.write_text(page(found), encoding="utf-8")
    print(f"written: {parsed.page}")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def page(found: list[dict[str, Any]]) -> str:
    """The page for what the scripts have found."""
    lines = [
        "# Measured",
        "",
        "Ours against others, as ratios of medians from one run of one script each; no script's two sides",
    ]
    lines += [
        "come from different runs. What each script does is in its docstring. Machines are named with their group.",
        "",
    ]
    lines += ["```", COMMAND, "```", ""]
    lines += ["The vLLM row needs an environment of its own: `bench/requirements-vllm.txt` says how to make it."]
    for title, scripts in GROUPS.items():
        lines += _group(title, [report for report in found if report["script"] in scripts])
    return "\n".join([*lines, ""])


def _group(title: str, found: list[dict[str, Any]]) -> list[str]:
    if not found:
        return []
    lines = ["", f"## {title}", "", "| what | measured | wanted | met |", "|---|---|---|---|"]
    lines += [_ratio_row(ratio) for report in found for ratio in report["ratios"] if ratio["wanted"] is not None]
    if title == "Serving":
        lines += [
            "",
            "Work W: SmolLM2-135M-Instruct in bf16, 32 requests at once, 64 prompt and 64 new tokens, greedy;",
        ]
        lines += ["adapters of rank 16 on all linear layers."]
    lines += ["", *_reach({report["script"]: report for report in found}), *_conditions(found)]
    for report in found:
        lines += _details(report)
    return lines


def _reach(found: dict[str, dict[str, Any]]) -> list[str]:
    """What the machine leaves of a wanted ratio to vLLM with LoRA, from the share of its ceiling that W reaches."""
    if not {"work", "against_vllm"} <= found.keys():
        return []
    base = next(m["median"] for m in found["work"]["measures"] if m["name"] == "ours, no adapters")
    share = next(r["value"] for r in found["work"]["ratios"] if r["name"].startswith("share of the compute ceiling"))
    lora = [m["median"] for m in found["against_vllm"]["measures"] if re.fullmatch(r"vLLM.*, 8 adapters", m["name"])]
    if not lora:
        return []
    return [
        f"W cannot take more than {base / share:.0f} tokens/s on this machine: so many the multiplications of the base "
        f"alone allow, at the measured rate of large ones. That is {base / share / max(lora):.1f} times vLLM with 8 "
        "adapters, and above any engine's ratio here. Tried for the rest, and in use: one product for layers of one "
        "input, weights packed for the machine, a kernel that reads each adapter's factors once for all its rows, "
        "attention and small loops by kernels.",
        "",
    ]


def _conditions(found: list[dict[str, Any]]) -> list[str]:
    if not found:
        return []
    machine = found[0]["machine"]
    lines = ["### Conditions", ""]
    lines += [f"- {key.replace('_', ' ')}: {_plain(value)}" for key, value in machine.items()]
    for report in found:
        lines += [f"- ceiling, {name}: {value:.1f}" for name, value in report["ceilings"].items()]
        if report["ceilings"]:
            break
    return lines


def _details(report: dict[str, Any]) -> list[str]:
    lines = ["", f"### {report['script']}", ""]
    lines += [f"{report['at']}; other processes used {report['foreign_share']:.0%} of the machine meanwhile."]
    if report["settings"]:
        lines += [", ".join(f"{key} {_plain(value)}" for key, value in report["settings"].items()) + "."]
    lines += ["", "| measured | median | least | most | times | unit |", "|---|---|---|---|---|---|"]
    for measure in report["measures"]:
        values = measure["values"]
        numbers = " | ".join(f"{value:.4g}" for value in (measure["median"], min(values), max(values)))
        lines.append(f"| {measure['name']} | {numbers} | {len(values)} | {measure['unit']} |")
    if report["ratios"]:
        lines += ["", "| result | measured | wanted | met |", "|---|---|---|---|"]
        lines += [_ratio_row(ratio) for ratio in report["ratios"]]
    return [*lines, "", *(f"- {note}" for note in report["notes"])]


def _ratio_row(ratio: dict[str, Any]) -> str:
    bar = "at most" if ratio["is_limit"] else "at least"
    wanted = f"{bar} {ratio['wanted']:g}{ratio['unit']}" if ratio["wanted"] is not None else ""
    verdict = {True: "yes", False: "**no**", None: ""}[ratio["is_met"]]
    return f"| {ratio['name']} | {plain(ratio['value'])}{ratio['unit']} | {wanted} | {verdict} |"


def _plain(value: Any) -> str:
    return ", ".join(f"{name} {each}" for name, each in value.items()) if isinstance(value, dict) else str(value)


def _run(script: str, options: argparse.Namespace, folder: Path) -> bool:
    if script == "against_vllm" and options.vllm_python is None:
        return True
    module, *arguments = VARIANTS.get(script, (script,))
    command = [sys.executable, "-m", f"bench.{module}", *arguments, "--home", str(options.home.absolute())]
    command += ["--threads", str(options.threads), "--json", str(folder / f"{script}.json")]
    command += ["--quick"] if options.quick else []
    if script == "against_vllm":
        command += ["--python", str(options.vllm_python), "--preload", *map(str, options.vllm_preload)]
    print(f"== {script}", flush=True)
    return subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL).returncode == 0


if __name__ == "__main__":
    main()
