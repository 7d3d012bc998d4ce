"""A job's file as arrays of token ids: built, split, and kept beside the run for the next start."""

import hashlib
import os
import secrets
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from tuneloom.bases import Base
from tuneloom.domain import File, JobSpec
from tuneloom.errors import InvalidFile
from tuneloom.rows import Scan
from tuneloom.store import Store
from tuneloom.train.reader import RowReader
from tuneloom.train.render import Example, PreferenceExample, Renderer

# A larger file is read again when training starts: the check must run in constant memory.
MAX_CACHED_BYTES = 64 << 20
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
