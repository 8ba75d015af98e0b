"""How samples are shared out among train, val and test."""

import time
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusion.data.splits import assign_splits, groups_across_splits
from fusion.errors import UserError


def shared_out(labels, groups=None, splits=None, *, val=0.1, test=0.1, seed=0):
    count = len(labels)
    return assign_splits(labels, groups or [None] * count, splits or [None] * count, val=val, test=test, seed=seed)


def shared_out_if_enough(*arguments, **options):
    """None where there are too few samples, which is another test's business."""
    try:
        return shared_out(*arguments, **options)
    except UserError as error:
        if "too few" in str(error):
            return None
        raise


fractions = st.tuples(st.integers(0, 45), st.integers(0, 45)).map(lambda pair: (pair[0] / 100, pair[1] / 100))
labels = st.lists(st.sampled_from("aabbbccccdefgh"), min_size=1, max_size=80)
seeds = st.integers(0, 1000)


@given(labels, fractions, seeds)
def test_without_groups_every_class_is_exact_up_to_rounding_and_keeps_a_sample_in_train(labels, fractions, seed):
    val, test = fractions
    splits = shared_out_if_enough(labels, val=val, test=test, seed=seed)
    if splits is None:
        return
    of_class = Counter(labels)
    found = Counter(zip(labels, splits, strict=True))
    for label, count in of_class.items():
        assert found[label, "train"] >= 1
        for name, fraction in (("val", val), ("test", test)):
            assert abs(found[label, name] - count * fraction) < 1 + 1e-6
            assert not (count == 1 and found[label, name])


@given(st.integers(1, 5), st.integers(20, 60), fractions, seeds)
def test_without_rare_classes_the_whole_is_exact_up_to_rounding_too(classes, each, fractions, seed):
    val, test = fractions
    labels = [str(i % classes) for i in range(classes * each)]
    splits = Counter(shared_out(labels, val=val, test=test, seed=seed))
    for name, fraction in (("val", val), ("test", test)):
        assert splits[name] == pytest.approx(max(len(labels) * fraction, 1) if fraction else 0, abs=0.501)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.none() | st.sampled_from("uvwxyz")), min_size=1, max_size=60), fractions, seeds)
def test_groups_stay_whole_and_classes_keep_a_sample_in_train(samples, fractions, seed):
    labels, groups = [label for label, _ in samples], [group for _, group in samples]
    splits = shared_out_if_enough(labels, groups, val=fractions[0], test=fractions[1], seed=seed)
    if splits is None:
        return
    assert groups_across_splits(splits, groups) == {}
    assert {label for label, split in zip(labels, splits, strict=True) if split == "train"} == set(labels)
    for name, fraction in zip(("val", "test"), fractions, strict=True):
        assert (name in splits) == (fraction > 0)


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.none() | st.sampled_from("uvwxyz"), st.sampled_from([None, "train", "val", "test"])),
        min_size=1,
        max_size=60,
    ),
    fractions,
    seeds,
)
def test_given_splits_are_kept_and_every_sample_gets_one(samples, fractions, seed):
    labels, groups, given_splits = (list(column) for column in zip(*samples, strict=True))
    splits = shared_out_if_enough(labels, groups, given_splits, val=fractions[0], test=fractions[1], seed=seed)
    if splits is None:
        return
    assert set(splits) <= {"train", "val", "test"}
    for before, after in zip(given_splits, splits, strict=True):
        if before in ("val", "test"):
            assert after == before
        if before == "train":
            assert after == "train" or after not in given_splits


@given(labels, seeds)
def test_the_same_seed_gives_the_same_splits(labels, seed):
    groups = [str(i // 3) for i in range(len(labels))]
    assert shared_out_if_enough(labels, groups, seed=seed) == shared_out_if_enough(labels, groups, seed=seed)


def test_another_seed_gives_other_splits_with_and_without_groups():
    labels = [str(i % 3) for i in range(300)]
    groups = [str(i // 3) for i in range(300)]
    for grouped in (None, groups):
        assert len({tuple(shared_out(labels, grouped, seed=seed)) for seed in range(5)}) == 5


def test_every_sample_is_as_likely_as_any_other_of_its_class_to_be_held_out():
    held = np.zeros(40)
    for seed in range(400):
        held += np.array(shared_out(["a", "b"] * 20, val=0.25, test=0.0, seed=seed)) == "val"
    assert np.all(np.abs(held / 400 - 0.25) < 0.1)  # the standard deviation is 0.022


def test_without_a_column_both_val_and_test_are_carved():
    assert Counter(shared_out(["a"] * 100, val=0.2, test=0.1)) == {"train": 70, "val": 20, "test": 10}


def test_only_train_given_both_are_carved_and_train_and_test_given_only_val():
    assert Counter(shared_out(["a"] * 100, splits=["train"] * 100)) == {"train": 80, "val": 10, "test": 10}
    given_splits = ["train"] * 80 + ["test"] * 20
    splits = shared_out(["a"] * 100, splits=given_splits)
    assert splits[80:] == ["test"] * 20
    assert Counter(splits[:80]) == {"train": 72, "val": 8}


def test_all_three_given_nothing_is_carved_and_samples_without_split_train():
    given_splits = ["train"] * 10 + ["val"] * 5 + ["test"] * 5 + [None] * 10
    assert shared_out(["a"] * 30, splits=given_splits) == given_splits[:20] + ["train"] * 10


def test_a_fraction_of_zero_means_none():
    assert set(shared_out(["a", "b"] * 50, val=0.0, test=0.2)) == {"train", "test"}
    assert set(shared_out(["a", "b"] * 50, val=0.0, test=0.0)) == {"train"}


def test_a_sample_without_split_follows_its_group():
    splits = shared_out(["a"] * 40, ["g", "g", *map(str, range(38))], ["test", *[None] * 39], val=0.2)
    assert splits[:2] == ["test", "test"]
    assert Counter(splits[2:])["val"] == 8


def test_a_train_sample_whose_group_is_in_test_is_not_carved_into_val_as_well():
    for seed in range(20):
        splits = shared_out(["a"] * 10, ["g", "g", *map(str, range(8))], ["test", *["train"] * 9], val=0.5, seed=seed)
        assert splits[1] == "train"


def test_with_many_classes_of_few_samples_val_still_gets_its_share():
    labels = [str(i // 3) for i in range(3000)]
    assert Counter(shared_out(labels)) == {"train": 2400, "val": 300, "test": 300}
    groups = [str(i // 4) for i in range(12_000)]
    in_groups = Counter(shared_out([str(i // 12) for i in range(12_000)], groups))  # 1000 classes, each of 3 groups of 4
    assert in_groups["val"] > 1000
    assert in_groups["test"] > 1000


@pytest.mark.parametrize("sizes", ["equal", "long-tailed"])
def test_groups_bring_every_class_near_its_fraction(sizes):
    random = np.random.default_rng(0)
    labels = random.choice(list("abcdefgh"), 20_000, p=[0.4, 0.2, 0.15, 0.1, 0.06, 0.04, 0.03, 0.02]).tolist()
    weights = np.ones(2000) if sizes == "equal" else 1 / np.arange(1, 2001)
    groups = [f"g{i}" for i in random.choice(2000, 20_000, p=weights / weights.sum())]
    splits = shared_out(labels, groups, val=0.1, test=0.2)
    found = Counter(zip(labels, splits, strict=True))
    for label, count in Counter(labels).items():
        for name, fraction in (("val", 0.1), ("test", 0.2)):
            # Whole groups drawn at random would miss by sqrt(fraction * count), 9 to 40 samples.
            assert abs(found[label, name] - fraction * count) <= 5, (label, name)


def test_as_few_groups_as_splits_still_fill_all_three():
    for seed in range(10):
        splits = shared_out(["a", "b"] * 6, [str(i // 4) for i in range(12)], seed=seed)
        assert set(splits) == {"train", "val", "test"}


def test_missing_labels_count_as_one_class():
    splits = shared_out([None] * 50 + ["a"] * 50)
    assert Counter(splits[:50]) == Counter(splits[50:]) == {"train": 40, "val": 5, "test": 5}


@pytest.mark.parametrize(("val", "test"), [(-0.1, 0.1), (1.0, 0.0), (0.1, 1.5), (float("nan"), 0.1), (0.5, 0.5), (0.1, 10)])
def test_fractions_that_make_no_sense_are_refused(val, test):
    with pytest.raises(UserError, match=r"data\.(val|test)"):
        shared_out(["a"] * 10, val=val, test=test)


@pytest.mark.parametrize(
    ("labels", "groups", "splits"),
    [
        (["a"], None, None),
        (["a", "b", "c"], None, None),
        (["a"] * 10, ["g"] * 10, None),
        (["a"] * 10, None, ["test"] * 10),
        ([], [], []),
    ],
)
def test_too_few_samples_for_val_are_refused_with_what_to_do(labels, groups, splits):
    with pytest.raises(UserError, match="too few to carve val") as caught:
        shared_out(labels, groups, splits)
    for part in ("--data.val=0", "--data.val_manifest=FILE"):
        assert part in str(caught.value)


def test_groups_across_splits_names_each_group_and_its_splits():
    splits = ["train", "test", "val", "val", "train", None, "train", "test"]
    groups = ["a", "a", "a", "b", "b", "c", None, None]
    assert groups_across_splits(splits, groups) == {"a": {"train", "val", "test"}, "b": {"train", "val"}}


@given(st.lists(st.tuples(st.sampled_from([None, "train", "val", "test"]), st.none() | st.sampled_from("abc")), max_size=20))
def test_groups_across_splits_agrees_with_the_definition(samples):
    expected = defaultdict(set)
    for split, group in samples:
        if split and group:
            expected[group].add(split)
    found = groups_across_splits([split for split, _ in samples], [group for _, group in samples])
    assert found == {group: there for group, there in expected.items() if len(there) > 1}


@pytest.mark.slow
@pytest.mark.parametrize(("per_group", "limit"), [(None, 9), (10, 30)])
def test_a_million_samples_are_shared_out_in_seconds(per_group, limit):
    labels = [f"c{i}" for i in np.random.default_rng(0).choice(1000, 1_000_000)]
    groups = [None if per_group is None else f"g{i // per_group}" for i in range(len(labels))]
    begun = time.perf_counter()
    shared_out(labels, groups)
    taken = time.perf_counter() - begun
    print(f"{taken:.1f} s")
    assert taken < limit  # measured: 1.1 and 3.3 s on a shared core
