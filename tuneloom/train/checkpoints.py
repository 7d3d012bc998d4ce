"""States of a run on local disk, from which it goes on. Knows files and their hashes; what is in them is the trainer's.

A state appears under its name only when it is whole and on disk, and is verified before it is used. One that a power
cut has damaged is passed over for the one before.
"""

import contextlib
import hashlib
import json
import logging
import os
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

SEAL = "checkpoint.json"
_NAME = "step-{:08d}"


@dataclass(frozen=True)
class SavedState:
    """A verified state. `facts` is what was given to `save`."""

    step: int
    path: Path
    facts: dict[str, Any]


class Checkpoints:
    """The states of one job in `folder`; the newest `keep` remain."""

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder = folder
        self._keep = keep

    def save(self, step: int, write: Callable[[Path], None], facts: dict[str, Any]) -> Path:
        """Let `write` fill a folder and keep it as the state at `step`; a whole one that is there already stays."""
        target = self._folder / _NAME.format(step)
        if self._read(target) is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            draft = self._folder / f".draft-{secrets.token_hex(6)}"
            draft.mkdir()
            try:
                write(draft)
                _seal(draft, step, facts)
                shutil.rmtree(target, ignore_errors=True)
                os.rename(draft, target)
                _sync(self._folder)
            finally:
                shutil.rmtree(draft, ignore_errors=True)
        self._prune()
        return target

    def latest(self) -> SavedState | None:
        """The newest whole state; None where a run must start over."""
        for path in sorted(self._folder.glob("step-*"), reverse=True):
            if (state := self._read(path)) is not None:
                return state
            logger.warning("checkpoint passed over, it is not whole: %s", path.name)
        return None

    def _prune(self) -> None:
        for path in sorted(self._folder.glob("step-*"), reverse=True)[self._keep :]:
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
