"""A name and a caller become a Target: an immutable adapter by its hash. Behind it nothing knows the name.

Nothing is cached: an activation counts from the next request on. What is foreign looks like what is absent.
"""

from collections.abc import Mapping

from tuneloom.domain import Principal, Target
from tuneloom.errors import ModelNotFound
from tuneloom.store.names import MAX_NAME, find_named
from tuneloom.store.records import Records


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
        named = find_named(self._records, principal.owner, name)
        if named is None:
            raise ModelNotFound.named(name if len(name) <= MAX_NAME else name[:MAX_NAME] + "...")
        if named.checkpoint is not None:
            checkpoint = named.checkpoint.value
            return Target(name=name, base=checkpoint.base, adapter=checkpoint.adapter, version=name)
        if named.version is None:
            raise ModelNotFound(
                f"The model `{name}` has no active version. Fine-tune it, or activate one of its versions.",
                param="model",
            )
        version = named.version.value
        return Target(name=name, base=version.base, adapter=version.adapter, version=version.id)
