"""A folder that appears under its name only when it is whole. Knows nothing of what is in it."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from tuneloom.errors import Conflict


@contextlib.contextmanager
def draft_folder(target: Path) -> Iterator[Path]:
    """An empty folder beside `target` that takes its name when the block ends without an error.

    What a killed process left there is replaced by the next one with the same target.

    Raises:
        Conflict: `target` is there, or another process is making it.
    """
    target = target.absolute()
    _check_free(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.draft")
    draft.mkdir(exist_ok=True)
    lock = os.open(draft, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Conflict(f"Another process is writing {target}. Wait for it, or choose another folder.") from error
        try:
            _clear(draft)
            yield draft
            _check_free(target)
            _sync(draft)
            draft.rename(target)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
    finally:
        os.close(lock)


def _check_free(target: Path) -> None:
    if target.exists():
        raise Conflict(f"{target} is there already. Remove it, or choose another folder with `--to`.")


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _sync(folder: Path) -> None:
    """A power cut must not leave a whole name with holes in its files."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
