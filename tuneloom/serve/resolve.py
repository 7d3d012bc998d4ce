"""A name and a caller become a Target: an immutable adapter by its hash. The only place where names mean something.

Nothing is cached: an activation counts from the next request on. What is foreign looks like what is absent.
"""

import re
from collections.abc import Mapping

from tuneloom.domain import AdapterRef, Model, Principal, Target, Version, model_id, version_id
from tuneloom.errors import ModelNotFound
from tuneloom.store.records import Records

MAX_NAME = 512
_PINNED = re.compile(r"(?P<model>[a-z0-9._-]{1,64})@v(?P<number>[1-9][0-9]{0,9})", re.ASCII)
_CHECKPOINT = re.compile(r"ft:.+:ckpt-step-[0-9]+")


class Resolver:
    """`bases` are the ids that are served; `aliases` are other names for them."""

    def __init__(self, records: Records, bases: frozenset[str], aliases: Mapping[str, str]) -> None:
        self._records = records
        self._bases = bases
        self._aliases = aliases

    def resolve(self, name: str, principal: Principal) -> Target:
        """Where a call of `name` by `principal` goes. Reads the store: call it in a thread.

        Raises:
            ModelNotFound: nothing of that name is theirs, or the Model has no version that could answer.
        """
        base = self._aliases.get(name, name)
        if base in self._bases:
            return Target(name=name, base=base)
        if len(name) > MAX_NAME:
            raise ModelNotFound.named(name[:MAX_NAME] + "...")
        target = self._find(name, principal.owner)
        if target is None:
            raise ModelNotFound.named(name)
        return target

    def _find(self, name: str, owner: str) -> Target | None:
        if _CHECKPOINT.fullmatch(name):
            for stored in self._records.checkpoints.query({"owner": owner, "name": name}, limit=1):
                return Target(name=name, base=stored.value.base, adapter=stored.value.adapter, version=name)
            return None
        if name.startswith("ft:"):
            for version in self._records.versions.query({"owner": owner, "ft_name": name}, limit=1):
                return _target(name, version.value)
            return None
        if pinned := _PINNED.fullmatch(name):
            found = self._version(owner, pinned["model"], int(pinned["number"]))
            return _target(name, found) if found else None
        return self._active(name, owner)

    def _active(self, name: str, owner: str) -> Target | None:
        # Between the two reads another version may become active and the one before it go: look again, once.
        for _ in range(2):
            model = self._model(owner, name)
            if model is None:
                return None
            if model.active is not None and (version := self._version(owner, name, model.active)):
                return _target(name, version)
        raise ModelNotFound(
            f"The model `{name}` has no active version. Fine-tune it, or activate one of its versions.", param="model"
        )

    def _model(self, owner: str, name: str) -> Model | None:
        stored = self._records.models.find(model_id(owner, name))
        # An id joins owner and name by a colon, so another owner's could read the same.
        return stored.value if stored and (stored.value.owner, stored.value.name) == (owner, name) else None

    def _version(self, owner: str, name: str, number: int) -> Version | None:
        stored = self._records.versions.find(version_id(owner, name, number))
        return stored.value if stored and (stored.value.owner, stored.value.model) == (owner, name) else None


def _target(name: str, version: Version) -> Target:
    adapter: AdapterRef = version.adapter
    return Target(name=name, base=version.base, adapter=adapter, version=version.id)
