"""A job's file as token ids, checked row by row while it is read, and kept beside the run for the next start."""

import hashlib
import os
import secrets
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from tuneloom.bases import Base
from tuneloom.domain import File, JobSpec
from tuneloom.errors import InvalidFile, InvalidRequest
from tuneloom.rows import Conversation, Row, Scan
from tuneloom.store import Store
from tuneloom.train.render import Example, Renderer

# A larger file is read again when training starts: the check must run in constant memory.
MAX_CACHED_BYTES = 64 << 20


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


def length_limit(spec: JobSpec, base: Base) -> int:
    """The longest row that the job may hold, in tokens."""
    return min(spec.options.max_length or base.context_length, base.context_length)


def read_examples(file: BinaryIO, scan: Scan, renderer: Renderer, limit: int) -> Iterator[tuple[Row, Example]]:
    """The rows of a file that can be learned, in order; `scan` holds what is wrong with the others."""
    for line, row in scan.rows(file):
        try:
            example = renderer.render(row)
        except InvalidRequest as error:
            scan.add(line, error.message)
            continue
        if len(example.ids) > limit:
            scan.add(line, f"The row has {len(example.ids):,} tokens; the limit is {limit:,}. Shorten or split it.")
        elif not any(example.learned[1:]):
            scan.add(line, "The row has no token to learn.")
        else:
            yield row, example


def missed_answers(row: Row, example: Example) -> int:
    """Answers that the chat template renders so that they cannot be learned (see `Codec.encode_training`)."""
    if not isinstance(row, Conversation):
        return 0
    wanted = sum(m["role"] == "assistant" and m.get("weight") != 0 for m in row.messages)
    return max(0, wanted - example.num_answers)


def load_tokens(
    store: Store, file: File, base: Base, spec: JobSpec, folder: Path, renderer: Callable[[], Renderer]
) -> Tokens:
    """The tokens of a job's file: those that the check left in `folder`, or made anew.

    Raises:
        InvalidFile: a row cannot be learned; the first is named.
    """
    path = folder / tokens_name(file, base, spec)
    if path.exists():
        return read_tokens(path)
    scan, builder = Scan(), TokensBuilder()
    with store.blobs.open(file.blob) as source:
        for _, example in read_examples(source, scan, renderer(), length_limit(spec, base)):
            builder.add(example)
    if scan.problems:
        first = scan.problems[0]
        where = f"line {first.line}: " if first.line else ""
        raise InvalidFile(f"`{file.filename}`, {where}{first.message}", param="training_file")
    tokens = builder.build()
    save_tokens(tokens, path)
    return tokens


def tokens_name(file: File, base: Base, spec: JobSpec) -> str:
    """A name for the tokens of a file that changes with everything they depend on."""
    facts = f"{file.sha256} {base.sha256} {length_limit(spec, base)} {spec.options.loss_on}"
    return f"tokens-{hashlib.sha256(facts.encode()).hexdigest()[:24]}.npz"


def save_tokens(tokens: Tokens, path: Path) -> None:
    """Write whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}-{secrets.token_hex(4)}.npz")
    np.savez(draft, ids=tokens.ids, learned=tokens.learned, offsets=tokens.offsets)
    os.replace(draft, path)


def read_tokens(path: Path) -> Tokens:
    with np.load(path, allow_pickle=False) as arrays:
        return Tokens(arrays["ids"], arrays["learned"], arrays["offsets"])


def drop_old_drafts(folder: Path, *, older_than_s: float = 3600.0) -> None:
    """Remove what interrupted writers left behind."""
    for draft in folder.glob(".*"):
        if draft.is_file() and time.time() - draft.stat().st_mtime > older_than_s:
            draft.unlink(missing_ok=True)
