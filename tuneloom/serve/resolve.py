"""A name and a caller become a Target: an immutable adapter by its hash. Behind it nothing knows the name.

While the store answers, every request reads it: an activation counts from the next request on. While it does not, a
name goes where it went last. What is foreign, or not for this key, looks like what is absent.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tuneloom.domain import Principal, Target
from tuneloom.errors import ModelNotFound, TuneloomError
from tuneloom.serve.reads import Reads
from tuneloom.store.names import MAX_NAME, Named, find_named
from tuneloom.store.records import Records

MAX_REMEMBERED = 8192


@dataclass(frozen=True)
class _Resolved:
    """Where a name leads, and the Model that it belongs to; no Target: that has no active Version."""

    target: Target | None
    model: str | None
    read_at: float


class Resolver:
    """`bases` are the ids that are served; `aliases` are other names for them.

    A Target is remembered for `stale_s` after it was read, for the time when the store is away or slow.
    """

    def __init__(
        self,
        records: Records,
        bases: frozenset[str],
        aliases: Mapping[str, str],
        reads: Reads,
        *,
        stale_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._records = records
        self._bases = bases
        self._aliases = aliases
        self._reads = reads
        self._stale_s = stale_s
        self._clock = clock
        self._lock = threading.Lock()
        self._last: OrderedDict[tuple[str, str], _Resolved] = OrderedDict()

    async def resolve(self, name: str, principal: Principal) -> Target:
        """Where a call of `name` by `principal` goes.

        Raises:
            ModelNotFound: nothing of that name is theirs and for their key, or the Model has no version that could
                answer.
            Overloaded: the store does not answer, and this process has not resolved the name lately.
        """
        base = self._aliases.get(name, name)
        if base in self._bases:
            if not principal.may_use(base):
                raise _absent(name)
            return Target(name=name, base=base)
        found = await self._find(principal, name)
        if not principal.may_use(found.model):
            raise _absent(name)
        if found.target is None:
            raise ModelNotFound(
                f"The model `{name}` has no active version. Fine-tune it, or activate one of its versions.",
                param="model",
            )
        return found.target

    async def _find(self, principal: Principal, name: str) -> _Resolved:
        place = (principal.owner, name)
        try:
            return await self._reads.read(lambda: self._read(principal, name), has_older=place in self._last)
        except TuneloomError as error:
            # Read again: the read that was given up may have ended meanwhile.
            last = self._last.get(place)
            if error.status < 500 or last is None or self._clock() - last.read_at > self._stale_s:
                raise
            return last

    def _read(self, principal: Principal, name: str) -> _Resolved:
        """Runs in a thread, and keeps what it finds: its request may have stopped waiting."""
        place, read_at = (principal.owner, name), self._clock()
        named = find_named(self._records, principal.owner, name)
        if named is None:
            self._last.pop(place, None)
            raise _absent(name)
        found = _Resolved(_target(name, named), named.model_name, read_at)
        with self._lock:
            last = self._last.get(place)
            # Of two reads at once, the later one may end first.
            if last is None or last.read_at <= read_at:
                self._last[place] = found
                self._last.move_to_end(place)
            while len(self._last) > MAX_REMEMBERED:
                self._last.popitem(last=False)
        return found


def _target(name: str, named: Named) -> Target | None:
    if named.checkpoint is not None:
        checkpoint = named.checkpoint.value
        return Target(name=name, base=checkpoint.base, adapter=checkpoint.adapter, version=name)
    if named.version is not None:
        version = named.version.value
        return Target(name=name, base=version.base, adapter=version.adapter, version=version.id)
    return None


def _absent(name: str) -> ModelNotFound:
    return ModelNotFound.named(name if len(name) <= MAX_NAME else name[:MAX_NAME] + "...")
