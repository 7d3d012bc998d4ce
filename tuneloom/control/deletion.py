"""Models, Versions and checkpoints, deleted: the records first, then the blobs that no other record names."""

import time

from tuneloom.control import audit, outbox
from tuneloom.control.models import list_versions, version_target
from tuneloom.control.retry import retry
from tuneloom.domain import TERMINAL, UNFINISHED, Actor, AuditTarget, Checkpoint, Model, Version, model_id
from tuneloom.errors import Conflict, ModelNotFound
from tuneloom.store import Store
from tuneloom.store.base import Write
from tuneloom.store.names import find_named
from tuneloom.store.records import Records, Stored

# One commit takes 400 writes; a Version goes together with the checkpoints of its job up to this many.
MAX_DELETED = 300


def delete(store: Store, owner: str, name: str, actor: Actor | None = None) -> None:
    """Delete what a name stands for: a Model with all Versions, one Version, or one checkpoint of a finished job.

    A Version takes the checkpoints of its job with it. When the active one goes, the highest that is left is active.

    Raises:
        ModelNotFound: there is no such thing of this owner's.
        Conflict: the checkpoint belongs to a job that is not finished.
    """
    # Outside the retried function: a pass that conflicts late has deleted some already.
    prefixes: list[str] = []
    retry(lambda: _delete_records(store.records, owner, name, prefixes, actor or audit.cli_actor()))
    for prefix in prefixes:
        _drop_adapter(store, prefix)


def _drop_adapter(store: Store, prefix: str) -> None:
    """Remove the blobs under an adapter's prefix unless a record still refers to them."""
    where = {"adapter.uri": prefix}
    if store.records.versions.query(where, limit=1) or store.records.checkpoints.query(where, limit=1):
        return
    for blob in store.blobs.list(prefix):
        store.blobs.delete(blob.key)


def _delete_records(records: Records, owner: str, name: str, prefixes: list[str], actor: Actor) -> None:
    """Delete the records that `name` stands for, adding the blob prefixes that they named to `prefixes`."""
    found = find_named(records, owner, name)
    if found is None:
        raise ModelNotFound.named(name)
    if found.checkpoint is not None:
        _delete_checkpoint(records, found.checkpoint, prefixes, actor)
    elif found.is_bare:
        assert found.model is not None
        _delete_model(records, found.model, prefixes, actor)
    else:
        assert found.version is not None
        _delete_version(records, found.version, prefixes, actor)


def _delete_model(records: Records, model: Stored[Model], prefixes: list[str], actor: Actor) -> None:
    """Delete a Model with all Versions: in one commit, unless it has hundreds."""
    versions = records.versions.query({"owner": model.value.owner, "model": model.value.name})
    _check_unused(records, model.value.owner, {version.value.adapter.uri for version in versions})
    writes: list[Write] = []
    uris: list[str] = []
    for version in versions:
        checkpoints = _checkpoints_of(records, version.value)
        more = [records.versions.delete(version), *(records.checkpoints.delete(c) for c in checkpoints)]
        if len(writes) + len(more) > MAX_DELETED:
            records.commit(*writes, _deletion(model.value, len(uris), actor, is_whole=False))
            prefixes += uris
            writes, uris = [], []
        writes += more
        uris += [version.value.adapter.uri, *(c.value.adapter.uri for c in checkpoints)]
    records.commit(*writes, records.models.delete(model), _deletion(model.value, len(uris), actor, is_whole=True))
    prefixes += uris


def _delete_version(records: Records, version: Stored[Version], prefixes: list[str], actor: Actor) -> None:
    gone = version.value
    checkpoints = _checkpoints_of(records, gone)
    _check_unused(records, gone.owner, {gone.adapter.uri, *(c.value.adapter.uri for c in checkpoints)})
    writes: list[Write] = [records.versions.delete(version), *(records.checkpoints.delete(c) for c in checkpoints)]
    model = records.models.find(model_id(gone.owner, gone.model))
    if model is not None:
        heir = model.value.active
        if heir == gone.number:
            left = [v.number for v in list_versions(records, gone.owner, gone.model) if v.number != gone.number]
            heir = max(left, default=None)
        # Written even if nothing changes: of two Versions deleted at once, neither may inherit from the other.
        writes.append(records.models.replace(model, model.value.model_copy(update={"active": heir})))
        if heir is not None:
            before = model.value.active
            writes += outbox.version_activated(records, gone.owner, gone.model, heir, before, time.time())
    entry = audit.entry(actor, "model.version.deleted", version_target(gone), {"adapters": 1 + len(checkpoints)})
    records.commit(*writes, entry)
    prefixes += [gone.adapter.uri, *(c.value.adapter.uri for c in checkpoints)]


def _check_unused(records: Records, owner: str, uris: set[str]) -> None:
    """Refuse to delete an adapter that an unfinished job is to train on."""
    for state in UNFINISHED:
        for job in records.jobs.query({"owner": owner, "state": state}):
            start = job.value.spec.warm_start
            if start is not None and start.uri in uris:
                raise Conflict(
                    f"The job `{job.value.id}`, which is `{state}`, goes on from it. "
                    "Cancel the job or wait for its end.",
                    code="model_in_use",
                )


def _checkpoints_of(records: Records, version: Version) -> list[Stored[Checkpoint]]:
    if version.job_id is None:
        return []
    return records.checkpoints.query({"owner": version.owner, "job_id": version.job_id}, limit=MAX_DELETED - 2)


def _delete_checkpoint(records: Records, checkpoint: Stored[Checkpoint], prefixes: list[str], actor: Actor) -> None:
    job = records.jobs.find(checkpoint.value.job_id)
    if job is not None and job.value.state not in TERMINAL:
        raise Conflict(
            f"The checkpoint belongs to the job `{job.value.id}`, which may resume from it. Cancel the job first.",
            code=job.value.state,
        )
    _check_unused(records, checkpoint.value.owner, {checkpoint.value.adapter.uri})
    gone = checkpoint.value
    target = AuditTarget(owner=gone.owner, type="checkpoint", id=gone.id, name=gone.name)
    records.commit(records.checkpoints.delete(checkpoint), audit.entry(actor, "checkpoint.deleted", target))
    prefixes.append(checkpoint.value.adapter.uri)


def _deletion(model: Model, adapters: int, actor: Actor, *, is_whole: bool) -> Write:
    """The entry of one of the commits in which a Model goes; the last one takes the Model itself."""
    target = AuditTarget(owner=model.owner, type="model", id=model.id, name=model.name)
    return audit.entry(actor, "model.deleted", target, {"adapters": adapters, "whole": is_whole})
