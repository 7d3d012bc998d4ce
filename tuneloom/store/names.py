"""What a name that an owner calls stands for, by the records. The one place where the spellings of names are read.

`support-bot` (its active Version), `support-bot@v2`, `ft:...` and `ft:...:ckpt-step-N`. What is foreign is not found.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from tuneloom.domain import AdapterRef, Checkpoint, Model, Version, model_id, version_id
from tuneloom.errors import InvalidRequest
from tuneloom.store.records import Records, Stored

MAX_NAME = 512
# `v01` and `v١` are not spellings of v1: one Version has one pinned name.
_PINNED = re.compile(r"(?P<model>[a-z0-9._-]{1,64})@v(?P<number>[1-9][0-9]{0,9})", re.ASCII)
_CHECKPOINT = re.compile(r"ft:.+:ckpt-step-[0-9]+", re.ASCII)


@dataclass(frozen=True)
class Named:
    """What a name stands for. A Model's bare name gives its active Version, None if it has none."""

    model: Stored[Model] | None = None
    version: Stored[Version] | None = None
    checkpoint: Stored[Checkpoint] | None = None
    is_bare: bool = False

    @property
    def model_name(self) -> str | None:
        """The bare name of the Model that it is, or is a part of."""
        if self.checkpoint is not None:
            return model_of_checkpoint(self.checkpoint.value)
        if self.version is not None:
            return self.version.value.model
        return self.model.value.name if self.model else None


def model_of_checkpoint(checkpoint: Checkpoint) -> str:
    """The Model that the checkpoint's job makes: its suffix, or what `domain.model_name` makes of its id."""
    _, suffix, unique, _ = checkpoint.name.rsplit(":", 3)
    return suffix or f"ft-{unique.lower()}"


def find_named(records: Records, owner: str, name: str) -> Named | None:
    """What `name` stands for among the things of `owner`; None if nothing of theirs."""
    if len(name) > MAX_NAME:
        return None
    if _CHECKPOINT.fullmatch(name):
        found = records.checkpoints.query({"owner": owner, "name": name}, limit=1)
        return Named(checkpoint=found[0]) if found else None
    if name.startswith("ft:"):
        versions = records.versions.query({"owner": owner, "ft_name": name}, limit=1)
        return Named(_model(records, owner, versions[0].value.model), versions[0]) if versions else None
    if pinned := _PINNED.fullmatch(name):
        version = _version(records, owner, pinned["model"], int(pinned["number"]))
        return Named(_model(records, owner, pinned["model"]), version) if version else None
    return _bare(records, owner, name)


def find_start(
    records: Records, owner: str, name: str, base: str, may_use: Callable[[str | None], bool] = lambda model: True
) -> AdapterRef:
    """The adapter of a Version or checkpoint, for a job on `base` to train on. `may_use` is asked for its Model.

    Raises:
        InvalidRequest: the owner has none of that name, or it is on another base.
    """
    param, found = "tuneloom.warm_start", find_named(records, owner, name)
    start = (found.version or found.checkpoint) if found and may_use(found.model_name) else None
    if start is None:
        raise InvalidRequest(f"`{param}`: there is no version or checkpoint `{name[:200]}`.", param=param)
    if start.value.base != base:
        raise InvalidRequest(f"`{param}`: `{name}` is on the base `{start.value.base}`, not `{base}`.", param=param)
    return start.value.adapter


def _bare(records: Records, owner: str, name: str) -> Named | None:
    # Between the two reads another Version may become active and the one before it go: look again, once.
    for _ in range(2):
        model = _model(records, owner, name)
        if model is None:
            return None
        if model.value.active is None:
            break
        if version := _version(records, owner, name, model.value.active):
            return Named(model, version, is_bare=True)
    return Named(model, is_bare=True)


def _model(records: Records, owner: str, name: str) -> Stored[Model] | None:
    stored = records.models.find(model_id(owner, name))
    # An id joins owner and name by a colon, so another owner's could read the same.
    return stored if stored and (stored.value.owner, stored.value.name) == (owner, name) else None


def _version(records: Records, owner: str, name: str, number: int) -> Stored[Version] | None:
    stored = records.versions.find(version_id(owner, name, number))
    return stored if stored and (stored.value.owner, stored.value.model) == (owner, name) else None
