"""Training: tokens per second and peak memory, our trainer against TRL's SFTTrainer with PEFT, each in processes of
its own, in turn.

Twice: SmolLM2-135M on small talk, whose loss curves are compared too; and a base in the shape of Gemma 3 270M with
random weights, whose vocabulary of 262,144 is most of it, on prompts four times as long as their answers. The first
step of each run is not timed. Useful tokens are counted: those of rows, no padding.
"""

import io
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.inputs import Setup, open_setup, parser
from bench.machine import ForeignLoad, describe, enter_environment
from bench.report import Report, interleave
from bench.training_side import Outcome, Run
from tuneloom.train.environment import WORKER_ENVIRONMENT

ROOT = Path(__file__).parent.parent
PACKAGE = "chatterbot-corpus==1.3.3"
LONGEST_LINE = 300
OURS, TRL, TRL_FAST = "ours", "trl", "trl without checkpointing"
GEMMA = "gemma"


@dataclass(frozen=True)
class Case:
    """One comparison: `steps` of `tokens_per_step` on the base in a folder."""

    name: str
    base: Path
    steps: int
    tokens_per_step: int
    rows: Path


def cases(setup: Setup) -> list[Case]:
    """Both comparisons, with bases and rows made where they are missing."""
    tokens = 96 if setup.is_quick else 1024
    steps = (3, 3) if setup.is_quick else (9, 4)
    talk = setup.data / f"training-talk-{'quick' if setup.is_quick else 'rows'}.npz"
    long = setup.data / f"training-{GEMMA}-{'quick' if setup.is_quick else 'rows'}.npz"
    gemma = gemma_base(setup.data / f"{GEMMA}-{'quick' if setup.is_quick else '270m'}", is_quick=setup.is_quick)
    _save_rows(list(_some(_talk(setup), steps[0] * tokens)), talk)
    vocabulary = json.loads((gemma / "config.json").read_text())["vocab_size"]
    _save_rows(list(_some(_random_rows(vocabulary, is_quick=setup.is_quick), steps[1] * tokens)), long)
    return [
        Case(setup.base.name, setup.base, steps[0], tokens, talk),
        Case("Gemma 3 270M shape", gemma, steps[1], tokens, long),
    ]


def gemma_base(folder: Path, *, is_quick: bool) -> Path:
    """Random bf16 weights in the shape of Gemma 3 270M."""
    if not (folder / "config.json").exists():
        import torch
        from transformers import Gemma3ForCausalLM, Gemma3TextConfig

        layers = 2 if is_quick else 18
        config = Gemma3TextConfig(
            vocab_size=2048 if is_quick else 262144,
            hidden_size=64 if is_quick else 640,
            intermediate_size=96 if is_quick else 2048,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=16 if is_quick else 256,
            query_pre_attn_scalar=16 if is_quick else 256,
            sliding_window=512,
            layer_types=["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(layers)],
            max_position_embeddings=32768,
            tie_word_embeddings=True,
        )
        torch.manual_seed(0)
        Gemma3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


Row = tuple[list[int], list[bool]]


def _some(rows: Iterator[Row], num_tokens: int) -> Iterator[Row]:
    """The first rows that have so many tokens together."""
    for ids, learned in rows:
        if num_tokens < len(ids):
            return
        num_tokens -= len(ids)
        yield ids, learned


def _save_rows(rows: list[Row], path: Path) -> None:
    from tuneloom.train.data import Tokens, save_tokens

    offsets = np.cumsum([0, *(len(ids) for ids, _ in rows)]).astype(np.int64)
    ids = np.concatenate([ids for ids, _ in rows]).astype(np.int32)
    save_tokens(Tokens(ids, np.concatenate([learned for _, learned in rows]).astype(np.bool_), offsets), path)


def _random_rows(vocabulary: int, *, is_quick: bool) -> Iterator[Row]:
    """Answers of 16 to 48 random tokens after prompts four times as long."""
    numbers = np.random.default_rng(0)
    while True:
        answer = int(numbers.integers(2, 5) if is_quick else numbers.integers(16, 49))
        yield numbers.integers(20, vocabulary, 5 * answer).tolist(), [False] * 4 * answer + [True] * answer


def _talk(setup: Setup) -> Iterator[Row]:
    """Small talk as the base's chat template renders it, in a random order; the answers are learned."""
    from tuneloom.rows import Scan
    from tuneloom.train.data import RowReader
    from tuneloom.train.render import Example, Renderer

    pairs = _invented() if setup.is_quick else _corpus(setup.data)
    order = np.random.default_rng(0).permutation(len(pairs))
    roles = ("user", "assistant")
    lines = [
        json.dumps({"messages": [{"role": r, "content": c} for r, c in zip(roles, pairs[i], strict=True)]})
        for i in order
    ]
    reader = RowReader(Scan(), Renderer.load(setup.base), 512)
    for _, example in reader.examples(io.BytesIO("\n".join(lines).encode())):
        assert isinstance(example, Example)
        yield list(example.ids), list(example.learned)


def _invented() -> list[tuple[str, str]]:
    return [("What is " + "red " * (i % 5) + str(i), "It is " + "blue " * (i % 3)) for i in range(60)]


def _corpus(folder: Path) -> list[tuple[str, str]]:
    """The first question and answer of each English dialogue of a package (BSD-3), downloaded once, not installed."""
    import yaml

    if next(folder.glob("chatterbot_corpus-*.whl"), None) is None:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
        subprocess.run([*command, "--dest", str(folder), PACKAGE], check=True, timeout=300)
    pairs: dict[str, str] = {}
    with zipfile.ZipFile(next(folder.glob("chatterbot_corpus-*.whl"))) as wheel:
        for name in sorted(wheel.namelist()):
            if "/data/english/" not in name or not name.endswith(".yml"):
                continue
            for dialogue in yaml.safe_load(wheel.read(name).decode())["conversations"]:
                texts = [str(text).strip() for text in dialogue if text]
                if len(texts) > 1 and max(map(len, texts[:2])) <= LONGEST_LINE:
                    pairs.setdefault(texts[0], texts[1])
    return list(pairs.items())


class Sides:
    """Runs of both sides on one case; each run of a side has the next seed."""

    def __init__(self, case: Case, setup: Setup) -> None:
        self._case, self._setup = case, setup
        self._runs: dict[str, int] = {}

    def run(self, side: str) -> Callable[[], Outcome]:
        return lambda: self._run(side)

    def _run(self, side: str) -> Outcome:
        self._runs[side] = seed = self._runs.get(side, 0) + 1
        setup, case = self._setup, self._case
        run = Run(
            side=side,  # type: ignore[arg-type]
            base=str(case.base),
            tokenizer=str(setup.base),
            rows=str(case.rows),
            tokens_per_step=case.tokens_per_step,
            dtype=setup.dtype,
            seed=seed,
            threads=setup.threads,
            clock=setup.now.__name__,
        )
        environment = {**os.environ, **WORKER_ENVIRONMENT, "OMP_NUM_THREADS": str(setup.threads)}
        done = subprocess.run(
            [sys.executable, "-m", "bench.training_side", run.as_json()],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=900,
        )
        if done.returncode:
            raise SystemExit(f"{side} failed on {case.name}:\n{done.stderr[-3000:]}")
        return Outcome(**json.loads(done.stdout.splitlines()[-1]))


def curves_apart(ours: list[list[float]], theirs: list[list[float]]) -> tuple[float, float]:
    """How far the mean curves are apart over all steps, and how far they would be by chance of the seed alone.

    Both are root mean squares over the steps; the second is from the spread of their curves over seeds.
    """
    steps = min(len(curve) for curve in [*ours, *theirs])
    a, b = (np.array([curve[:steps] for curve in curves]) for curves in (ours, theirs))
    distance = float(np.sqrt(np.mean((a.mean(0) - b.mean(0)) ** 2)))
    if len(b) < 2:
        return distance, float("nan")
    chance = b.var(0, ddof=1) * (1 / len(a) + 1 / len(b))
    return distance, float(np.sqrt(chance.mean()))


def main(arguments: list[str] | None = None) -> Report:
    options = parser(__doc__, repetitions=3)
    options.add_argument("--trl-fast", action="store_true", help="also TRL with a bf16 base and without checkpointing")
    options.add_argument("--only", choices=("first", "second"), help="one of the two comparisons")
    parsed = options.parse_args(arguments)
    setup = open_setup(parsed)
    report = Report(
        "training",
        describe(setup.threads),
        {"base": setup.base.name, "dtype": setup.dtype, "clock": setup.now.__name__},
    )
    chosen = [case for case, name in zip(cases(setup), ("first", "second"), strict=True) if parsed.only in (None, name)]
    found = {}
    with ForeignLoad() as load:
        for case in chosen:
            sides = Sides(case, setup)
            names = [OURS, TRL, *([TRL_FAST] if parsed.trl_fast else [])]
            found[case.name] = interleave({name: sides.run(name) for name in names}, setup.repetitions)
    report.foreign_share = load.share
    for case in chosen:
        _evaluate(report, case, found[case.name], is_memory_wanted=case.base != setup.base)
    report.finish(setup.json_path)
    return report


def _evaluate(report: Report, case: Case, found: dict[str, list[Outcome]], *, is_memory_wanted: bool) -> None:
    speed, memory = {}, {}
    for side, outcomes in found.items():
        speed[side] = report.add(f"{case.name}, {side}", "tok/s", [o.tokens_per_s for o in outcomes]).median
        sizes = [o.memory_bytes / 2**20 for o in outcomes]
        memory[side] = report.add(f"{case.name}, {side}, peak memory", "MiB", sizes).median
    wanted = 2 if is_memory_wanted else 1.5
    report.ratio(f"training {case.name}, tokens/s, ours : TRL + PEFT", speed[OURS] / speed[TRL], wanted)
    limit = {"wanted": 0.6, "is_limit": True} if is_memory_wanted else {}
    report.ratio(f"training {case.name}, peak memory, ours : TRL + PEFT", memory[OURS] / memory[TRL], **limit)
    if TRL_FAST in speed:
        report.ratio(f"training {case.name}, tokens/s, ours : {TRL_FAST}", speed[OURS] / speed[TRL_FAST])
    ours, theirs = ([o.losses for o in found[side]] for side in (OURS, TRL))
    for side, curves in ((OURS, ours), (TRL, theirs)):
        steps = min(map(len, curves))
        mean = np.mean([curve[:steps] for curve in curves], axis=0)
        report.notes.append(f"{case.name}, {side}, loss by step: {' '.join(f'{loss:.3f}' for loss in mean)}")
    if not is_memory_wanted:
        distance, chance = curves_apart(ours, theirs)
        report.notes.append(f"{case.name}: the curves are {distance:.3f} apart; by chance of the seed {chance:.3f}")
        if chance == chance:
            name = f"training {case.name}, loss curves, distance : chance of the seed"
            report.ratio(name, distance / chance, 2, is_limit=True)


if __name__ == "__main__":
    enter_environment()
    main(sys.argv[1:])
