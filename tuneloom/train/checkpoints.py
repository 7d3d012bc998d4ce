"""States of a run on local disk, from which it goes on. Knows files and their hashes; what is in them is the trainer's.

A state appears under its name only when it is whole and on disk, and is verified before it is used. One that a power
cut has damaged is passed over for the one before. Where the disk may go with its machine, each is stored besides.
"""

import contextlib
import hashlib
import json
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuneloom.store.base import BlobNotFound
from tuneloom.train.states import SEAL, STATE_NAME, StoredStates

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SavedState:
    """A verified state. `facts` is what was given to `save`."""

    step: int
    path: Path
    facts: dict[str, Any]


class Checkpoints:
    """The states of one job in `folder`; the newest `keep` remain. `stored` has them in the blob store besides."""

    def __init__(self, folder: Path, keep: int, stored: StoredStates | None = None) -> None:
        self._folder = folder
        self._keep = keep
        self._stored = stored

    def save(self, step: int, write: Callable[[Path], None], facts: dict[str, Any]) -> Path:
        """Let `write` fill a folder and keep it as the state at `step`; a whole one that is there already stays."""
        target = self._folder / STATE_NAME.format(step)
        if self._read(target) is None:
            with self._draft() as draft:
                write(draft)
                _seal(draft, step, facts)
                self._install(draft, target)
        if self._stored is not None:
            self._stored.put(target)
        self._prune()
        return target

    def latest(self) -> SavedState | None:
        """The newest whole state, fetched if only the blob store has it; None where a run must start over.

        Removes what killed processes left half written, so no other process may be saving.
        """
        for draft in self._folder.glob(".draft-*"):
            shutil.rmtree(draft, ignore_errors=True)
        here = self._newest_here()
        for step in [] if self._stored is None else self._stored.steps():
            if here is not None and step <= here.step:
                break
            if (state := self._fetch(step)) is not None:
                return state
        return here

    def drop_stored(self) -> None:
        """Remove the states from the blob store: the job has ended."""
        if self._stored is not None:
            self._stored.drop()

    def _newest_here(self) -> SavedState | None:
        for path in self._names():
            if (state := self._read(path)) is not None:
                return state
            logger.warning("checkpoint passed over, it is not whole: %s", path.name)
        return None

    def _fetch(self, step: int) -> SavedState | None:
        assert self._stored is not None, "only stored states are fetched"
        target = self._folder / STATE_NAME.format(step)
        with self._draft() as draft:
            try:
                self._stored.fetch(step, draft)
            except BlobNotFound:
                return None
            if self._read(draft) is None:
                logger.warning("stored checkpoint passed over, it is not whole: %s", target.name)
                return None
            self._install(draft, target)
        return self._read(target)

    @contextlib.contextmanager
    def _draft(self) -> Iterator[Path]:
        """An empty folder that is gone at the end unless it was installed."""
        self._folder.mkdir(parents=True, exist_ok=True)
        draft = self._folder / f".draft-{secrets.token_hex(6)}"
        draft.mkdir()
        try:
            yield draft
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def _install(self, draft: Path, target: Path) -> None:
        shutil.rmtree(target, ignore_errors=True)
        os.rename(draft, target)
        _sync(self._folder)

    def _names(self) -> list[Path]:
        return sorted(self._folder.glob("step-*"), reverse=True)

    def _prune(self) -> None:
        for path in self._names()[self._keep :]:
            shutil.rmtree(path, ignore_errors=True)

    def _read(self, path: Path) -> SavedState | None:
        try:
            seal = json.loads((path / SEAL).read_bytes())
            whole = all(_sha256(path / name) == sha256 for name, sha256 in seal["files"].items())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return SavedState(seal["step"], path, seal["facts"]) if whole else None


def _seal(draft: Path, step: int, facts: dict[str, Any]) -> None:
    files = {}
    for path in sorted(draft.rglob("*")):
        if path.is_file():
            files[path.relative_to(draft).as_posix()] = _sha256(path)
        _sync(path)
    seal = draft / SEAL
    seal.write_text(json.dumps({"step": step, "facts": facts, "files": files}))
    _sync(seal)
    _sync(draft)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        # Some file systems cannot sync a folder; then the rename alone must do.
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
