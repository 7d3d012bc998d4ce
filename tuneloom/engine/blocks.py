"""Numbers of the blocks of a pool, and who holds each. Integers only: no keys or values, no hashes.

A block is free, kept (the prefix index remembers it), used by sequences, or both of the latter. A kept block that no
sequence uses is idle: it goes, least recently used first, when its room is needed.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

# Tokens of a block. Smaller blocks share more of a prefix; each costs a copy and a hash of its own.
BLOCK_TOKENS = 16


@dataclass
class BlockPool:
    """`num_blocks` blocks from `first` on.

    `evict` drops one idle block and returns whether there was one; the prefix index sets it.
    """

    num_blocks: int
    first: int = 0
    evict: Callable[[], bool] = lambda: False
    _free: list[int] = field(default_factory=list)
    _users: list[int] = field(default_factory=list)
    _is_kept: list[bool] = field(default_factory=list)
    _num_idle: int = 0

    def __post_init__(self) -> None:
        # The lowest are taken first, and those given back before all others: their memory has been touched.
        self._free = list(range(self.first + self.num_blocks - 1, self.first - 1, -1))
        self._users = [0] * (self.first + self.num_blocks)
        self._is_kept = [False] * (self.first + self.num_blocks)

    @property
    def num_free(self) -> int:
        """Blocks that `take` can give, idle ones included."""
        return len(self._free) + self._num_idle

    @property
    def num_idle(self) -> int:
        return self._num_idle

    def is_idle(self, block: int) -> bool:
        return self._is_kept[block] and not self._users[block]

    def take(self) -> int | None:
        """A block with one user, or None."""
        if not self._free and not (self._num_idle and self.evict()):
            return None
        block = self._free.pop()
        self._users[block] = 1
        return block

    def use(self, block: int) -> None:
        """One more sequence uses a block that is kept or used."""
        assert self._is_kept[block] or self._users[block]
        self._num_idle -= self.is_idle(block)
        self._users[block] += 1

    def drop(self, block: int) -> None:
        """One user less; the last one frees a block that is not kept."""
        assert self._users[block] > 0
        self._users[block] -= 1
        self._num_idle += self.is_idle(block)
        self._free_unheld(block)

    def keep(self, block: int) -> None:
        """The prefix index remembers a block that is in use."""
        assert self._users[block] and not self._is_kept[block]
        self._is_kept[block] = True

    def forget(self, block: int) -> None:
        assert self._is_kept[block]
        self._num_idle -= self.is_idle(block)
        self._is_kept[block] = False
        self._free_unheld(block)

    def _free_unheld(self, block: int) -> None:
        if not self._users[block] and not self._is_kept[block]:
            self._free.append(block)
