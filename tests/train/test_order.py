import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tuneloom.train.order import Batches


@given(st.lists(st.integers(2, 60), min_size=1, max_size=90), st.sampled_from([1, 2, 4, 8]), st.integers(0, 99))
def test_each_epoch_holds_every_row_once_in_whole_batches(lengths: list[int], size: int, seed: int) -> None:
    batches = Batches(lengths, size, max(1, size // 2), seed)
    for epoch in range(2):
        cut = batches.epoch(epoch)
        assert len(cut) == batches.steps_per_epoch
        assert all(len(batch) == size for batch in cut[:-1])
        assert sorted(np.concatenate(cut).tolist()) == list(range(len(lengths)))
        batches.set_epoch(epoch)
        assert len(list(batches)) == len(batches)
        assert [row for rows in batches for row in rows] == np.concatenate(cut).tolist()


@given(
    st.lists(st.integers(2, 60), min_size=1, max_size=90),
    st.sampled_from([1, 2, 4, 8]),
    st.integers(1, 8),
    st.booleans(),
)
def test_a_batch_is_cut_into_parts_that_take_no_more_room_than_the_longest_rows(
    lengths: list[int], size: int, micro: int, padded: bool
) -> None:
    batches = Batches(lengths, size, micro, 0)
    for batch in batches:
        parts = batches.cut(batch, padded=padded)
        assert [row for part in parts for row in part] == batch
        for part in parts:
            sizes = [lengths[row] for row in part]
            assert (max(sizes) * len(sizes) if padded else sum(sizes)) <= micro * max(lengths)
        # Not one more part than needed: none has room for the next row.
        for part, after in itertools.pairwise(parts):
            sizes = [lengths[row] for row in (*part, after[0])]
            assert (max(sizes) * len(sizes) if padded else sum(sizes)) > micro * max(lengths)


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    lengths = list(range(2, 52))

    def order(seed: int, epoch: int) -> list[int]:
        return np.concatenate(Batches(lengths, 4, 4, seed).epoch(epoch)).tolist()

    assert order(1, 0) == order(1, 0)
    assert len({tuple(order(seed, epoch)) for seed in (1, 2) for epoch in (0, 1)}) == 4


def test_rows_of_like_length_share_a_batch() -> None:
    lengths = np.random.default_rng(0).integers(5, 200, 512)
    padded = sum(lengths[batch].max() * len(batch) for batch in Batches(lengths, 8, 8, 0).epoch(0))
    assert padded < 1.15 * lengths.sum()


def test_tokens_until_counts_the_rows_that_were_seen() -> None:
    batches = Batches([3, 5, 7, 11, 13], 2, 2, 0)
    seen = [len_ for epoch in (0, 1) for batch in batches.epoch(epoch) for len_ in [int(batches._lengths[batch].sum())]]
    assert [batches.tokens_until(step) for step in range(7)] == [0, *np.cumsum(seen).tolist()]
