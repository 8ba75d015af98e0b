"""Batches of a contrastive loss never hold an item twice, and an epoch of them holds nearly every sample once."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusion.data.distinct_batches import distinct_batches, largest_matching
from fusion.data.sampler import GlobalBatches
from fusion.errors import UserError


@given(st.integers(1, 6), st.integers(2, 8), st.integers(4, 60), st.integers(0, 99))
def test_no_batch_has_an_item_twice_on_either_side(captions, batch_size, images, seed):
    rng = np.random.default_rng(seed)
    count = images * captions
    # Some texts are shared by several images as well.
    items = np.stack([np.arange(count) % images, rng.integers(max(1, count // 2), size=count)], axis=1)
    try:
        found = distinct_batches(rng.permutation(count), items, batch_size, rng)
    except UserError:  # tested below
        return
    assert len(found) == count // batch_size * batch_size
    for batch in found.reshape(-1, batch_size):
        assert all(len(np.unique(items[batch, side])) == batch_size for side in (0, 1))


@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(1, 12), st.integers(1, 30))
def test_a_largest_matching_has_as_many_samples_as_any_set_without_shared_items(seed, lefts, rights, count):
    rng = np.random.default_rng(seed)
    items = np.stack([rng.integers(lefts, size=count), rng.integers(rights, size=count)], axis=1)
    found = largest_matching(np.arange(count), items)
    assert all(len(np.unique(items[found, side])) == len(found) for side in (0, 1))
    matrix = np.zeros((lefts, rights), dtype=bool)
    matrix[items[:, 0], items[:, 1]] = True
    # By Koenig's theorem: the least number of rows and columns that cover all pairs.
    covers = [rows.bit_count() + int(matrix[[i for i in range(lefts) if not rows >> i & 1]].any(axis=0).sum()) for rows in range(2**lefts)]
    assert len(found) == min(covers)


def test_a_batch_that_exists_is_found_in_every_epoch():
    # A cycle of pairs, of which random choices leave many items alone.
    n = 20
    items = np.array([[i, j] for i in range(n) for j in (i, (i + 1) % n)])
    for seed in range(30):
        rng = np.random.default_rng(seed)
        found = distinct_batches(rng.permutation(2 * n), items, n, rng)
        assert all(len(np.unique(items[batch, side])) == n for batch in found.reshape(-1, n) for side in (0, 1))


@pytest.mark.parametrize("batch_size", [32, 256])
def test_an_epoch_has_every_sample_at_most_once_where_that_can_be(batch_size):
    items = np.stack([np.arange(5000) % 1000, np.arange(5000)], axis=1)
    found = distinct_batches(np.random.default_rng(0).permutation(5000), items, batch_size, np.random.default_rng(1))
    assert len(np.unique(found)) == len(found) == 5000 // batch_size * batch_size


def test_epochs_differ_and_ranks_share_the_same_global_batches():
    items = np.stack([np.arange(64) % 16, np.arange(64)], axis=1)
    batches = GlobalBatches(64, 8, seed=3, apart=items)
    first = batches.order()
    batches.set_epoch(1)
    assert not np.array_equal(first, batches.order())
    ranks = [GlobalBatches(64, 8, seed=3, rank=rank, world=2, accumulate=2, apart=items) for rank in (0, 1)]
    draws = [list(rank) for rank in ranks]
    for step, (one, other) in enumerate(zip(*draws, strict=True)):
        assert one.update == other.update
        if step % 2 == 0:
            whole = [i for draw in (*[d[step] for d in draws], *[d[step + 1] for d in draws]) for i in draw.indices]
            assert sorted(whole) == sorted(one.update)
            assert len(set(items[whole, 0])) == 8


def test_a_batch_that_cannot_be_drawn_is_rejected_with_the_largest_that_can():
    items = np.stack([np.arange(40) % 5, np.arange(40)], axis=1)
    with pytest.raises(UserError, match=r"there are no 8 training pairs without a common item: at most 5; set --data.batch_size=5"):
        distinct_batches(np.arange(40), items, 8, np.random.default_rng(0))
