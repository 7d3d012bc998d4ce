"""A job's file as token ids, checked row by row while it is read, and kept beside the run for the next start."""

import hashlib
import os
import secrets
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np

from tuneloom.bases import Base
from tuneloom.domain import File, JobSpec
from tuneloom.errors import InvalidFile, InvalidRequest
from tuneloom.rows import Conversation, Preference, Row, Scan
from tuneloom.store import Store
from tuneloom.train.render import Example, PreferenceExample, Rendered, Renderer

# A larger file is read again when training starts: the check must run in constant memory.
MAX_CACHED_BYTES = 64 << 20
# Rows that are rendered together.
BATCH_ROWS = 64
BATCH_CHARACTERS = 256 << 10
TOO_FEW_TO_SPLIT = "The training file has one row, of which `validation_share` can hold nothing out. Add rows."
# Apart from the streams of the order of rows, which are (seed, epoch).
_SPLIT_STREAM = 1 << 40


@dataclass(frozen=True)
class Tokens:
    """All rows end to end: row i is `ids[offsets[i]:offsets[i + 1]]`, and `learned` marks what is predicted."""

    ids: np.ndarray
    learned: np.ndarray
    offsets: np.ndarray

    @property
    def num_rows(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_tokens(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def select(self, rows: np.ndarray) -> "Tokens":
        """The rows that are True in `rows` (num_rows,), in their order."""
        lengths = self.lengths
        kept = np.repeat(rows, lengths)
        offsets = np.concatenate([[0], np.cumsum(lengths[rows])]).astype(np.int64)
        return Tokens(self.ids[kept], self.learned[kept], offsets)


@dataclass(frozen=True)
class PreferenceTokens:
    """Pairs: row i of both begins with the same `prompt_lengths[i]` ids, and only the answers are learned."""

    chosen: Tokens
    rejected: Tokens
    prompt_lengths: np.ndarray

    @property
    def num_rows(self) -> int:
        return self.chosen.num_rows

    @property
    def num_tokens(self) -> int:
        return self.chosen.num_tokens + self.rejected.num_tokens

    @property
    def lengths(self) -> np.ndarray:
        """Of each pair, the longer row."""
        return np.maximum(self.chosen.lengths, self.rejected.lengths)

    def select(self, rows: np.ndarray) -> "PreferenceTokens":
        """The pairs that are True in `rows` (num_rows,), in their order."""
        return PreferenceTokens(self.chosen.select(rows), self.rejected.select(rows), self.prompt_lengths[rows])


AnyTokens = TypeVar("AnyTokens", Tokens, PreferenceTokens)


class TokensBuilder:
    """Collects examples in flat arrays: a few bytes a token."""

    def __init__(self) -> None:
        self._ids = array("i")
        self._learned = bytearray()
        self._offsets = array("q", [0])

    def add(self, example: Example) -> None:
        self._ids.extend(example.ids)
        self._learned.extend(example.learned)
        self._offsets.append(len(self._ids))

    def build(self) -> Tokens:
        return Tokens(
            np.array(self._ids, dtype=np.int32),
            np.frombuffer(bytes(self._learned), dtype=np.bool_),
            np.array(self._offsets, dtype=np.int64),
        )


class PreferenceBuilder:
    """Collects pairs as `TokensBuilder` collects rows."""

    def __init__(self) -> None:
        self._chosen, self._rejected = TokensBuilder(), TokensBuilder()
        self._prompt_lengths = array("i")

    def add(self, example: PreferenceExample) -> None:
        self._chosen.add(example.chosen)
        self._rejected.add(example.rejected)
        self._prompt_lengths.append(example.prompt_length)

    def build(self) -> PreferenceTokens:
        lengths = np.array(self._prompt_lengths, dtype=np.int32)
        return PreferenceTokens(self._chosen.build(), self._rejected.build(), lengths)


def builder_for(spec: JobSpec) -> TokensBuilder | PreferenceBuilder:
    return PreferenceBuilder() if spec.method == "dpo" else TokensBuilder()


def length_limit(spec: JobSpec, base: Base) -> int:
    """The longest row that the job may hold, in tokens."""
    return min(spec.options.max_length or base.context_length, base.context_length)


class RowReader:
    """One pass over a file: the rows that can be learned as examples; `scan` holds what is wrong with the others.

    A row above `limit` tokens is a problem, or with `cut` loses what is beyond. `lost_tokens` are those that cutting
    takes, or would take; `missed_answers` those that the chat template renders so that they cannot be learned (see
    `Codec.encode_training`).
    """

    def __init__(self, scan: Scan, renderer: Renderer, limit: int, *, cut: bool = False) -> None:
        self.scan = scan
        self.long_rows = self.lost_tokens = self.unlearnable_rows = self.missed_answers = 0
        self._renderer = renderer
        self.limit = limit
        self._cut = cut

    def examples(self, file: BinaryIO) -> Iterator[tuple[int, Rendered]]:
        """Good rows with their line numbers, in order."""
        for batch in _batches(self.scan.rows(file)):
            rendered = self._renderer.render_batch([row for _, row in batch])
            for (line, row), example in zip(batch, rendered, strict=True):
                if isinstance(example, InvalidRequest):
                    self.scan.add(line, example.message)
                elif (fitting := self._fit(line, example)) is not None:
                    self.missed_answers += _missed_answers(row, example)
                    yield line, fitting
        # A batch is scanned before it is rendered, so that problems of both kinds come out of order.
        self.scan.problems.sort(key=lambda problem: (problem.line is None, problem.line or 0))

    def _fit(self, line: int, example: Rendered) -> Rendered | None:
        """The example within the limit; None, and a problem, if it cannot be learned."""
        length = max(len(part.ids) for part in parts_of(example))
        fitting = example
        if length > self.limit:
            self.long_rows += 1
            self.lost_tokens += sum(max(0, len(part.ids) - self.limit) for part in parts_of(example))
            if not self._cut:
                self.scan.add(
                    line,
                    f"The row has {length:,} tokens; the limit is {self.limit:,}. Shorten or split it, or set "
                    '`long_rows` to "cut".',
                )
                return None
            fitting = example.cut(self.limit)
        is_pair_alike = isinstance(fitting, PreferenceExample) and fitting.chosen.ids == fitting.rejected.ids
        if not is_pair_alike and all(any(part.learned[1:]) for part in parts_of(fitting)):
            return fitting
        self.unlearnable_rows += 1
        if is_pair_alike:
            where = f" in their first {self.limit:,} tokens, to which they are cut" if length > self.limit else ""
            self.scan.add(line, f"Both answers are the same{where}: there is nothing to prefer.")
        elif length > self.limit:
            self.scan.add(
                line,
                f"The row has {length:,} tokens, and nothing that is learned is among the first {self.limit:,}, to "
                "which it is cut. Shorten what comes before its answer.",
            )
        else:
            self.scan.add(line, "The row has no token to learn.")
        return None


def parts_of(example: Rendered) -> tuple[Example, ...]:
    """The sequences that are forwarded for a row."""
    return (example,) if isinstance(example, Example) else (example.chosen, example.rejected)


def _batches(rows: Iterator[tuple[int, Row]]) -> Iterator[list[tuple[int, Row]]]:
    batch: list[tuple[int, Row]] = []
    characters = 0
    for line, row in rows:
        batch.append((line, row))
        characters += _characters(row)
        if len(batch) >= BATCH_ROWS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _characters(row: Row) -> int:
    """About how long a row is."""
    if isinstance(row, Preference):
        return sum(_characters(part) for part in row.answered())
    if isinstance(row, Conversation):
        return sum(len(message["content"]) for message in row.messages)
    return sum(map(len, vars(row).values()))


def _missed_answers(row: Row, example: Rendered) -> int:
    if not isinstance(row, Conversation) or not isinstance(example, Example):
        return 0
    wanted = sum(m["role"] == "assistant" and m.get("weight") != 0 for m in row.messages)
    return max(0, wanted - example.num_answers)


def held_out(num_rows: int, share: float, seed: int) -> np.ndarray:
    """Which rows (num_rows,) are held out for validation: `share` of them, at least one, never all of several."""
    count = min(max(1, round(share * num_rows)), max(0, num_rows - 1))
    rows = np.zeros(num_rows, dtype=np.bool_)
    rows[np.random.default_rng((seed, _SPLIT_STREAM)).permutation(num_rows)[:count]] = True
    return rows


def split(tokens: AnyTokens, spec: JobSpec) -> tuple[AnyTokens, AnyTokens | None]:
    """The rows to train on and those that the job holds out of them, if it does.

    Raises:
        InvalidFile: there is only one row.
    """
    if spec.options.validation_share is None:
        return tokens, None
    if tokens.num_rows < 2:
        raise InvalidFile(TOO_FEW_TO_SPLIT, param="tuneloom.validation_share")
    rows = held_out(tokens.num_rows, spec.options.validation_share, spec.seed)
    return tokens.select(~rows), tokens.select(rows)


def load_tokens(
    store: Store, file: File, base: Base, spec: JobSpec, folder: Path, renderer: Callable[[], Renderer]
) -> Tokens | PreferenceTokens:
    """The tokens of a job's file, pairs for the method `dpo`: those that the check left in `folder`, or made anew.

    Raises:
        InvalidFile: a row cannot be learned; the first is named.
    """
    path = folder / tokens_name(file, base, spec)
    if path.exists():
        return read_tokens(path)
    builder = builder_for(spec)
    reader = reader_for(spec, base, Scan(method=spec.method), renderer())
    with store.blobs.open(file.blob) as source:
        for _, example in reader.examples(source):
            builder.add(example)  # type: ignore[arg-type]
    if reader.scan.problems:
        first = reader.scan.problems[0]
        where = f"line {first.line}: " if first.line else ""
        raise InvalidFile(f"`{file.filename}`, {where}{first.message}", param="training_file")
    tokens = builder.build()
    save_tokens(tokens, path)
    return tokens


def reader_for(spec: JobSpec, base: Base, scan: Scan, renderer: Renderer) -> RowReader:
    """A reader by the job's rules."""
    return RowReader(scan, renderer, length_limit(spec, base), cut=spec.options.long_rows == "cut")


def tokens_name(file: File, base: Base, spec: JobSpec) -> str:
    """A name for the tokens of a file that changes with everything they depend on."""
    options = spec.options
    facts = (
        f"{file.sha256} {base.sha256} {length_limit(spec, base)} {options.loss_on} {options.long_rows} {spec.method}"
    )
    return f"tokens-{hashlib.sha256(facts.encode()).hexdigest()[:24]}.npz"


def save_tokens(tokens: Tokens | PreferenceTokens, path: Path) -> None:
    """Write whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}-{secrets.token_hex(4)}.npz")
    if isinstance(tokens, Tokens):
        arrays = _arrays(tokens)
    else:
        arrays = _arrays(tokens.chosen, "chosen_") | _arrays(tokens.rejected, "rejected_")
        arrays["prompt_lengths"] = tokens.prompt_lengths
    np.savez(draft, **arrays)
    os.replace(draft, path)


def read_tokens(path: Path) -> Tokens | PreferenceTokens:
    with np.load(path, allow_pickle=False) as arrays:

        def tokens(prefix: str = "") -> Tokens:
            return Tokens(arrays[f"{prefix}ids"], arrays[f"{prefix}learned"], arrays[f"{prefix}offsets"])

        if "prompt_lengths" not in arrays:
            return tokens()
        return PreferenceTokens(tokens("chosen_"), tokens("rejected_"), arrays["prompt_lengths"])


def _arrays(tokens: Tokens, prefix: str = "") -> dict[str, np.ndarray]:
    return {f"{prefix}ids": tokens.ids, f"{prefix}learned": tokens.learned, f"{prefix}offsets": tokens.offsets}


def drop_old_drafts(folder: Path, *, older_than_s: float = 3600.0) -> None:
    """Remove what interrupted writers left behind."""
    for draft in folder.glob(".*"):
        if draft.is_file() and time.time() - draft.stat().st_mtime > older_than_s:
            draft.unlink(missing_ok=True)
