"""The order in which rows are learned: a pure function of seed and epoch, so that a resumed run sees the same rows.

Rows of like length share a batch, which keeps padding small; the batches of an epoch come in random order.
"""

from collections.abc import Iterator, Sequence

import numpy as np

# Batches whose rows are sorted by length together. More: less padding, less chance in who meets whom.
_POOL = 16


class Batches:
    """The batches of the current epoch as lists of row numbers; a `batch_sampler` of torch's DataLoader.

    A batch is one optimizer step: `batch_size` rows, the last of an epoch perhaps fewer, the longest first.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, micro_size: int, seed: int) -> None:
        self._lengths = np.asarray(lengths)
        self._batch_size = batch_size
        self._room = micro_size * int(self._lengths.max())
        self._seed = seed
        self._epoch = 0
        self._tokens: tuple[int, np.ndarray] | None = None

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self._lengths) // self._batch_size)

    def __len__(self) -> int:
        return self.steps_per_epoch

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.epoch(self._epoch):
            yield batch.tolist()

    def epoch(self, epoch: int) -> list[np.ndarray]:
        """The batches of one epoch. Only the last may be short: what remains after whole batches."""
        rng = np.random.default_rng((self._seed, epoch))
        order = rng.permutation(len(self._lengths))
        whole = len(order) - len(order) % self._batch_size
        batches = []
        for start in range(0, whole, _POOL * self._batch_size):
            pool = self._longest_first(order[start : min(start + _POOL * self._batch_size, whole)])
            batches += np.split(pool, len(pool) // self._batch_size)
        batches = [batches[index] for index in rng.permutation(len(batches))]
        return [*batches, self._longest_first(order[whole:])] if whole < len(order) else batches

    def cut(self, batch: Sequence[int], *, padded: bool) -> list[list[int]]:
        """The micro-batches of a batch: as many rows as have room where `micro_size` of the longest row have it.

        `padded`: a row takes as much room as the longest of its micro-batch.
        """
        return cut_by_tokens(batch, self._lengths, self._room, padded=padded)

    def tokens_until(self, step: int) -> int:
        """Tokens in the first `step` batches of the run, padding not counted."""
        epoch, rest = divmod(step, self.steps_per_epoch)
        if self._tokens is None or self._tokens[0] != epoch:
            counts = [0, *(int(self._lengths[batch].sum()) for batch in self.epoch(epoch))]
            self._tokens = (epoch, np.cumsum(counts))
        return epoch * int(self._lengths.sum()) + int(self._tokens[1][rest])

    def _longest_first(self, rows: np.ndarray) -> np.ndarray:
        return rows[np.argsort(-self._lengths[rows], kind="stable")]


def cut_by_tokens(rows: Sequence[int], lengths: np.ndarray, room: int, *, padded: bool) -> list[list[int]]:
    """Neighbouring `rows`, longest first, in parts of at most `room` tokens; a row above that is a part of its own."""
    parts: list[list[int]] = []
    taken = 0
    for row in rows:
        length = int(lengths[row])
        after = (len(parts[-1]) + 1) * int(lengths[parts[-1][0]]) if parts and padded else taken + length
        if not parts or after > room:
            parts.append([])
            after = length
        parts[-1].append(int(row))
        taken = after
    return parts
