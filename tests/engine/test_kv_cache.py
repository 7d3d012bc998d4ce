import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tuneloom.engine.blocks import BLOCK_TOKENS
from tuneloom.engine.dense_cache import DenseCache
from tuneloom.engine.kv_cache import CacheBatch, Chunk, KVCache, KVShape
from tuneloom.engine.paged_cache import PagedCache
from tuneloom.errors import InvalidRequest

CPU = torch.device("cpu")
HEADS, GROUPS, WIDTH = 4, 2, 8
SHAPE = KVShape(1, GROUPS, WIDTH, torch.float32)


def open_cache(form: str, num_slots: int, max_length: int, *, num_tokens: int | None = None) -> KVCache:
    num_tokens = num_slots * max_length if num_tokens is None else num_tokens
    if form == "paged":
        return PagedCache(SHAPE, num_slots, max_length, CPU, num_tokens=num_tokens)
    return DenseCache(SHAPE, num_slots, max_length, CPU, token_budget=num_tokens, prefix_blocks=4)


class Model:
    """Sequences with random keys and values: what the cache should remember, kept apart."""

    def __init__(self, cache: KVCache, window: int | None) -> None:
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


@pytest.mark.parametrize("form", ["dense", "paged"])
@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_sequences_come_and_go_and_each_sees_its_own_past(form: str, data: st.DataObject):
    torch.manual_seed(0)
    model = Model(open_cache(form, 5, 48), data.draw(st.sampled_from([None, 6, 20])))
    for _ in range(data.draw(st.integers(1, 12))):
        ended = [slot for slot, kept in model.sequences.items() if len(kept) > 36 or data.draw(st.booleans())]
        for slot in ended:
            model.cache.release(slot, length=len(model.sequences.pop(slot)), is_clean=data.draw(st.booleans()))
        model.compact()
        decoding = [slot for slot, kept in model.sequences.items() if kept]
        prompts = []
        for length in data.draw(st.lists(st.sampled_from([1, 5, 8, 16, 23]), max_size=2)):
            slot = model.cache.acquire(48)
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


@pytest.mark.parametrize("form", ["dense", "paged"])
def test_numbers_of_a_broken_sequence_reach_nobody(form: str):
    torch.manual_seed(0)
    model = Model(open_cache(form, 2, 16), None)
    slot = model.cache.acquire(16)
    query, key, value = (torch.full((n, 16, WIDTH), torch.nan) for n in (HEADS, GROUPS, GROUPS))
    model.cache.attend(0, query, key, value, CacheBatch([], [], [Chunk(slot, 0, 16, 0)], CPU), scaling=0.5, window=None)
    model.cache.release(slot, length=16, is_clean=False)
    for slot, length in ((model.cache.acquire(16), 3), (model.cache.acquire(16), 9)):
        model.sequences[slot] = []
        model.step([], [(slot, length)])
    model.step(list(model.sequences), [])


@pytest.mark.parametrize("form", ["dense", "paged"])
def test_a_full_cache_has_no_slot(form: str):
    cache = open_cache(form, 2, 16)
    assert (cache.acquire(16), cache.acquire(16), cache.acquire(1)) == (0, 1, None)
    assert cache.num_tokens == 32


@pytest.mark.parametrize("form", ["dense", "paged"])
@pytest.mark.parametrize("window", [None, 20])
def test_a_saved_block_serves_another_sequence(form: str, window: int | None):
    torch.manual_seed(0)
    model = Model(open_cache(form, 3, 64), window)
    first, second = model.cache.acquire(64), model.cache.acquire(64)
    model.sequences = {first: []}
    model.step([], [(first, 40)])
    blocks = [model.cache.save(first, index) for index in (0, 1)]
    model.cache.attach(second, 0, blocks)
    for block in blocks:
        model.cache.pool.drop(block)
    model.sequences[second] = model.sequences[first][: 2 * BLOCK_TOKENS]
    model.step([first], [(second, 5)])
    model.cache.release(first, length=41, is_clean=True)
    del model.sequences[first]
    model.step([second], [])


def test_paged_sequences_share_the_room_of_a_block_and_the_last_one_frees_it():
    cache = open_cache("paged", 3, 64, num_tokens=96)
    first, second = cache.acquire(32), cache.acquire(32)
    block = cache.save(first, 0)
    cache.attach(second, 0, [block])
    cache.pool.drop(block)
    assert cache.num_free_tokens == 48
    cache.release(first, length=32, is_clean=True)
    assert cache.num_free_tokens == 64
    cache.release(second, length=32, is_clean=True)
    assert cache.num_free_tokens == 96


def test_one_sequence_can_have_all_of_a_paged_cache():
    cache = open_cache("paged", 2, 64, num_tokens=50)
    slot = cache.acquire(1)
    assert cache.extend(slot, 50) and cache.num_tokens >= 50
    assert cache.num_free_tokens == 0


def test_a_block_of_a_broken_sequence_that_another_uses_is_wiped_when_it_is_free():
    cache = open_cache("paged", 2, 16, num_tokens=32)
    first, second = cache.acquire(16), cache.acquire(16)
    block = cache.save(first, 0)
    cache.attach(second, 0, [block])
    cache.pool.drop(block)
    cache._blocks[:, :, block] = torch.nan
    cache.release(first, length=16, is_clean=False)
    cache.acquire(16)
    assert cache._blocks[:, :, block].isnan().all(), "the other one still has it"
    cache.release(second, length=16, is_clean=True)
    cache.acquire(16)
    assert not cache._blocks.isnan().any()


def test_a_layer_that_does_not_fit_the_cache_is_refused():
    cache = open_cache("dense", 1, 16)
    odd = torch.zeros(GROUPS, 1, WIDTH + 1)
    with pytest.raises(InvalidRequest, match="its config says 2 x 8"):
        cache.attend(0, odd, odd, odd, CacheBatch([], [], [], CPU), scaling=None, window=None)


def test_the_shape_of_a_base_comes_from_its_config():
    from transformers import LlamaConfig, PhiConfig

    config = LlamaConfig(num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=2, hidden_size=64, head_dim=24)
    shape = KVShape.of(config, torch.bfloat16)
    assert (shape.num_layers, shape.num_groups, shape.width) == (3, 2, 24)
    assert shape.bytes_per_token == 2 * 3 * 2 * 24 * 2
    config = PhiConfig(num_attention_heads=8, hidden_size=64)
    assert (KVShape.of(config, torch.float32).num_groups, KVShape.of(config, torch.float32).width) == (8, 8)


def test_where_layers_differ_the_largest_counts():
    from transformers import LlamaConfig

    layers = {0: {"head_dim": 24}, 1: {"num_key_value_heads": 4}}
    config = LlamaConfig(num_hidden_layers=3, num_attention_heads=8, hidden_size=64, head_dim=8, num_key_value_heads=2)
    config.per_layer_config = layers
    shape = KVShape.of(config, torch.bfloat16)
    assert (shape.num_layers, shape.num_groups, shape.width) == (3, 4, 24)


def test_tokens_come_out_of_one_budget_and_go_back_to_it():
    cache = DenseCache(SHAPE, 3, 16, CPU, token_budget=20)
    assert (cache.acquire(8), cache.acquire(8), cache.acquire(8)) == (0, 1, None)
    assert cache.extend(0, 12) and not cache.extend(1, 9)
    assert cache.extend(0, 4), "what is reserved stays"
    assert cache.num_free_tokens == 0
    cache.release(0, length=12, is_clean=True)
    assert cache.num_free_tokens == 12
    assert cache.extend(1, 16)
