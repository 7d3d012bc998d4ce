"""A small model learns to tell satire from news, and is compared with what it was before.

Everything goes through the plain `openai` package. Run `make demo`, or with a running tuneloom:

    eval "$(tuneloom env)"; python examples/headlines.py

The rows come from a public benchmark that the package `evals` on the package index contains (MIT). Exit code 0 only if
every answer of the tuned model is a label and enough of them are right.
"""

import asyncio
import hashlib
import json
import os
import re
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

from openai import AsyncOpenAI, OpenAI

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
MODEL = "headlines"
LABELS = {"1": "sarcastic", "0": "serious"}
SYSTEM = "Say whether the headline is sarcastic or serious. Answer with one word."

N_ROWS = 1200
EPOCHS = 1
BATCH = 16
LEARNING_RATE = 1e-3
RANK = 16
CHECKPOINT_EVERY = 25

N_HELD_OUT = 240
CONCURRENCY = 16
MAX_TOKENS = 6
NEEDED_ACCURACY = 0.70
JOB_TIMEOUT_S = 1200

PACKAGE = "evals==3.0.1.post1"
WHEEL_SHA256 = "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78"
MEMBER = "evals/registry/data/sarcasm/samples.jsonl"
CACHE = Path(os.environ.get("TUNELOOM_HOME") or ".tuneloom") / "demo"
CRUDE = re.compile(
    r"\b(fuck\w*|shit\w*|sex\w*|porn\w*|nude\w*|rap(e|ed|ist)|penis|dick|ass|masturbat\w*|genital\w*|vagina\w*|semen|"
    r"whore|slut|suicid\w*|kill\w*|murder\w*|shoot\w*|dead|die[sd]?)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Row:
    headline: str
    label: str

    @property
    def question(self) -> list[dict[str, str]]:
        return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": self.headline}]

    @property
    def training(self) -> dict[str, list[dict[str, str]]]:
        return {"messages": [*self.question, {"role": "assistant", "content": self.label}]}


@dataclass(frozen=True)
class Score:
    model: str
    valid: float
    accuracy: float
    tokens_per_s: float


def main() -> int:
    client = OpenAI()
    train, held_out = split(load_rows())
    print(f"\n{len(train)} headlines to learn from, {len(held_out)} others to be asked about\n")
    before = score(BASE, held_out)
    job_id = start_job(client, train)
    job = follow(client, job_id, held_out[0])
    if job.status != "succeeded":
        print(f"the job is {job.status}: {job.error.message if job.error else 'no reason given'}")
        return 1
    print(f"\n{job.fine_tuned_model} has learned from {job.trained_tokens:,} tokens; it is `{MODEL}` from here on\n")
    after = score(job.fine_tuned_model, held_out)
    show([before, after])
    if after.valid < 1 or after.accuracy < NEEDED_ACCURACY:
        print(f"\nnot good enough: every answer must be a label, and {NEEDED_ACCURACY:.0%} of them right")
        return 1
    return 0


def load_rows() -> list[Row]:
    """All rows that can be shown to anybody, in an order that depends on nothing but their text."""
    with zipfile.ZipFile(fetch_wheel()) as wheel, wheel.open(MEMBER) as lines:
        samples = [json.loads(line) for line in lines]
    found = {sample["input"][-1]["content"].strip(): LABELS[sample["ideal"]] for sample in samples}
    rows = [Row(headline, label) for headline, label in found.items() if not CRUDE.search(headline)]
    return sorted(rows, key=fingerprint)


def fetch_wheel() -> Path:
    """The package as a file, never installed or unpacked."""
    CACHE.mkdir(parents=True, exist_ok=True)
    path = next(CACHE.glob("evals-*.whl"), None)
    if path is None:
        print(f"downloading {PACKAGE} (46 MB)", flush=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
        subprocess.run([*command, "--dest", str(CACHE), PACKAGE], check=True, timeout=900)
        path = next(CACHE.glob("evals-*.whl"))
    if hashlib.sha256(path.read_bytes()).hexdigest() != WHEEL_SHA256:
        path.unlink()
        sys.exit(f"{path.name} was not the file that was expected. Try again.")
    return path


def split(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """Rows to train on and rows to ask about. A row is on the same side whatever the numbers above are."""
    is_held_out = {row: int(fingerprint(row)[-8:], 16) % 10 == 0 for row in rows}
    train = [row for row in rows if not is_held_out[row]]
    held_out = [row for row in rows if is_held_out[row]]
    return train[:N_ROWS], held_out[:N_HELD_OUT]


def fingerprint(row: Row) -> str:
    return hashlib.sha256(row.headline.encode()).hexdigest()


def start_job(client: OpenAI, rows: list[Row]) -> str:
    data = "".join(json.dumps(row.training) + "\n" for row in rows).encode()
    file = client.files.create(file=("headlines.jsonl", data), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model=BASE,
        training_file=file.id,
        suffix=MODEL,
        seed=1,
        method={
            "type": "supervised",
            "supervised": {"hyperparameters": {"n_epochs": EPOCHS, "batch_size": BATCH}},
        },
        extra_body={
            "tuneloom": {
                "learning_rate": LEARNING_RATE,
                "rank": RANK,
                "checkpoint_every_steps": CHECKPOINT_EVERY,
            }
        },
    )
    print(f"{job.id}: {len(rows)} rows, {EPOCHS} epoch(s), batch {BATCH}, rank {RANK}, learning rate {LEARNING_RATE}")
    return job.id


def follow(client: OpenAI, job_id: str, row: Row):
    """Print a job's events until it ends, and ask its first checkpoint while it trains. Returns the job."""
    seen: set[str] = set()
    is_asked = False
    started = time.monotonic()
    while True:
        job = client.fine_tuning.jobs.retrieve(job_id)
        events = client.fine_tuning.jobs.list_events(job_id, limit=100).data
        for event in reversed(events):
            if event.id not in seen:
                seen.add(event.id)
                show_event(event)
        if job.status in ("succeeded", "failed", "cancelled"):
            return job
        if time.monotonic() - started > JOB_TIMEOUT_S:
            client.fine_tuning.jobs.cancel(job_id)
            sys.exit(f"the job has not ended within {JOB_TIMEOUT_S} s and was cancelled")
        if not is_asked:
            is_asked = ask_checkpoint(client, job_id, row)
        time.sleep(1)


def show_event(event) -> None:
    """A line per message, and for every fourth step a line with a bar as long as its loss."""
    data = event.data or {}
    if event.type != "metrics":
        print(f"  {event.message}", flush=True)
    elif data["step"] % 4 == 1 or data["step"] == data["total_steps"]:
        loss = data["train_loss"]
        bar = "█" * min(60, round(loss * 20))
        print(f"  step {data['step']:4}/{data['total_steps']}  loss {loss:6.3f}  {bar}", flush=True)


def ask_checkpoint(client: OpenAI, job_id: str, row: Row) -> bool:
    """Ask the latest checkpoint, if there is one yet: it answers like any model while its job goes on."""
    checkpoints = client.fine_tuning.jobs.checkpoints.list(job_id, limit=1).data
    if not checkpoints:
        return False
    name = checkpoints[0].fine_tuned_model_checkpoint
    answer = client.chat.completions.create(model=name, messages=row.question, max_tokens=MAX_TOKENS, temperature=0)
    text = (answer.choices[0].message.content or "").strip()
    print(f"  [checkpoint {checkpoints[0].step_number} says {text!r} to {row.headline!r}]", flush=True)
    return True


def score(model: str, rows: list[Row]) -> Score:
    """How a model does on rows that it has not seen, by concurrent requests."""
    started = time.monotonic()
    answers, tokens = asyncio.run(ask_all(model, rows))
    elapsed_s = time.monotonic() - started
    print(f"{model}: {len(rows)} answers in {elapsed_s:.0f} s, such as {answers[0]!r}", flush=True)
    words = [answer.strip().strip(".!'\"").lower() for answer in answers]
    valid = sum(word in LABELS.values() for word in words)
    right = sum(word == row.label for word, row in zip(words, rows, strict=True))
    return Score(model, valid / len(rows), right / len(rows), tokens / elapsed_s)


async def ask_all(model: str, rows: list[Row]) -> tuple[list[str], int]:
    """The answers in order, and how many tokens went in and out."""
    places = asyncio.Semaphore(CONCURRENCY)
    tokens = 0
    async with AsyncOpenAI() as client:

        async def ask(row: Row) -> str:
            nonlocal tokens
            async with places:
                answer = await client.chat.completions.create(
                    model=model, messages=row.question, max_tokens=MAX_TOKENS, temperature=0
                )
            tokens += answer.usage.total_tokens
            return answer.choices[0].message.content or ""

        return await asyncio.gather(*(ask(row) for row in rows)), tokens


def show(scores: list[Score]) -> None:
    width = max(len(score.model) for score in scores)
    print(f"\n{'model':{width}}  valid labels  accuracy  tokens/s")
    for score in scores:
        print(f"{score.model:{width}}  {score.valid:12.1%}  {score.accuracy:8.1%}  {score.tokens_per_s:8,.0f}")
    print("\nchance is 50 %; the base is a 4-bit release of a model with 135 million parameters")


if __name__ == "__main__":
    sys.exit(main())
