"""A run's newest states in the blob store, from which it goes on where the local disk has gone with its machine.

A state's seal is stored last: one without is none. Its hashes are verified when it comes back.
"""

import shutil
from pathlib import Path

from tuneloom.store.base import Blobs

# A state is a folder of this name and its step; the seal in it lists the other files.
STATE_NAME = "step-{:08d}"
SEAL = "checkpoint.json"
KEPT = 2
CHUNK_BYTES = 1 << 20


def states_prefix(job_id: str) -> str:
    return f"jobs/{job_id}/states"


class StoredStates:
    """The states of one job under `prefix`; the newest two remain."""

    def __init__(self, blobs: Blobs, prefix: str) -> None:
        self._blobs = blobs
        self._prefix = prefix

    def put(self, state: Path) -> None:
        """Store a sealed state folder. One that is there whole stays as it is."""
        name = state.name
        if name not in self._whole():
            # What an interrupted process left of this step has other bytes, and blobs never change.
            self._delete(name)
            files = sorted(path.relative_to(state).as_posix() for path in state.rglob("*") if path.is_file())
            for file in sorted(files, key=lambda each: each == SEAL):
                self._blobs.write(f"{self._prefix}/{name}/{file}", state / file)
        for old in self._whole()[KEPT:]:
            self._delete(old)

    def steps(self) -> list[int]:
        """Those of the whole states, newest first."""
        return [int(name.rpartition("-")[2]) for name in self._whole()]

    def fetch(self, step: int, folder: Path) -> None:
        """Copy the state at `step` into `folder`. Raises BlobNotFound if another process removes it meanwhile."""
        prefix = f"{self._prefix}/{STATE_NAME.format(step)}"
        for blob in self._blobs.list(prefix):
            path = folder / blob.key.removeprefix(f"{prefix}/")
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._blobs.open(blob.key) as source, path.open("wb") as target:
                shutil.copyfileobj(source, target, CHUNK_BYTES)

    def drop(self) -> None:
        for blob in self._blobs.list(self._prefix):
            self._blobs.delete(blob.key)

    def _whole(self) -> list[str]:
        """Names of the states that have a seal, newest first."""
        seals = [blob.key for blob in self._blobs.list(self._prefix) if blob.key.endswith(f"/{SEAL}")]
        return sorted((key.removeprefix(f"{self._prefix}/").partition("/")[0] for key in seals), reverse=True)

    def _delete(self, name: str) -> None:
        # The seal first: half a state must not look like a whole one.
        blobs = self._blobs.list(f"{self._prefix}/{name}")
        for blob in sorted(blobs, key=lambda each: not each.key.endswith(f"/{SEAL}")):
            self._blobs.delete(blob.key)
