import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tuneloom.engine.kv_cache import CacheBatch, Chunk, DenseCache, KVShape

CPU = torch.device("cpu")
HEADS, GROUPS, WIDTH = 4, 2, 8
SHAPE = KVShape(1, GROUPS, WIDTH, torch.float32)


class Model:
    """Sequences with random keys and values: what the cache should remember, kept apart."""

    def __init__(self, cache: DenseCache, window: int | None) -> None:
        self.cache, self.window = cache, window
        self.sequences: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def step(self, decoding: list[int], prompts: list[tuple[int, int]]) -> None:
        """Attend for one token of each slot in `decoding` and chunks of (slot, length); compare with the plain sum."""
        slots = sorted(decoding)
        owners = [*slots, *(slot for slot, length in prompts for _ in range(length))]
        count = len(owners)
        query, key, value = (torch.randn(n, count, WIDTH) for n in (HEADS, GROUPS, GROUPS))
        chunks, at = [], len(slots)
        for slot, length in prompts:
            chunks.append(Chunk(slot, at, length, len(self.sequences[slot])))
            at += length
        batch = CacheBatch(slots, [len(self.sequences[slot]) for slot in slots], chunks, CPU)
        found = self.cache.attend(0, query, key, value, batch, scaling=0.5, window=self.window)
        for i, slot in enumerate(owners):
            self.sequences[slot].append((key[:, i], value[:, i]))
            torch.testing.assert_close(found[i], self.plain(query[:, i], slot), atol=1e-5, rtol=1e-4)

    def plain(self, query: torch.Tensor, slot: int) -> torch.Tensor:
        seen = self.sequences[slot][-self.window if self.window else 0 :]
        key = torch.stack([key for key, _ in seen]).repeat_interleave(HEADS // GROUPS, 1)
        value = torch.stack([value for _, value in seen]).repeat_interleave(HEADS // GROUPS, 1)
        weights = (torch.einsum("hd,lhd->hl", query, key) * 0.5).softmax(-1)
        return torch.einsum("hl,lhd->hd", weights, value)

    def compact(self) -> int:
        moves = self.cache.compact({slot: len(kept) for slot, kept in self.sequences.items()})
        for move in moves:
            self.sequences[move.target] = self.sequences.pop(move.source)
        return len(moves)


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_sequences_come_and_go_and_each_sees_its_own_past(data: st.DataObject):
    torch.manual_seed(0)
    model = Model(DenseCache(SHAPE, 5, 24, CPU), data.draw(st.sampled_from([None, 6])))
    for _ in range(data.draw(st.integers(1, 12))):
        ended = [slot for slot, kept in model.sequences.items() if len(kept) > 12 or data.draw(st.booleans())]
        for slot in ended:
            model.cache.release(slot, length=len(model.sequences.pop(slot)), is_clean=True)
        model.compact()
        decoding = [slot for slot, kept in model.sequences.items() if kept]
        prompts = []
        for length in data.draw(st.lists(st.integers(1, 8), max_size=2)):
            slot = model.cache.acquire(24)
            if slot is not None:
                model.sequences[slot] = []
                prompts.append((slot, length))
        continued = [slot for slot in decoding if data.draw(st.integers(0, 3)) == 0]
        prompts += [(slot, 3) for slot in continued]
        decoding = [slot for slot in decoding if slot not in continued]
        if decoding or prompts:
            model.step(decoding, prompts)
    assert model.cache.num_free == 5 - len(model.sequences)


def test_gaps_are_closed_when_they_are_many():
    torch.manual_seed(0)
    model = Model(DenseCache(SHAPE, 8, 16, CPU), None)
    for _ in range(8):
        slot = model.cache.acquire(16)
        assert slot is not None
        model.sequences[slot] = []
    model.step([], [(slot, 3) for slot in range(8)])
    for slot in (0, 2, 5):
        model.cache.release(slot, length=len(model.sequences.pop(slot)), is_clean=True)
    assert model.compact() == 2
    assert sorted(model.sequences) == [0, 1, 2, 3, 4]
    model.step([0, 1, 2, 3, 4], [])
    model.cache.release(1, length=len(model.sequences.pop(1)), is_clean=True)
    assert model.compact() == 0
    model.step([0, 2, 3, 4], [])


@pytest.mark.parametrize("is_clean", [True, False])
def test_only_an_unclean_slot_is_wiped(is_clean: bool):
    model = Model(DenseCache(SHAPE, 1, 16, CPU), None)
    model.sequences[model.cache.acquire(16) or 0] = []
    model.step([], [(0, 4)])
    model.cache.release(0, length=4, is_clean=is_clean)
    assert bool(model.cache._layers[0].key_BCLD.any()) == is_clean


def test_a_full_cache_has_no_slot():
    cache = DenseCache(SHAPE, 2, 16, CPU)
    assert (cache.acquire(16), cache.acquire(16), cache.acquire(1)) == (0, 1, None)
    assert cache.num_tokens == 32


def test_tokens_come_out_of_one_budget_and_go_back_to_it():
    cache = DenseCache(SHAPE, 3, 16, CPU, token_budget=20)
    assert (cache.acquire(8), cache.acquire(8), cache.acquire(8)) == (0, 1, None)
    assert cache.extend(0, 12) and not cache.extend(1, 9)
    assert cache.extend(0, 4), "what is reserved stays"
    assert cache.num_free_tokens == 0
    cache.release(0, length=12, is_clean=True)
    assert cache.num_free_tokens == 12
    assert cache.extend(1, 16)
