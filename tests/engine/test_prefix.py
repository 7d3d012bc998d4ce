import hashlib
import random
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.engine.conftest import OpenCore, fetch_local, ref_of, request
from tests.engine.test_bases import ARCHITECTURES, make_model
from tests.tiny import make_adapter
from tuneloom.engine.blocks import BLOCK_TOKENS
from tuneloom.engine.dense_cache import DenseCache
from tuneloom.engine.engine import LocalEngine
from tuneloom.engine.kv_cache import CacheBatch, Chunk, KVCache, KVShape
from tuneloom.engine.options import EngineConfig
from tuneloom.engine.paged_cache import PagedCache
from tuneloom.engine.prefix import Chain, PrefixCache
from tuneloom.generation import SamplingParams

CPU = torch.device("cpu")
SHAPE = KVShape(2, 1, 2, torch.float32)
FORMS = pytest.mark.parametrize("form", ["dense", "paged"])
MAX_LENGTH = 6 * BLOCK_TOKENS


@dataclass(eq=False)
class Writer:
    """A sequence: its tokens, and how many of them are in its slot."""

    owner: str
    adapter: str | None
    ids: list[int]
    chain: Chain | None = None
    slot: int | None = None
    num_computed: int = 0


@dataclass
class World:
    """A cache with its prefixes. The keys of a token tell owner, adapter and all tokens up to it."""

    form: str
    num_slots: int = 4
    num_blocks: int = 8
    num_tokens: int | None = None
    cache: KVCache = field(init=False)
    writers: list[Writer] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.form == "paged":
            tokens = self.num_tokens or (self.num_slots * MAX_LENGTH + self.num_blocks * BLOCK_TOKENS)
            self.cache = PagedCache(SHAPE, self.num_slots, MAX_LENGTH, CPU, num_tokens=tokens)
        else:
            self.cache = DenseCache(
                SHAPE,
                self.num_slots,
                MAX_LENGTH,
                CPU,
                token_budget=self.num_tokens,
                prefix_blocks=self.num_blocks,
            )
        self.prefix = PrefixCache(self.cache, "fp32")

    def start(self, ids: list[int], owner: str = "ada", adapter: str | None = None) -> Writer:
        """A sequence that waits."""
        writer = Writer(owner, adapter, ids)
        writer.chain = self.prefix.open(owner, adapter, lambda start, end: writer.ids[start:end])
        self.writers.append(writer)
        return writer

    def admit(self, writer: Writer) -> bool:
        writer.slot = self.prefix.acquire(writer.chain, len(writer.ids), len(writer.ids))
        if writer.slot is None:
            return False
        writer.num_computed = self.prefix.begin(writer.chain, writer.slot, len(writer.ids))
        self.check(writer)
        return True

    def num_there(self, ids: list[int]) -> int:
        """Leading blocks that a sequence would find."""
        chain = Chain.of("ada", None, "fp32", lambda start, end: ids[start:end])
        return self.prefix._match(chain, 0, len(ids))

    def attach(self, writer: Writer) -> None:
        writer.num_computed = self.prefix.attach(writer.chain, writer.slot, writer.num_computed, len(writer.ids))
        self.check(writer)

    def compute(self, writer: Writer, count: int) -> bool:
        """Go on with a prompt or an answer, as a step does; False if another computes the same."""
        self.attach(writer)
        if self.prefix.is_coming(writer.chain, writer.num_computed, len(writer.ids)):
            return False
        self.prefix.claim(writer.chain, writer.num_computed, len(writer.ids))
        count = min(count, len(writer.ids) - writer.num_computed)
        numbers = self.expected(writer)[writer.num_computed : writer.num_computed + count]
        key = torch.tensor(numbers).view(1, count, 1).expand(1, count, 2)
        batch = CacheBatch([], [], [Chunk(writer.slot, 0, count, writer.num_computed)], CPU)
        for layer in range(SHAPE.num_layers):
            self.cache.attend(layer, key, key + layer, -key - layer, batch, scaling=1.0, window=None)
        writer.num_computed += count
        self.prefix.save(writer.chain, writer.slot, writer.num_computed)
        self.check(writer)
        return True

    def run(self, writer: Writer) -> Writer:
        assert self.admit(writer)
        while writer.num_computed < len(writer.ids):
            assert self.compute(writer, 20)
        return writer

    def preempt(self, writer: Writer) -> None:
        self.prefix.yield_claims(writer.chain)
        self.cache.release(writer.slot, length=writer.num_computed, is_clean=True)
        writer.slot, writer.num_computed = None, 0

    def end(self, writer: Writer, *, is_clean: bool = True) -> None:
        self.prefix.close(writer.chain, is_clean=is_clean)
        if writer.slot is not None:
            self.cache.release(writer.slot, length=writer.num_computed, is_clean=is_clean)
        self.writers.remove(writer)

    def compact(self) -> None:
        by_slot = {writer.slot: writer for writer in self.writers if writer.slot is not None}
        for move in self.cache.compact({slot: writer.num_computed for slot, writer in by_slot.items()}):
            by_slot[move.source].slot = move.target

    def expected(self, writer: Writer) -> list[float]:
        state = hashlib.sha256(f"{writer.owner}|{writer.adapter}".encode())
        numbers = []
        for id in writer.ids:
            state.update(id.to_bytes(4, "big"))
            numbers.append(float(int.from_bytes(state.digest()[:3], "big")))
        return numbers

    def check(self, writer: Writer) -> None:
        """What the slot holds is what the sequence would have computed itself."""
        expected = torch.tensor(self.expected(writer)[: writer.num_computed])
        for layer in range(SHAPE.num_layers):
            key, value = self.contents(writer.slot, layer, writer.num_computed)
            assert torch.equal(key, expected + layer) and torch.equal(value, -expected - layer)

    def contents(self, slot: int, layer: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self.form == "dense":
            return tuple(self.cache._rows[layer, at, slot, 0, :length, 0] for at in (0, 1))
        blocks = self.cache._blocks[layer, :, self.cache._held[slot]]
        return tuple(blocks[at].flatten(0, 1)[:length, 0, 0] for at in (0, 1))


def prompt(*parts: int, tail: int = 0) -> list[int]:
    """A block for each number, and `tail` tokens more."""
    return [part * 100 + i for part in parts for i in range(BLOCK_TOKENS)] + list(range(tail))


@FORMS
def test_a_prefix_is_computed_once(form: str):
    world = World(form)
    world.end(world.run(world.start(prompt(1, 2, 3, tail=5))))
    other = world.start(prompt(1, 2, 4, tail=5))
    assert world.admit(other)
    assert other.num_computed == 2 * BLOCK_TOKENS
    assert world.prefix.counters.hit_tokens == 2 * BLOCK_TOKENS
    assert world.prefix.counters.query_tokens == 2 * (3 * BLOCK_TOKENS + 5)


@FORMS
def test_the_last_token_is_always_computed(form: str):
    world = World(form)
    world.end(world.run(world.start(prompt(1, 2))))
    again = world.start(prompt(1, 2))
    world.admit(again)
    assert again.num_computed == BLOCK_TOKENS


@FORMS
@pytest.mark.parametrize(
    ("owner", "adapter", "hit"), [("ada", "a" * 64, 1), ("bob", "a" * 64, 0), ("ada", "b" * 64, 0), ("ada", None, 0)]
)
def test_a_prefix_stays_with_its_owner_and_its_adapter(form: str, owner: str, adapter: str | None, hit: int):
    world = World(form)
    world.end(world.run(world.start(prompt(1, tail=3), "ada", "a" * 64)))
    other = world.start(prompt(1, tail=3), owner, adapter)
    world.admit(other)
    assert other.num_computed == hit * BLOCK_TOKENS


def test_names_of_owners_and_adapters_cannot_be_mixed_up():
    def root(owner: str, adapter: str | None) -> bytes:
        return Chain.of(owner, adapter, "fp32", lambda start, end: range(start, end)).hash(0)

    roots = [root("a", "b"), root('a", "b', None), root("ab", None), root("a", None), root("a", "null"), root("", "ab")]
    assert len(set(roots)) == len(roots)


@FORMS
def test_an_answer_is_there_for_the_next_turn(form: str):
    world = World(form)
    writer = world.run(world.start(prompt(1, tail=3)))
    for id in range(40):
        writer.ids.append(id + 7)
        assert world.cache.extend(writer.slot, len(writer.ids))
        world.compute(writer, 1)
    world.end(writer)
    following = world.start([*writer.ids, 1, 2, 3])
    world.admit(following)
    assert following.num_computed == 3 * BLOCK_TOKENS


@FORMS
def test_a_preempted_sequence_goes_on_from_its_blocks(form: str):
    world = World(form)
    writer = world.run(world.start(prompt(1, 2, tail=3)))
    world.preempt(writer)
    world.admit(writer)
    assert writer.num_computed == 2 * BLOCK_TOKENS


@FORMS
def test_a_failed_sequence_leaves_nothing(form: str):
    world = World(form)
    world.end(world.run(world.start(prompt(1, 2, tail=3))))
    failed = world.run(world.start(prompt(1, 5, 6, tail=3)))
    heir = world.start(prompt(1, 5, 6, 7, tail=3))
    world.run(heir)
    world.end(failed, is_clean=False)
    assert world.prefix.num_blocks == 2, "what it found is not its own"
    again = world.start(prompt(1, 5, 6, tail=3))
    world.admit(again)
    assert again.num_computed == BLOCK_TOKENS


@FORMS
def test_prompts_that_come_together_wait_for_the_one_that_computes(form: str):
    world = World(form)
    first, second, stranger = (
        world.start(prompt(1, 2, 3, tail=4)),
        world.start(prompt(1, 2, 4, tail=4)),
        world.start(prompt(1, 2, 4, tail=4), "bob"),
    )
    for writer in (first, second, stranger):
        world.admit(writer)
    assert world.compute(first, 20)
    assert not world.compute(second, 20)
    assert second.num_computed == BLOCK_TOKENS, "what is there it has at once"
    assert world.compute(stranger, 20)
    assert world.compute(first, 20)
    assert world.compute(second, 20)
    assert second.num_computed == 2 * BLOCK_TOKENS + 20
    assert world.prefix.counters.hit_tokens == 2 * BLOCK_TOKENS


@FORMS
@pytest.mark.parametrize("how", ["fails", "aborts", "is preempted"])
def test_nobody_waits_for_a_sequence_that_is_gone(form: str, how: str):
    world = World(form)
    first, second = world.start(prompt(1, 2, 3)), world.start(prompt(1, 2, 3))
    world.admit(first)
    world.admit(second)
    world.compute(first, 20)
    assert not world.compute(second, 20)
    world.preempt(first) if how == "is preempted" else world.end(first, is_clean=False)
    assert world.compute(second, 20)
    third = world.start(prompt(1, 2, 3))
    world.admit(third)
    assert third.num_computed == 2 * BLOCK_TOKENS, "the second has put back what went with the first"


@FORMS
def test_dropping_an_adapter_drops_its_blocks_only(form: str):
    world = World(form)
    world.end(world.run(world.start(prompt(1, 2), adapter="a" * 64)))
    world.end(world.run(world.start(prompt(1, 2), adapter="b" * 64)))
    running = world.start(prompt(1, 2, 3), adapter="a" * 64)
    world.run(running)
    world.prefix.drop_adapter("a" * 64)
    assert world.prefix.num_blocks == 2
    running.ids += prompt(9)
    assert world.cache.extend(running.slot, len(running.ids))
    world.compute(running, BLOCK_TOKENS)
    assert world.prefix.num_blocks == 2, "one that runs on leaves none"


@FORMS
def test_the_least_recently_used_leaf_goes_first(form: str):
    world = World(form, num_slots=1, num_blocks=4, num_tokens=4 * BLOCK_TOKENS)
    for parts in ((1, 2), (3, 4)):
        world.end(world.run(world.start(prompt(*parts))))
    again = world.start(prompt(1, 2, tail=1))
    world.run(again)
    world.end(again)
    world.end(world.run(world.start(prompt(5))))
    assert [world.num_there(prompt(*parts, tail=1)) for parts in ((5,), (3, 4), (1, 2))] == [1, 1, 2]


def test_a_prompt_longer_than_the_limit_keeps_its_beginning():
    world = World("dense", num_blocks=3)
    world.end(world.run(world.start(prompt(1, 2, 3, 4, 5))))
    assert world.num_there(prompt(1, 2, 3, 4, 5)) == 3


def test_without_room_for_blocks_nothing_is_looked_for():
    world = World("dense", num_blocks=0)
    world.end(world.run(world.start(prompt(1, 2))))
    first, second = world.start(prompt(1, 2)), world.start(prompt(1, 2))
    world.admit(first)
    world.admit(second)
    assert world.compute(first, 4) and world.compute(second, 4)
    assert world.prefix.stats() == {
        "blocks": 0,
        "bytes": 0,
        "limit_bytes": 0,
        "hit_tokens": 0,
        "query_tokens": 0,
        "evictions": 0,
    }


OWNERS, ADAPTERS = ("ada", "bob"), (None, "a" * 64, "b" * 64)


@FORMS
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_whatever_happens_each_slot_holds_its_own_and_nothing_leaks(form: str, data: st.DataObject):
    """Every attach and every write is compared with what the sequence itself would have computed."""
    blocks = data.draw(st.integers(0, 6), "blocks")
    tokens = data.draw(st.sampled_from([None, 10 * BLOCK_TOKENS]), "tokens")
    world = World(form, num_slots=4, num_blocks=blocks, num_tokens=tokens)
    for _ in range(data.draw(st.integers(5, 40), "steps")):
        act(world, data)
        used = {slot.slot for slot in world.writers if slot.slot is not None}
        assert world.cache.num_free == world.num_slots - len(used)
        assert 0 <= world.cache.num_free_tokens <= world.cache.num_tokens
        assert world.prefix.num_blocks <= world.cache.pool.num_blocks
    for writer in list(world.writers):
        world.end(writer, is_clean=data.draw(st.booleans()))
    assert world.cache.pool.num_idle == world.prefix.num_blocks
    assert world.cache.num_free_tokens == world.cache.num_tokens
    assert world.cache.pool.num_free == world.cache.pool.num_blocks
    assert not world.prefix._claimed and not world.prefix._chains
    while world.cache.pool.take() is not None:
        pass
    assert world.prefix.num_blocks == 0, "every idle block can be had"


def act(world: World, data: st.DataObject) -> None:
    waiting = [writer for writer in world.writers if writer.slot is None]
    running = [writer for writer in world.writers if writer.slot is not None]
    kind = data.draw(st.sampled_from(["start", "admit", "step", "step", "step", "answer", "preempt", "end", "drop"]))
    if kind == "start" and len(world.writers) < 8:
        parts = data.draw(st.lists(st.integers(1, 2), max_size=3))
        ids = prompt(*parts, tail=data.draw(st.integers(1, 20)))
        world.start(ids, data.draw(st.sampled_from(OWNERS)), data.draw(st.sampled_from(ADAPTERS)))
    elif kind == "admit" and waiting:
        world.admit(data.draw(st.sampled_from(waiting)))
    elif kind == "step":
        goes_on = [w for w in running if w.num_computed < len(w.ids)]
        moved = [world.compute(w, data.draw(st.sampled_from([3, 16, 40]))) for w in goes_on]
        assert any(moved) or not moved, "somebody computes what the others wait for"
    elif kind == "answer" and running:
        writer = data.draw(st.sampled_from(running))
        if len(writer.ids) < MAX_LENGTH and world.cache.extend(writer.slot, len(writer.ids) + 1):
            writer.ids.append(data.draw(st.integers(0, 1)))
            if writer.num_computed == len(writer.ids) - 1:
                world.compute(writer, 1)
    elif kind == "preempt" and running:
        world.preempt(data.draw(st.sampled_from(running)))
    elif kind == "end" and world.writers:
        world.end(data.draw(st.sampled_from(world.writers)), is_clean=data.draw(st.booleans()))
        world.compact()
    elif kind == "drop":
        world.prefix.drop_adapter(data.draw(st.sampled_from(ADAPTERS[1:])))


SYSTEM = [(11 * i + 5) % 480 + 8 for i in range(5 * BLOCK_TOKENS + 3)]


@FORMS
def test_answers_over_shared_prefixes_equal_generate(
    open_core: OpenCore, tiny_base: Path, tiny_adapters: list[Path], plain_generate, tiny_prompts, form: str
):
    """In two rounds: together without a prefix, then a next turn on top of each answer."""
    engine = open_core(kv_cache=form, max_step_tokens=48, max_sequences=6, adapter_slots=2)
    adapters = [None, *tiny_adapters[:2]]
    prompts = [SYSTEM[: 20 * (i % 3 + 2)] + tiny_prompts[i] for i in range(12)]
    for turn in range(2):
        ids = [f"{turn}-{i}" for i in range(len(prompts))]
        for i, id in enumerate(ids):
            adapter = adapters[i % 3]
            ref = None if adapter is None else ref_of(adapter)
            engine.core.add(request(id, prompts[i], adapter=ref, owner=f"owner-{i % 2}"))
        engine.run()
        assert not engine.errors
        for i, id in enumerate(ids):
            assert engine.tokens(id) == plain_generate(tiny_base, prompts[i], 8, adapters[i % 3])
        prompts = [[*prompt, *engine.tokens(id), 7, 8, 9] for prompt, id in zip(prompts, ids, strict=True)]
    # Of the first turn all but the last token was computed; 3 and 8 + 3 tokens have come since.
    known = [len(prompt) - 1 - 3 - 11 for prompt in prompts]
    found = [engine.outputs[f"1-{i}"][-1].cached_tokens for i in range(len(prompts))]
    assert found == [length // BLOCK_TOKENS * BLOCK_TOKENS for length in known]


@FORMS
@pytest.mark.parametrize("seed", range(3))
def test_nothing_leaks_or_stops_when_prompts_share_and_end_at_random_in_a_full_cache(
    open_core: OpenCore, tiny_base: Path, tiny_adapters: list[Path], plain_generate, form: str, seed: int
):
    chance = random.Random(seed)
    engine = open_core(
        kv_cache=form,
        kv_cache_tokens=300,
        max_step_tokens=40,
        adapter_slots=1,
        prefix_cache_bytes=chance.choice([10, 40]) * BLOCK_TOKENS * 512,
    )
    asked: dict[str, tuple[list[int], Path | None]] = {}
    aborted: set[str] = set()
    for i in range(24):
        ids = [*SYSTEM[: chance.choice([16, 40, 83])], *(chance.randrange(9, 11) for _ in range(chance.randrange(40)))]
        folder = chance.choice([None, *tiny_adapters[:2]])
        asked[f"r{i}"] = ids, folder
        ref = ref_of(folder) if folder else None
        engine.core.add(request(f"r{i}", ids, adapter=ref, owner=chance.choice(["ada", "bob"])))
        for _ in range(chance.randrange(4)):
            engine.step()
        if chance.random() < 0.3:
            gone = chance.choice(list(asked))
            aborted.add(gone)
            engine.core.abort(gone)
    engine.run()
    assert not engine.errors
    for id in asked.keys() - aborted:
        ids, folder = asked[id]
        assert engine.tokens(id) == plain_generate(tiny_base, ids, 8, folder)
    core = engine.core
    assert core.stats().kv_tokens_used == 0
    assert not core._prefix._claimed and not core._prefix._chains
    assert core._cache.pool.num_free == core._cache.pool.num_blocks


@FORMS
@pytest.mark.parametrize("kind", ["gemma3_text", "mistral"])
def test_a_prefix_serves_layers_with_windows(
    open_core: OpenCore, plain_generate, tiny_prompts, tmp_path: Path, kind: str, form: str
):
    base = make_model(tmp_path / kind, kind, ARCHITECTURES[kind])
    engine = open_core(base, kv_cache=form, max_step_tokens=40)
    prompts = [SYSTEM[:length] + tiny_prompts[i] for i, length in enumerate((40, 83, 83, 64))]
    for i, prompt_ids in enumerate(prompts):
        engine.core.add(request(f"r{i}", prompt_ids))
        engine.run()
    for i, prompt_ids in enumerate(prompts):
        assert engine.tokens(f"r{i}") == plain_generate(base, prompt_ids, 8)
    assert [engine.outputs[f"r{i}"][0].cached_tokens for i in range(4)] == [0, 32, 80, 64]


@FORMS
def test_prompts_that_come_at_once_are_read_once(open_core: OpenCore, form: str):
    engine = open_core(kv_cache=form, max_step_tokens=32)
    for i in range(8):
        engine.core.add(request(f"r{i}", [*SYSTEM, i + 5, 3]))
    engine.run()
    shared = 5 * BLOCK_TOKENS
    assert sorted(engine.outputs[f"r{i}"][0].cached_tokens for i in range(8)) == [0] + 7 * [shared]
    counters = engine.core.stats().extra["prefix_cache"]
    assert (counters["hit_tokens"], counters["query_tokens"]) == (7 * shared, 8 * len([*SYSTEM, 1, 2]))


@FORMS
def test_preempted_answers_go_on_from_their_blocks(open_core: OpenCore, tiny_base: Path, plain_generate, form: str):
    engine = open_core(kv_cache=form, kv_cache_tokens=12 * BLOCK_TOKENS, max_length=160)
    prompts = [[(7 * i + j) % 400 + 9 for j in range(30)] for i in range(6)]
    params = SamplingParams(max_tokens=70, temperature=0.0)
    for i, ids in enumerate(prompts):
        engine.core.add(request(f"r{i}", ids, params=params))
    engine.run()
    stats = engine.core.stats()
    assert stats.preemptions > 0
    assert stats.extra["prefix_cache"]["hit_tokens"] > 0
    for i, ids in enumerate(prompts):
        assert engine.tokens(f"r{i}") == plain_generate(tiny_base, ids, 70)
        assert engine.outputs[f"r{i}"][-1].cached_tokens == 0, "its own tokens do not count"


@FORMS
def test_a_sequence_without_finite_scores_leaves_no_blocks(
    open_core: OpenCore, tiny_base: Path, tmp_path: Path, form: str
):
    folder = make_adapter(tmp_path / "broken", tiny_base, rank=4)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({name: torch.full_like(tensor, torch.nan) for name, tensor in tensors.items()}, path)
    engine = open_core(kv_cache=form, max_step_tokens=32)
    engine.core.add(request("sound", SYSTEM))
    engine.core.add(request("broken", SYSTEM, adapter=ref_of(folder)))
    engine.run()
    assert engine.errors.keys() == {"broken"}
    assert engine.core.stats().extra["prefix_cache"]["blocks"] == (len(SYSTEM) + 7) // BLOCK_TOKENS


@FORMS
def test_a_prompt_that_is_given_up_half_way_leaves_no_blocks_and_keeps_nobody_waiting(open_core: OpenCore, form: str):
    engine = open_core(kv_cache=form, max_step_tokens=32)
    for i in range(3):
        engine.core.add(request(f"r{i}", [*SYSTEM, i]))
    engine.step()
    engine.core.abort("r0")
    assert engine.core.stats().extra["prefix_cache"]["blocks"] == 0
    engine.run()
    assert engine.outputs.keys() == {"r1", "r2"}


def test_kept_prefixes_stay_within_their_bytes(open_core: OpenCore, tiny_prompts):
    engine = open_core(prefix_cache_bytes=100_000)
    for i, ids in enumerate(tiny_prompts):
        engine.core.add(request(f"r{i}", ids))
    engine.run()
    stats = engine.core.stats().extra["prefix_cache"]
    assert 0 < stats["bytes"] <= stats["limit_bytes"] <= 100_000
    assert stats["evictions"] > 0


def test_the_cache_can_be_turned_off(open_core: OpenCore):
    for form in ("dense", "paged"):
        engine = open_core(kv_cache=form, prefix_cache_bytes=0)
        for i in range(3):
            engine.core.add(request(f"r{i}", SYSTEM))
        engine.run()
        assert {engine.outputs[f"r{i}"][-1].cached_tokens for i in range(3)} == {0}


@FORMS
def test_in_bf16_a_prefix_gives_the_same_within_rounding(open_core: OpenCore, form: str):
    params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=0)
    engine = open_core(kv_cache=form, dtype="bf16")
    for id in ("plain", "cached"):
        engine.core.add(request(id, SYSTEM, params=params))
        engine.run()
    [plain], [cached] = engine.outputs["plain"][0].tokens, engine.outputs["cached"][0].tokens
    assert engine.outputs["cached"][0].cached_tokens == 5 * BLOCK_TOKENS
    assert cached.logprob == pytest.approx(plain.logprob, abs=0.1)


@pytest.mark.anyio
async def test_evicting_an_adapter_drops_what_was_computed_with_it(tiny_base: Path, tiny_adapters: list[Path]):
    engine = LocalEngine(tiny_base, EngineConfig(dtype="fp32", threads=1), fetch_local)
    await engine.start()
    ref = ref_of(tiny_adapters[0])
    try:
        for id in ("r0", "r1", "r2"):
            outputs = [output async for output in engine.generate(request(id, SYSTEM, adapter=ref))]
            assert outputs[-1].cached_tokens == (5 * BLOCK_TOKENS if id == "r1" else 0)
            if id == "r1":
                await engine.evict_adapter(ref.sha256)
    finally:
        await engine.close()
