"""Which samples make up each batch."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusion.data.sampler import PLACEHOLDER, EvaluationBatches, GlobalBatches, draw_seed
from fusion.errors import UserError


@st.composite
def shared_out(draw):
    """(count, global batch, world, accumulate), with a global batch that can be shared and is not larger than count."""
    world, accumulate, share = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    batch_size = world * accumulate * share
    return draw(st.integers(batch_size, 6 * batch_size + 5)), batch_size, world, accumulate


SEEDS, EPOCHS = st.integers(0, 2**32), st.integers(0, 1000)


def one_device(count, batch_size, *, seed, epoch=0, **options):
    """The global batches, as lists of samples."""
    batches = GlobalBatches(count, batch_size, seed=seed, **options)
    batches.set_epoch(epoch)
    return [draw.indices for draw in batches]


def rejoined(count, batch_size, world, accumulate, *, seed, epoch):
    """For each update the samples that all ranks saw in all accumulation steps, in the order step, rank."""
    ranks = []
    for rank in range(world):
        batches = GlobalBatches(count, batch_size, seed=seed, rank=rank, world=world, accumulate=accumulate)
        batches.set_epoch(epoch)
        ranks.append([draw.indices for draw in batches])
        assert len(ranks[-1]) == len(batches) == batches.updates * accumulate
    steps = [[i for share in shares for i in share] for shares in zip(*ranks, strict=True)]
    return [[i for step in steps[n : n + accumulate] for i in step] for n in range(0, len(steps), accumulate)]


# Training.


@given(shared_out(), SEEDS, EPOCHS)
def test_an_epochs_global_batches_are_disjoint_and_leave_less_than_one_batch(shape, seed, epoch):
    count, batch_size, world, accumulate = shape
    updates = rejoined(count, batch_size, world, accumulate, seed=seed, epoch=epoch)
    seen = [index for update in updates for index in update]
    assert [len(update) for update in updates] == [batch_size] * (count // batch_size)
    assert len(set(seen)) == len(seen) == count // batch_size * batch_size
    assert set(seen) <= set(range(count))


@given(shared_out(), SEEDS, EPOCHS)
def test_every_device_count_and_accumulation_makes_the_same_updates(shape, seed, epoch):
    count, batch_size, world, accumulate = shape
    alone = one_device(count, batch_size, seed=seed, epoch=epoch)
    assert rejoined(count, batch_size, world, accumulate, seed=seed, epoch=epoch) == alone


@given(shared_out(), SEEDS, EPOCHS)
def test_the_ranks_share_a_batch_equally(shape, seed, epoch):
    count, batch_size, world, accumulate = shape
    for rank in range(world):
        batches = GlobalBatches(count, batch_size, seed=seed, rank=rank, world=world, accumulate=accumulate)
        batches.set_epoch(epoch)
        assert {len(draw.indices) for draw in batches} == {batch_size // (world * accumulate)}


@given(shared_out(), SEEDS, EPOCHS, st.data())
def test_a_resumed_epoch_draws_what_was_left_of_it_and_the_next_epoch_is_whole(shape, seed, epoch, data):
    count, batch_size, world, accumulate = shape
    rank = data.draw(st.integers(0, world - 1))

    def made():
        return GlobalBatches(count, batch_size, seed=seed, rank=rank, world=world, accumulate=accumulate)

    whole = made()
    whole.set_epoch(epoch)
    first = list(whole)
    whole.set_epoch(epoch + 1)
    second = list(whole)
    stop = data.draw(st.integers(0, len(first)))
    resumed = made()
    resumed.begin_at(epoch, stop)
    resumed.set_epoch(epoch)  # as Lightning does before each epoch
    assert list(resumed) == first[stop:]
    resumed.set_epoch(epoch + 1)
    assert list(resumed) == second


def test_order_changes_with_the_epoch_and_the_seed_and_with_nothing_else():
    assert one_device(50, 10, seed=0) == one_device(50, 10, seed=0)
    assert one_device(50, 10, seed=0) != one_device(50, 10, seed=1)
    assert one_device(50, 10, seed=0, epoch=0) != one_device(50, 10, seed=0, epoch=1)
    torch.manual_seed(5)
    np.random.seed(5)
    assert one_device(50, 10, seed=0) == one_device(50, 10, seed=0)


def test_every_sample_is_left_over_in_some_epoch_only():
    batches = GlobalBatches(11, 4, seed=0)
    left_over = set()
    for epoch in range(40):
        batches.set_epoch(epoch)
        left_over.add(frozenset(range(11)) - {i for draw in batches for i in draw.indices})
    assert set().union(*left_over) == set(range(11))
    assert len(left_over) > 20


def test_each_batch_has_its_own_seed():
    seeds = set()
    for epoch in range(3):
        for rank in range(2):
            batches = GlobalBatches(40, 8, seed=3, rank=rank, world=2)
            batches.set_epoch(epoch)
            seeds |= {draw.seed for draw in batches}
    assert len(seeds) == 3 * 2 * 5
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert draw_seed(1, 2) != draw_seed(2, 1)


@given(st.lists(st.integers(0, 8), min_size=4, max_size=60), SEEDS, EPOCHS)
def test_samples_that_belong_together_stay_next_to_each_other(blocks, seed, epoch):
    together = np.unique(np.array(blocks), return_inverse=True)[1]
    batches = GlobalBatches(len(blocks), 1, seed=seed, together=together)
    batches.set_epoch(epoch)
    order = batches.order()
    assert sorted(order.tolist()) == list(range(len(blocks)))
    changes = int((np.diff(together[order]) != 0).sum())
    assert changes == len(set(blocks)) - 1
    assert [i for draw in batches for i in draw.indices] == order.tolist()


def test_blocks_and_the_samples_inside_them_are_shuffled_anew_each_epoch():
    together = np.repeat(np.arange(10), 5)
    batches = GlobalBatches(50, 5, seed=0, together=together)
    blocks, insides = set(), set()
    for epoch in range(5):
        batches.set_epoch(epoch)
        order = batches.order()
        blocks.add(tuple(together[order][::5]))
        insides.add(tuple(i for i in order if together[i] == 0))
    assert len(blocks) == len(insides) == 5


# What can't be shared out.


@pytest.mark.parametrize(
    ("batch_size", "world", "accumulate", "nearest"), [(10, 4, 1, "8 or 12"), (10, 2, 2, "8 or 12"), (9, 2, 1, "8 or 10"), (3, 4, 2, "8")]
)
def test_a_batch_that_cannot_be_shared_is_refused_with_the_nearest_that_can(batch_size, world, accumulate, nearest):
    with pytest.raises(UserError) as caught:
        GlobalBatches(100, batch_size, seed=0, world=world, accumulate=accumulate)
    assert f"{world} devices x {accumulate} accumulated batches" in str(caught.value)
    assert str(caught.value).endswith(f"nearest: {nearest}")


def test_a_batch_larger_than_train_becomes_the_largest_that_can_be_shared():
    batches = GlobalBatches(11, 64, seed=0, world=2, accumulate=2)
    assert batches.batch_size == 8
    assert len(batches) == 2


def test_fewer_samples_than_shares_are_refused():
    with pytest.raises(UserError, match="3 training samples are too few for 4 devices x 1"):
        GlobalBatches(3, 64, seed=0, world=4)


# Evaluation.


@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 6))
def test_every_sample_is_evaluated_exactly_once_whatever_the_number_of_ranks(count, batch_size, world):
    ranks = [list(EvaluationBatches(count, batch_size, rank=rank, world=world)) for rank in range(world)]
    seen = [i for batches in ranks for draw in batches for i in draw.indices if i != PLACEHOLDER]
    assert sorted(seen) == list(range(count))


@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 6))
def test_all_ranks_make_equally_many_steps_of_equal_size(count, batch_size, world):
    made = [EvaluationBatches(count, batch_size, rank=rank, world=world) for rank in range(world)]
    sizes = {tuple(len(draw.indices) for draw in batches) for batches in made}
    assert len(sizes) == 1
    assert {len(batches) for batches in made} == {len(sizes.pop())}


@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 6))
def test_placeholders_stand_at_the_end_only_and_at_most_one_a_rank(count, batch_size, world):
    for rank in range(world):
        indices = [i for draw in EvaluationBatches(count, batch_size, rank=rank, world=world) for i in draw.indices]
        assert PLACEHOLDER not in indices[:-1]
        assert world > 1 or PLACEHOLDER not in indices
