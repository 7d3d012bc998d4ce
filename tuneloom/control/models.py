"""Models and Versions: registered, activated, rolled back, imported. Each change is one commit.

A change that meets another one reads again and decides again, a bounded number of times.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tuneloom.bases import Base, linear_shapes
from tuneloom.control import audit, outbox
from tuneloom.control.retry import retry
from tuneloom.domain import (
    Actor,
    AdapterRef,
    AuditTarget,
    Checkpoint,
    Fidelity,
    Job,
    Model,
    Registration,
    Version,
    check_model_name,
    ft_name,
    model_id,
    model_name,
    new_id,
    short_id,
    version_id,
)
from tuneloom.errors import Conflict, InvalidRequest, ModelNotFound
from tuneloom.store import Store
from tuneloom.store.artifacts import Manifest, check_adapter, put_adapter
from tuneloom.store.base import Create, Write
from tuneloom.store.names import find_named
from tuneloom.store.records import Records, Stored


def get_model(records: Records, owner: str, name: str) -> Stored[Model]:
    """Raises ModelNotFound unless `owner` has a Model of that bare name."""
    found = find_named(records, owner, name)
    if found is None or found.model is None or not found.is_bare:
        raise ModelNotFound.named(name)
    return found.model


def list_models(records: Records, owner: str) -> list[Model]:
    return [stored.value for stored in records.models.query({"owner": owner}, order_by="name")]


def list_versions(records: Records, owner: str, model: str | None = None) -> list[Version]:
    """The Versions of an owner, or of one Model, by name and number."""
    where = {"owner": owner} if model is None else {"owner": owner, "model": model}
    versions = [stored.value for stored in records.versions.query(where)]
    return sorted(versions, key=lambda version: (version.model, version.number))


@dataclass(frozen=True)
class Addition:
    """A new Version, and the writes that make it, bump its Model and tell of it."""

    version: Version
    writes: tuple[Write, ...]


def add_version(
    records: Records,
    *,
    owner: str,
    name: str,
    base: str,
    adapter: AdapterRef,
    unique: str,
    suffix: str | None,
    at: float,
    job_id: str | None = None,
    metrics: dict[str, float] | None = None,
    fidelity: Fidelity | None = None,
    fidelity_note: str | None = None,
    wanted_number: int = 0,
    activate: bool = False,
) -> Addition:
    """The next Version of `name`, making the Model if there is none. The first ready one is active; later ones wait
    unless `activate` is set. It has `wanted_number` if that is above all numbers which there have been.

    Raises:
        InvalidRequest: the Model is on another base.
    """
    stored = records.models.find(model_id(owner, name))
    number = max(wanted_number, 1 if stored is None else stored.value.next_version)
    if stored is None:
        model = Model(id=model_id(owner, name), owner=owner, name=name, base=base, created_at=at)
    else:
        model = stored.value
        check_same_base(model, base)
    active = number if activate or model.active is None else model.active
    model = model.model_copy(update={"next_version": number + 1, "active": active})
    write: Write = records.models.create(model) if stored is None else records.models.replace(stored, model)
    version = Version(
        id=version_id(owner, name, number),
        owner=owner,
        model=name,
        number=number,
        base=base,
        ft_name=ft_name(base, owner, suffix, unique),
        adapter=adapter,
        created_at=at,
        job_id=job_id,
        metrics=metrics or {},
        fidelity=fidelity,
        fidelity_note=fidelity_note,
    )
    told = outbox.version_created(records, version, at)
    if active == number:
        before = None if stored is None else stored.value.active
        # A little later, so that its number says which of the two came first.
        told += outbox.version_activated(records, owner, name, number, before, at + 2e-6)
    return Addition(version, (write, records.versions.create(version), *told))


def check_same_base(model: Model, base: str, *, param: str = "suffix") -> None:
    if model.base != base:
        raise InvalidRequest(
            f"The model `{model.name}` is on the base `{model.base}`, not `{base}`. "
            "Choose another name, or delete that model first.",
            param=param,
            code="model_base_mismatch",
        )


def register(records: Records, job: Job, manifest: Manifest, at: float) -> Addition:
    """The Version that a finished job makes, with the row that lets it make only one.

    The caller commits the writes together with the job's end.
    """
    addition = add_version(
        records,
        owner=job.owner,
        name=model_name(job.spec, job.id),
        base=job.spec.base,
        adapter=manifest.adapter,
        unique=short_id(job.id),
        suffix=job.spec.suffix,
        at=at,
        job_id=job.id,
        metrics=manifest.metrics,
        fidelity=manifest.fidelity,
        fidelity_note=manifest.fidelity_note,
    )
    row = Registration(id=job.id, owner=job.owner, version_id=addition.version.id)
    data = {"job": job.id, "base": job.spec.base, "sha256": manifest.adapter.sha256}
    entry = audit.entry(audit.SYSTEM, "model.version.created", version_target(addition.version), data)
    return Addition(addition.version, (*addition.writes, records.registrations.create(row), entry))


def activate(records: Records, owner: str, name: str, number: int, actor: Actor | None = None) -> Model:
    """Make Version `number` the one that the bare name calls.

    Without an `actor` it is who runs this process, here as in all that follows.

    Raises:
        ModelNotFound: no such Model, or it has no such Version.
    """

    def once() -> Model:
        model, writes = _draft_activation(records, owner, name, number, "activated", actor)
        records.commit(*writes)
        return model

    return retry(once)


def rollback(records: Records, owner: str, name: str, actor: Actor | None = None) -> Model:
    """Activate the highest Version below the active one.

    Raises:
        Conflict: there is none.
    """

    def once() -> Model:
        model, writes = draft_rollback(records, owner, name, actor)
        records.commit(*writes)
        return model

    return retry(once)


def draft_rollback(records: Records, owner: str, name: str, actor: Actor | None = None) -> tuple[Model, list[Write]]:
    """The Model one Version back, and the writes that make it so."""
    active = get_model(records, owner, name).value.active or 0
    lower = [version.number for version in list_versions(records, owner, name) if version.number < active]
    if not lower:
        raise Conflict(f"The model `{name}` has no version before the active one.", code="no_earlier_version")
    return _draft_activation(records, owner, name, max(lower), "rolled_back", actor)


def import_adapter(
    store: Store, owner: str, base: Base, name: str, folder: Path, *, max_rank: int, actor: Actor | None = None
) -> Version:
    """Add an adapter that was trained elsewhere as the next Version of `name`.

    Raises:
        AdapterRejected: the folder is not a LoRA adapter that fits `base`; the message says why.
    """
    addition = draft_import(store, owner, base, name, folder, max_rank=max_rank, actor=actor)

    def once() -> Version:
        again = addition()
        store.records.commit(*again.writes)
        return again.version

    return retry(once)


def draft_import(
    store: Store,
    owner: str,
    base: Base,
    name: str,
    folder: Path,
    *,
    max_rank: int,
    metrics: dict[str, float] | None = None,
    wanted_number: int = 0,
    activate: bool = False,
    actor: Actor | None = None,
) -> Callable[[], Addition]:
    """Check and upload an adapter; the result makes the writes that add it, anew at each call."""
    check_model_name(name, param="name")
    check_adapter(folder, base.id, linear_shapes(base), max_rank)
    existing = store.records.models.find(model_id(owner, name))
    if existing is not None:
        check_same_base(existing.value, base.id, param="name")
    unique = new_id("import-")
    adapter = put_adapter(store.blobs, f"imports/{unique}", folder)

    def add() -> Addition:
        addition = add_version(
            store.records,
            owner=owner,
            name=name,
            base=base.id,
            adapter=adapter,
            unique=short_id(unique),
            suffix=name,
            at=time.time(),
            metrics=metrics,
            wanted_number=wanted_number,
            activate=activate,
        )
        data = {"base": base.id, "sha256": adapter.sha256}
        entry = audit.entry(actor or audit.cli_actor(), "model.imported", version_target(addition.version), data)
        return Addition(addition.version, (*addition.writes, entry))

    return add


def _draft_activation(
    records: Records, owner: str, name: str, number: int, participle: str, actor: Actor | None
) -> tuple[Model, list[Write]]:
    stored = get_model(records, owner, name)
    version = records.versions.find(version_id(owner, name, number))
    if version is None:
        raise ModelNotFound.named(f"{name}@v{number}")
    model = stored.value.model_copy(update={"active": number})
    told = outbox.version_activated(records, owner, name, number, stored.value.active, time.time())
    moved = {"active": {"from": stored.value.active, "to": number}}
    action = f"model.version.{participle}"
    entry = audit.entry(actor or audit.cli_actor(), action, version_target(version.value), moved)
    # The Version is written too, unchanged: deleting it at the same moment then conflicts.
    kept = records.versions.replace(version, version.value)
    return model, [records.models.replace(stored, model), kept, *told, entry]


def download_entry(actor: Actor, holder: Version | Checkpoint, **data: object) -> Create:
    """The entry of the audit log of an adapter that was given out."""
    if isinstance(holder, Version):
        return audit.entry(actor, "model.version.downloaded", version_target(holder), data)
    target = AuditTarget(owner=holder.owner, type="checkpoint", id=holder.id, name=holder.name)
    return audit.entry(actor, "checkpoint.downloaded", target, data)


def version_target(version: Version) -> AuditTarget:
    return AuditTarget(owner=version.owner, type="model.version", id=version.id, name=version.pinned_name)
