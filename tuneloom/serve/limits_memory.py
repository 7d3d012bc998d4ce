"""Limits counted in this process: for one gateway, and while Redis is away."""

import time
from collections.abc import Callable, Sequence

from tuneloom.serve.limits_window import Charge, Correction, Level, Place, Taken

SWEEP_EVERY = 10_000
_NOBODY: frozenset[str] = frozenset()


class MemoryCounters:
    """Nothing waits here, so that each method is one step for all others of the loop."""

    def __init__(self, now_ms: Callable[[], int] = lambda: int(time.time() * 1000)) -> None:
        self._now_ms = now_ms
        self._windows: dict[str, tuple[int, Level]] = {}
        self._places: dict[str, set[str]] = {}
        self._until_sweep = SWEEP_EVERY

    async def take(self, charges: Sequence[Charge], places: Sequence[Place], holder: str) -> Taken:
        now_ms = self._now_ms()
        levels = [self._level(charge, now_ms) for charge in charges]
        held = tuple(len(self._places.get(place.key, _NOBODY) - {holder}) for place in places)
        is_admitted = all(
            not charge.cost or level.count(charge.size_ms) + charge.cost <= charge.limit
            for charge, level in zip(charges, levels, strict=True)
        ) and all(count < place.limit for count, place in zip(held, places, strict=True))
        if is_admitted:
            for i, charge in enumerate(charges):
                levels[i] = self._add(charge, levels[i])
            for place in places:
                self._places.setdefault(place.key, set()).add(holder)
            self._sweep(now_ms)
        return Taken(is_admitted, tuple(levels), held)

    async def settle(self, corrections: Sequence[Correction], left: Sequence[Place], holder: str) -> None:
        now_ms = self._now_ms()
        for correction in corrections:
            charge = correction.charge
            _, level = self._windows.get(charge.key, (0, Level(now_ms - 2 * charge.size_ms, 0, 0, now_ms)))
            if now_ms - level.start_ms >= 2 * charge.size_ms:
                if correction.by < 0:
                    continue
                level = Level(now_ms, 0, 0, now_ms)
            if correction.by > 0 or level.start_ms == correction.start_ms:
                corrected = Level(level.start_ms, level.before, max(0, level.used + correction.by), now_ms)
            elif level.start_ms == correction.start_ms + charge.size_ms:
                corrected = Level(level.start_ms, max(0, level.before + correction.by), level.used, now_ms)
            else:
                continue
            self._windows[charge.key] = (charge.size_ms, corrected)
        for place in left:
            holders = self._places.get(place.key, set())
            holders.discard(holder)
            if not holders:
                self._places.pop(place.key, None)

    async def hold(self, places: Sequence[Place], holder: str) -> None:
        for place in places:
            self._places.setdefault(place.key, set()).add(holder)

    def _level(self, charge: Charge, now_ms: int) -> Level:
        found = self._windows.get(charge.key)
        if found is None:
            return Level(now_ms, 0, 0, now_ms)
        level = found[1]
        return Level(level.start_ms, level.before, level.used, now_ms).rolled(charge.size_ms)

    def _add(self, charge: Charge, level: Level) -> Level:
        if charge.cost:
            level = Level(level.start_ms, level.before, level.used + charge.cost, level.now_ms)
            self._windows[charge.key] = (charge.size_ms, level)
        return level

    def _sweep(self, now_ms: int) -> None:
        """Now and then forget windows that are empty by now: whoever came once does not stay in memory."""
        self._until_sweep -= 1
        if self._until_sweep <= 0:
            self._until_sweep = max(SWEEP_EVERY, len(self._windows))
            self._windows = {
                key: (size_ms, level)
                for key, (size_ms, level) in self._windows.items()
                if now_ms - level.start_ms < 2 * size_ms
            }
