"""Decides what each step computes: which sequences run, and how many tokens of each. Integers only.

Every running sequence that decodes gets its token in every step, so none waits for another. What the step has left goes
to prompts, in order of arrival, in chunks. A waiting sequence is admitted when there is a cache slot and its adapter
holds a slot; one whose adapter is not ready lets others pass.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from tuneloom.engine.sequence import Sequence

# Prefill goes on by at least this many tokens a step, however many sequences decode.
_LEAST_PREFILL = 16
# A sequence that found no adapter slot for this long stops others from taking or keeping slots for new work.
_STARVATION_S = 2.0


@dataclass(frozen=True)
class Work:
    """One step: `decoding` sequences compute one token each, `prefilling` ones the given number."""

    decoding: list[Sequence]
    prefilling: list[tuple[Sequence, int]]

    @property
    def sequences(self) -> list[Sequence]:
        return [*self.decoding, *(sequence for sequence, _ in self.prefilling)]


@dataclass
class Scheduler:
    """The queue and the running set.

    `admit(sequence)` gives a sequence what it needs to run and returns True, or returns False and changes nothing.
    `is_starved(sequence)` tells whether only a busy adapter slot keeps it waiting.
    """

    max_running: int
    max_step_tokens: int
    admit: Callable[[Sequence], bool]
    is_starved: Callable[[Sequence], bool]
    waiting: list[Sequence] = field(default_factory=list)
    running: list[Sequence] = field(default_factory=list)

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        (self.waiting if sequence in self.waiting else self.running).remove(sequence)

    def plan(self, now: float) -> Work:
        """The work of the next step; admits waiting sequences as far as it has tokens for them."""
        decoding = sorted((s for s in self.running if s.is_decoding), key=lambda s: s.cache_slot or 0)
        left = max(self.max_step_tokens - len(decoding), min(_LEAST_PREFILL, self.max_step_tokens))
        prefilling: list[tuple[Sequence, int]] = []
        for sequence in [s for s in self.running if not s.is_decoding]:
            left = self._give(sequence, left, prefilling)
        if left > 0 and self.waiting:
            self._admit_waiting(left, prefilling, now)
        return Work(decoding, prefilling)

    def _admit_waiting(self, left: int, prefilling: list[tuple[Sequence, int]], now: float) -> None:
        admitted: list[Sequence] = []
        is_held = False
        for sequence in self.waiting:
            if left <= 0 or len(self.running) >= self.max_running:
                break
            if is_held and sequence.adapter is not None:
                continue
            if self.admit(sequence):
                sequence.starved_since = None
                admitted.append(sequence)
                self.running.append(sequence)
                left = self._give(sequence, left, prefilling)
            elif self.is_starved(sequence):
                since = sequence.starved_since = sequence.starved_since or now
                is_held = is_held or now - since >= _STARVATION_S
        if admitted:
            gone = set(map(id, admitted))
            self.waiting = [s for s in self.waiting if id(s) not in gone]

    def _give(self, sequence: Sequence, left: int, prefilling: list[tuple[Sequence, int]]) -> int:
        count = min(left, sequence.num_pending)
        if count > 0:
            prefilling.append((sequence, count))
        return left - count
