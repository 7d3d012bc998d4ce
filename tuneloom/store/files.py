"""Blobs as files in a folder of one machine or of a shared disk. Knows no artifacts, only keys and bytes."""

import contextlib
import hashlib
import os
import secrets
import stat
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from tuneloom.errors import InvalidRequest, Overloaded, TuneloomError
from tuneloom.store.base import BlobCorrupt, BlobExists, BlobInfo, BlobNotFound
from tuneloom.store.limits import check_key

CHUNK_BYTES = 1 << 20
STALE_DRAFT_S = 24 * 3600.0
MAX_TRIES = 1000


class FileBlobs:
    """`Blobs` under `folder`: a blob is `folder/data/KEY`; what is not whole yet is in `folder/drafts`.

    A draft is synced to disk and then linked to its key, so a key never shows half a file, also not after a power
    cut. Drafts of processes that died are removed a day later. Nothing is read or written through a symbolic link.
    """

    def __init__(self, folder: Path | str) -> None:
        root = Path(folder).absolute()
        self._data = root / "data"
        self._drafts = root / "drafts"
        for path in (self._data, self._drafts):
            path.mkdir(parents=True, exist_ok=True)
        self._sweep()

    def write(self, key: str, source: bytes | Path | Iterable[bytes], *, sha256: str | None = None) -> str:
        path = self._path(key)
        draft = self._drafts / secrets.token_hex(16)
        try:
            actual = _write_draft(draft, source)
            if sha256 is not None and actual != sha256:
                raise BlobCorrupt(f"The bytes for `{key}` hash to `{actual}`, not to `{sha256}` as promised.")
            self._publish(draft, key, path, actual)
        finally:
            draft.unlink(missing_ok=True)
        return actual

    def open(self, key: str) -> BinaryIO:
        path = self._path(key)
        try:
            # O_NONBLOCK: a pipe in the place of a blob must not stop us.
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise BlobNotFound(f"There is no blob `{key}`.") from error
        except OSError as error:
            raise TuneloomError(f"The blob `{key}` cannot be opened: {error.strerror}.") from error
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise BlobNotFound(f"There is no blob `{key}`.")
        return os.fdopen(descriptor, "rb")

    def read(self, key: str) -> bytes:
        with self.open(key) as file:
            return file.read()

    def find(self, key: str) -> BlobInfo | None:
        return _info(key, self._path(key))

    def list(self, prefix: str) -> list[BlobInfo]:
        folder = self._path(prefix)
        return [] if folder.is_symlink() else list(_walk(f"{prefix}/", folder))

    def walk(self) -> Iterator[BlobInfo]:
        return _walk("", self._data)

    def delete(self, key: str) -> None:
        path = self._path(key)
        if _info(key, path) is None:
            return
        path.unlink(missing_ok=True)
        for folder in self._folders(path):
            try:
                folder.rmdir()
            except OSError:
                # The first that holds something, or that another process has removed and made again.
                with contextlib.suppress(FileNotFoundError):
                    _sync(folder)
                return
        _sync(self._data)

    def _path(self, key: str) -> Path:
        path = self._data / check_key(key)
        for folder in self._folders(path):
            if folder.is_symlink():
                raise TuneloomError(f"The blob `{key}` is behind a symbolic link. Replace the link by a real folder.")
        return path

    def _folders(self, path: Path) -> tuple[Path, ...]:
        """The folders between the data folder and `path`, the nearest to `path` first."""
        return tuple(folder for folder in path.parents if self._data in folder.parents)

    def _publish(self, draft: Path, key: str, path: Path, sha256: str) -> None:
        for _ in range(MAX_TRIES):
            # Both raise when another process removes a folder that is empty between the two calls, or the blob.
            with contextlib.suppress(FileNotFoundError, FileExistsError, NotADirectoryError):
                path.parent.mkdir(parents=True, exist_ok=True)
                os.link(draft, path)
                break
            with contextlib.suppress(BlobNotFound):
                if self._sha256(key) != sha256:
                    raise BlobExists(f"The blob `{key}` exists with other bytes. Use another key.")
                break
            if path.is_dir() or any(folder.is_file() for folder in self._folders(path)):
                raise InvalidRequest(f"The blob key `{key}` is inside or above another blob. Use another key.")
        else:
            raise Overloaded(f"Too many processes write and delete `{key}`. Try again.", retry_after_s=1.0)
        # The whole chain, also for a blob that was there: its writer may have died before its own sync.
        for folder in (*self._folders(path), self._data):
            with contextlib.suppress(FileNotFoundError):
                _sync(folder)

    def _sha256(self, key: str) -> str:
        with self.open(key) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def _sweep(self) -> None:
        oldest = time.time() - STALE_DRAFT_S
        for path in self._drafts.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if path.lstat().st_mtime < oldest:
                    path.unlink()


def _info(key: str, path: Path) -> BlobInfo | None:
    try:
        status = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return BlobInfo(key, status.st_size) if stat.S_ISREG(status.st_mode) else None


def _walk(prefix: str, folder: Path) -> Iterator[BlobInfo]:
    try:
        with os.scandir(folder) as entries:
            # A folder sorts as its keys do: by its name and a slash.
            names = sorted(entry.name + "/" * entry.is_dir(follow_symlinks=False) for entry in entries)
    except (FileNotFoundError, NotADirectoryError):
        return
    for name in names:
        if name.endswith("/"):
            yield from _walk(prefix + name, folder / name)
        elif info := _info(prefix + name, folder / name):
            # What other programs leave, such as `.DS_Store (1)`, may have a name that no key has.
            with contextlib.suppress(InvalidRequest):
                check_key(info.key)
                yield info


def _write_draft(draft: Path, source: bytes | Path | Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        for chunk in _chunks(source):
            digest.update(chunk)
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _chunks(source: bytes | Path | Iterable[bytes]) -> Iterator[bytes]:
    if isinstance(source, bytes | bytearray | memoryview):
        yield bytes(source)
    elif isinstance(source, Path):
        with source.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk
    else:
        yield from source


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
