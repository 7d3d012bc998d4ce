"""What a run hands over: its adapters in the blob store and the records that name them. Knows no trainer."""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tuneloom.bases import Base, linear_shapes
from tuneloom.domain import (
    UNFINISHED,
    AdapterRef,
    Checkpoint,
    Fidelity,
    Hyperparameters,
    Job,
    Setting,
    checkpoint_name,
    ft_name,
    short_id,
)
from tuneloom.store import Store
from tuneloom.store.artifacts import Manifest, check_adapter, put_adapter, read_manifest, write_manifest
from tuneloom.store.base import Blobs, StoreConflict
from tuneloom.store.lineage import write_lineage
from tuneloom.train.lineage import Witness
from tuneloom.train.progress import Voice


@dataclass(frozen=True)
class Outcome:
    """What a finished run has to tell of itself."""

    resolved: Hyperparameters
    rank: int
    steps: int
    trained_tokens: int
    metrics: dict[str, float]
    settings: tuple[Setting, ...] = ()
    fidelity: Fidelity | None = None
    fidelity_note: str | None = None


class Publisher:
    """Hands over the adapters of one attempt of a job. `clock` gives Unix seconds."""

    def __init__(
        self,
        store: Store,
        voice: Voice,
        job: Job,
        base: Base,
        witness: Witness,
        *,
        checkpoints_kept: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._voice = voice
        self._job = job
        self._base = base
        self._witness = witness
        self._kept = checkpoints_kept
        self._clock = clock

    def checkpoint(self, folder: Path, step: int, metrics: dict[str, float], rank: int) -> None:
        """Make the adapter in `folder` callable as the job's checkpoint at `step`; those beyond the last few go,
        but not while a job is to train on them.

        A checkpoint that is already there, from before a restart, stays as it is.
        """
        checkpoint_id = _checkpoint_id(self._job.id, step)
        if self._store.records.checkpoints.find(checkpoint_id) is not None:
            return
        check_adapter(folder, self._base.id, linear_shapes(self._base), rank)
        adapter = _put_fresh(self._store.blobs, f"jobs/{self._job.id}/checkpoints/step-{step}", folder)
        lineage = self._witness.testify(folder, adapter, "checkpoint", steps=step, metrics=metrics)
        write_lineage(self._store.blobs, adapter, lineage)
        spec = self._job.spec
        name = checkpoint_name(ft_name(spec.base, self._job.owner, spec.suffix, short_id(self._job.id)), step)
        record = Checkpoint(
            id=checkpoint_id,
            owner=self._job.owner,
            job_id=self._job.id,
            base=spec.base,
            step=step,
            name=name,
            created_at=self._clock(),
            adapter=adapter,
            metrics=metrics,
        )
        create = self._store.records.checkpoints.create(record)
        self._voice.say(f"Checkpoint created at step {step}", writes=(create,))
        self._drop_old()

    def version(self, folder: Path, outcome: Outcome) -> None:
        """Hand over the final adapter: files and lineage, the manifest that vouches for them, then the last word."""
        if read_manifest(self._store.blobs, self._job.artifacts) is None:
            check_adapter(folder, self._base.id, linear_shapes(self._base), outcome.rank)
            adapter = _put_fresh(self._store.blobs, f"{self._job.artifacts}/adapter", folder)
            lineage = self._witness.testify(
                folder,
                adapter,
                "version",
                steps=outcome.steps,
                metrics=outcome.metrics,
                fidelity=outcome.fidelity,
            )
            write_lineage(self._store.blobs, adapter, lineage)
            # Whoever has lost the fence must not leave a manifest.
            self._voice.say(stage="publishing")
            manifest = Manifest(
                job_id=self._job.id,
                attempt=self._job.attempt,
                base=self._job.spec.base,
                adapter=adapter,
                resolved=outcome.resolved,
                trained_tokens=outcome.trained_tokens,
                steps=outcome.steps,
                metrics=outcome.metrics,
                settings=outcome.settings,
                fidelity=outcome.fidelity,
                fidelity_note=outcome.fidelity_note,
                created_at=self._clock(),
            )
            write_manifest(self._store.blobs, self._job.artifacts, manifest)
        self._voice.say(stage="published", outcome="published", trained_tokens=outcome.trained_tokens)

    def _drop_old(self) -> None:
        table = self._store.records.checkpoints
        known = sorted(table.query({"job_id": self._job.id}), key=lambda stored: stored.value.step, reverse=True)
        old = known[self._kept :]
        # Read behind the checkpoints: a job that is created meanwhile has written the one that it names.
        needed = self._needed() if old else set()
        for stored in old:
            if stored.value.adapter.uri in needed:
                continue
            try:
                self._store.records.commit(table.delete(stored))
            except StoreConflict:
                # Somebody else removed it.
                continue
            _delete_all(self._store.blobs, stored.value.adapter.uri)

    def _needed(self) -> set[str]:
        """The adapters that unfinished jobs of this owner are to train on."""
        table, owner = self._store.records.jobs, self._job.owner
        unfinished = (s for state in UNFINISHED for s in table.query({"owner": owner, "state": state}))
        return {s.value.spec.warm_start.uri for s in unfinished if s.value.spec.warm_start is not None}


def _checkpoint_id(job_id: str, step: int) -> str:
    """The same for the same checkpoint, so that it cannot be made twice."""
    return f"ftckpt_{hashlib.sha256(f'{job_id} {step}'.encode()).hexdigest()[:24]}"


def _put_fresh(blobs: Blobs, prefix: str, folder: Path) -> AdapterRef:
    """Store an adapter where no record names one yet; what an interrupted start left there goes first."""
    _delete_all(blobs, prefix)
    return put_adapter(blobs, prefix, folder)


def _delete_all(blobs: Blobs, prefix: str) -> None:
    for blob in blobs.list(prefix):
        blobs.delete(blob.key)
