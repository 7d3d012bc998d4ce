"""Which prefixes have keys and values in the cache, by the hash of what they depend on. No tensors; one thread.

A block is named by a chain hash: of its tokens, of the block before it and, at the root, of owner, adapter content and
number format. So a block is found only by the owner and the very adapter (or the bare base) that made it.

Prompts that arrive together share too: the first to compute a block claims it and all that follow in its prompt;
others whose next block is claimed are held back, and attach it once it is there.
"""

import hashlib
import json
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

from tuneloom.engine.blocks import BLOCK_TOKENS
from tuneloom.engine.kv_cache import KVCache


@dataclass(eq=False)
class Chain:
    """The blocks of one sequence. `tokens(start, end)` gives its ids.

    `adapter`: the content hash, None for the bare base. `num_saved`: leading blocks that need no look. `inserted`:
    blocks that are in the index because of this sequence.
    """

    adapter: str | None
    tokens: Callable[[int, int], Sequence[int]]
    num_saved: int = 0
    inserted: list[bytes] = field(default_factory=list)
    claims: set[bytes] = field(default_factory=set)
    is_shut: bool = False
    _hashes: list[bytes] = field(default_factory=list)

    @classmethod
    def of(
        cls, owner: str, adapter: str | None, number_format: str, tokens: Callable[[int, int], Sequence[int]]
    ) -> "Chain":
        root = json.dumps([owner, adapter, number_format]).encode()
        return cls(adapter, tokens, _hashes=[hashlib.blake2b(root, digest_size=32).digest()])

    def hash(self, index: int) -> bytes:
        """The name of block `index`, whose tokens must be known."""
        for at in range(len(self._hashes) - 1, index + 1):
            ids = array("Q", self.tokens(at * BLOCK_TOKENS, (at + 1) * BLOCK_TOKENS))
            assert len(ids) == BLOCK_TOKENS
            self._hashes.append(hashlib.blake2b(self._hashes[at] + ids.tobytes(), digest_size=32).digest())
        return self._hashes[index + 1]


@dataclass
class PrefixCounters:
    """`query_tokens`: of all prompts that looked for a prefix; `hit_tokens`: those of them that were there."""

    hit_tokens: int = 0
    query_tokens: int = 0
    evictions: int = 0


@dataclass(eq=False)
class _Node:
    block: int
    parent: bytes | None
    adapter: str | None
    children: set[bytes] = field(default_factory=set)


class PrefixCache:
    """Finds and keeps blocks of `cache`; unless `is_on`, it finds none."""

    def __init__(self, cache: KVCache, number_format: str, *, is_on: bool = True) -> None:
        self._cache, self._pool, self._number_format = cache, cache.pool, number_format
        self._pool.evict = self._evict
        self._is_on = is_on and cache.pool.num_blocks > 0
        # Least recently used first; every block comes before the one that it follows, so that the first is a leaf.
        self._nodes: OrderedDict[bytes, _Node] = OrderedDict()
        self._claimed: dict[bytes, Chain] = {}
        self._chains: set[Chain] = set()
        self._growing: bytes | None = None
        self.counters = PrefixCounters()

    @property
    def num_blocks(self) -> int:
        return len(self._nodes)

    def stats(self) -> dict[str, int]:
        blocks, limit = self.num_blocks, self._pool.num_blocks
        size = BLOCK_TOKENS * self._cache.shape.bytes_per_token
        return {"blocks": blocks, "bytes": blocks * size, "limit_bytes": limit * size, **asdict(self.counters)}

    def open(self, owner: str, adapter: str | None, tokens: Callable[[int, int], Sequence[int]]) -> Chain:
        """The chain of a new sequence. Pair with `close`."""
        chain = Chain.of(owner, adapter, self._number_format, tokens)
        self._chains.add(chain)
        return chain

    def acquire(self, chain: Chain, room: int, num_tokens: int) -> int | None:
        """A cache slot with room for `room` tokens, or None; what is there of the `num_tokens` need not be room of its
        own. To be followed by `begin`, or by giving the slot back.
        """
        end = self._match(chain, 0, num_tokens)
        return self._cache.acquire(room, self._blocks(chain, 0, end))

    def begin(self, chain: Chain, slot: int, num_tokens: int) -> int:
        """Put into a new slot what is there of the sequence's tokens, and return how many those are.

        At least the last token is left to compute.
        """
        if self._is_on:
            self.counters.query_tokens += num_tokens
        return self.attach(chain, slot, 0, num_tokens)

    def attach(self, chain: Chain, slot: int, num_computed: int, num_tokens: int) -> int:
        """Put into the slot what is there beyond the `num_computed` tokens that it holds, and return what it holds.

        Nothing changes without room for it in the cache.
        """
        start = num_computed // BLOCK_TOKENS
        end = self._match(chain, start, num_tokens)
        if end <= start or not self._cache.extend(slot, end * BLOCK_TOKENS):
            return num_computed
        # The room may have come from blocks that were there before.
        end = self._match(chain, start, num_tokens)
        if end <= start:
            return num_computed
        self._cache.attach(slot, start, self._blocks(chain, start, end))
        self._hit(chain, start, end)
        return end * BLOCK_TOKENS

    def is_coming(self, chain: Chain, num_computed: int, num_tokens: int) -> bool:
        """Whether another sequence computes the next block of this one right now."""
        index = num_computed // BLOCK_TOKENS
        if not self._is_on or index >= _num_sharable(num_tokens):
            return False
        return self._claimed.get(chain.hash(index), chain) is not chain

    def claim(self, chain: Chain, num_computed: int, num_tokens: int) -> None:
        """The sequence goes on to compute its prompt; `is_coming` holds others back until `save` or `yield_claims`."""
        if not self._is_on or chain.is_shut:
            return
        for index in range(num_computed // BLOCK_TOKENS, num_tokens // BLOCK_TOKENS):
            name = chain.hash(index)
            if self._claimed.setdefault(name, chain) is chain:
                chain.claims.add(name)

    def save(self, chain: Chain, slot: int, num_computed: int) -> None:
        """Keep the full blocks among the `num_computed` tokens of the slot."""
        end = num_computed // BLOCK_TOKENS
        if end <= chain.num_saved or not self._is_on:
            return
        start = chain.num_saved
        if start and chain.hash(start - 1) not in self._nodes:
            start = 0
        if not chain.is_shut:
            kept = start
            while kept < end and self._keep(chain, slot, kept):
                kept += 1
            self._touch(chain, kept)
        for index in range(chain.num_saved, end):
            self._unclaim(chain, chain.hash(index))
        chain.num_saved = end

    def yield_claims(self, chain: Chain) -> None:
        """The sequence has lost its slot, or ends: what it had claimed is for others to compute."""
        for name in list(chain.claims):
            self._unclaim(chain, name)
        chain.num_saved = 0

    def close(self, chain: Chain, *, is_clean: bool) -> None:
        """The sequence has ended. Unless `is_clean`, its blocks and all that follow them are dropped."""
        self.yield_claims(chain)
        self._chains.discard(chain)
        if not is_clean:
            for name in chain.inserted:
                self._drop(name)

    def drop_adapter(self, adapter: str) -> None:
        """Forget all blocks of an adapter; sequences that still run keep theirs, and leave none."""
        for chain in self._chains:
            if chain.adapter == adapter:
                chain.is_shut = True
                self.yield_claims(chain)
        for name in [name for name, node in self._nodes.items() if node.adapter == adapter]:
            self._drop(name)

    def _match(self, chain: Chain, start: int, num_tokens: int) -> int:
        """The end of the run of blocks that are there, from block `start` on."""
        index, end = start, _num_sharable(num_tokens) if self._is_on else 0
        while index < end and chain.hash(index) in self._nodes:
            index += 1
        return index

    def _blocks(self, chain: Chain, start: int, end: int) -> list[int]:
        return [self._nodes[chain.hash(index)].block for index in range(start, end)]

    def _hit(self, chain: Chain, start: int, end: int) -> None:
        self.counters.hit_tokens += (end - start) * BLOCK_TOKENS
        self._touch(chain, end)

    def _keep(self, chain: Chain, slot: int, index: int) -> bool:
        name = chain.hash(index)
        node = self._nodes.get(name)
        if node is not None:
            self._cache.share(slot, index, node.block)
            return True
        parent = chain.hash(index - 1) if index else None
        # Making room must not evict what this block follows.
        self._growing = parent
        block = self._cache.save(slot, index)
        self._growing = None
        if block is None:
            return False
        self._pool.keep(block)
        self._pool.drop(block)
        self._nodes[name] = _Node(block, parent, chain.adapter)
        if parent is not None:
            self._nodes[parent].children.add(name)
        chain.inserted.append(name)
        return True

    def _touch(self, chain: Chain, end: int) -> None:
        for index in reversed(range(end)):
            self._nodes.move_to_end(chain.hash(index))

    def _evict(self) -> bool:
        """Drop the least recently used idle block that none follows."""
        is_idle, growing = self._pool.is_idle, self._growing
        leaves = (n for n, node in self._nodes.items() if not node.children and n != growing and is_idle(node.block))
        name = next(leaves, None)
        if name is None and growing is None:
            # A sequence may use a block without using those before it, if they were dropped and came anew.
            name = next((n for n, node in self._nodes.items() if is_idle(node.block)), None)
        if name is None:
            return False
        self._drop(name)
        self.counters.evictions += 1
        return True

    def _drop(self, name: bytes) -> None:
        """Remove a block, if it is there, with all that follow it."""
        node = self._nodes.get(name)
        if node is not None and node.parent is not None:
            self._nodes[node.parent].children.discard(name)
        names = [] if node is None else [name]
        while names:
            node = self._nodes.pop(names.pop())
            names += node.children
            self._pool.forget(node.block)

    def _unclaim(self, chain: Chain, name: bytes) -> None:
        chain.claims.discard(name)
        if self._claimed.get(name) is chain:
            del self._claimed[name]


def _num_sharable(num_tokens: int) -> int:
    """Full blocks of a sequence that may come from the cache: its last token must be computed to be continued."""
    return max(0, num_tokens - 1) // BLOCK_TOKENS
