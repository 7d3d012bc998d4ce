"""The order in which rows are learned: a pure function of seed and epoch, so that a resumed run sees the same rows.

Rows of like length share a batch, which keeps padding small; the batches of an epoch come in random order.
"""

from collections.abc import Iterator, Sequence

import numpy as np

# Batches whose rows are sorted by length together. More: less padding, less chance in who meets whom.
_POOL = 16


class Batches:
    """The micro-batches of the current epoch as lists of row numbers; a `batch_sampler` of torch's DataLoader.

    A batch is one optimizer step: `batch_size` rows, the last of an epoch perhaps fewer. It is cut into micro-batches
    of `micro_size` rows, which divides `batch_size`.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, micro_size: int, seed: int) -> None:
        assert batch_size % micro_size == 0
        self._lengths = np.asarray(lengths)
        self._batch_size = batch_size
        self._micro_size = micro_size
        self._seed = seed
        self._epoch = 0
        self._tokens: tuple[int, np.ndarray] | None = None

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self._lengths) // self._batch_size)

    def __len__(self) -> int:
        return -(-len(self._lengths) // self._micro_size)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.epoch(self._epoch):
            for start in range(0, len(batch), self._micro_size):
                yield batch[start : start + self._micro_size].tolist()

    def epoch(self, epoch: int) -> list[np.ndarray]:
        """The batches of one epoch. Only the last may be short: what remains after whole batches."""
        rng = np.random.default_rng((self._seed, epoch))
        order = rng.permutation(len(self._lengths))
        whole = len(order) - len(order) % self._batch_size
        batches = []
        for start in range(0, whole, _POOL * self._batch_size):
            pool = order[start : min(start + _POOL * self._batch_size, whole)]
            pool = pool[np.argsort(-self._lengths[pool], kind="stable")]
            batches += np.split(pool, len(pool) // self._batch_size)
        batches = [batches[index] for index in rng.permutation(len(batches))]
        return [*batches, order[whole:]] if whole < len(order) else batches

    def tokens_until(self, step: int) -> int:
        """Tokens in the first `step` batches of the run, padding not counted."""
        epoch, rest = divmod(step, self.steps_per_epoch)
        if self._tokens is None or self._tokens[0] != epoch:
            counts = [0, *(int(self._lengths[batch].sum()) for batch in self.epoch(epoch))]
            self._tokens = (epoch, np.cumsum(counts))
        return epoch * int(self._lengths.sum()) + int(self._tokens[1][rest])
