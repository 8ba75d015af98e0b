"""Assigns samples to train, val and test: given splits are preserved, missing ones carved out of train, stratified, with groups whole."""

from collections.abc import Hashable, Sequence

import numpy as np

from fusion.errors import UserError

BIT = {"train": 1, "val": 2, "test": 4}
# Weight of a split's size relative to its classes, when a group is placed. Without it, classes too rare for val would all go to train.
SIZE_WEIGHT = 8.0


def assign_splits(
    labels: Sequence[str | None], groups: Sequence[str | None], splits: Sequence[str | None], *, val: float, test: float, seed: int
) -> list[str]:
    """Train, val or test for each sample, by `seed`.

    Given splits are preserved. Val and test, each if no sample is given to it, are carved out of the samples that are train or have no
    split: the fraction `val` or `test` of them, stratified by class. Samples without group match the fractions up to rounding in every
    class. Groups stay whole: the largest first, each goes to the split where it brings the classes closest to their fractions. A class
    retains at least one sample in train. A sample without split follows its group, if the group has one.

    Raises UserError for fractions that are not in [0, 1) or leave nothing to train on, and for a split that would be empty.

    >>> splits = assign_splits(["yes", "no"] * 10, [None] * 20, [None] * 18 + ["test"] * 2, val=1 / 3, test=0.5, seed=0)
    >>> splits.count("train"), splits.count("val"), splits[18:]  # test is given, so none is carved
    (12, 6, ['test', 'test'])
    """
    reject_fractions(val, test)
    fractions = {name: fraction for name, fraction in (("val", val), ("test", test)) if fraction and name not in splits}
    settled = fixed_splits(splits, groups)
    pool = [i for i, split in enumerate(settled) if split is None]
    names = [*fractions, "train"]
    chosen = carve([labels[i] for i in pool], [groups[i] for i in pool], list(fractions.values()), np.random.default_rng(seed))
    for name, count in zip(fractions, np.bincount(chosen, minlength=len(names)).tolist(), strict=False):
        if not count:
            raise UserError(
                f"{len(pool):,} samples are too few to carve {name} out of them (data.{name}={fractions[name]:g}): every class retains "
                "a sample in train, and groups stay whole. Add samples, give a separate file "
                f"(--data.{name}_manifest=FILE), or run without it (--data.{name}=0)"
            )
    for i, choice in zip(pool, chosen.tolist(), strict=True):
        settled[i] = names[choice]
    return [split or "train" for split in settled]


def draw_stratified(labels: Sequence[str | None], count: int, seed: int) -> list[int]:
    """The positions of `count` samples drawn at random by `seed`, stratified by class, in ascending order: each class has its share up to
    rounding, but at least one sample. All positions if there are no more. Raises UserError for a count below the number of classes.

    >>> labels = ["yes"] * 60 + ["no"] * 30 + ["maybe"]
    >>> [sum(labels[i] == label for i in draw_stratified(labels, 12, seed=0)) for label in ("yes", "no", "maybe")]
    [7, 4, 1]
    """
    classes = numbered(labels)
    sizes = np.bincount(classes)
    if count < len(sizes):
        raise UserError(f"data.train_samples is {count}; expected at least one sample of each of the {len(sizes)} training classes")
    if count >= len(labels):
        return list(range(len(labels)))
    random = np.random.default_rng(seed)
    # One of each class first, then the rest in proportion.
    wanted = np.maximum(sizes * (count / len(labels)) - 1, 0)
    wanted *= (count - len(sizes)) / max(wanted.sum(), 1e-9)
    take = 1 + apportion(wanted[None], sizes - 1, np.array([count - len(sizes)]), random)[0]
    shuffled = random.permutation(len(labels))
    return sorted(int(i) for c in range(len(sizes)) for i in shuffled[classes[shuffled] == c][: take[c]])


def groups_across_splits(splits: Sequence[str | None], groups: Sequence[str | None]) -> dict[str, set[str]]:
    """The groups with samples in more than one split, and these splits; samples without split or group are ignored.

    >>> sorted(groups_across_splits(["train", "test", "val"], ["a", "a", "b"])["a"])
    ['test', 'train']
    """
    return {
        group: {split for split, bit in BIT.items() if mask & bit}
        for group, mask in splits_of_groups(splits, groups).items()
        if mask not in BIT.values()
    }


def splits_of_groups(splits: Sequence[str | None], groups: Sequence[str | None]) -> dict[str, int]:
    """The splits of each group as a bit mask: a million sets would take seconds."""
    masks: dict[str, int] = {}
    for split, group in zip(splits, groups, strict=True):
        if split is not None and group is not None:
            masks[group] = masks.get(group, 0) | BIT[split]
    return masks


def reject_fractions(val: float, test: float) -> None:
    for name, fraction in (("val", val), ("test", test)):
        if not 0 <= fraction < 1:
            raise UserError(f"data.{name} is {fraction}; expected a fraction of the samples, from 0 (none) to less than 1")
    if val + test >= 1:
        raise UserError(f"data.val is {val} and data.test {test}: together they leave nothing to train on; expected a sum below 1")


def fixed_splits(splits: Sequence[str | None], groups: Sequence[str | None]) -> list[str | None]:
    """The splits that are fixed; None for the samples that may be distributed."""
    given = splits_of_groups(splits, groups)
    settled: list[str | None] = []
    for split, group in zip(splits, groups, strict=True):
        of_group = given.get(group, 0) if group is not None else 0
        if split in ("val", "test"):
            settled.append(split)
        elif of_group <= BIT["train"]:
            settled.append(None)
        else:
            # Part of its group is held out: distributing this sample could bring the group into yet another split.
            settled.append(split or next(name for name, bit in BIT.items() if of_group & bit))
    return settled


# Below, classes are numbered 0 .. C-1, the splits to carve (val, test) 0 .. S-1, and train S.


def carve(
    labels: Sequence[str | None], groups: Sequence[str | None], fractions: Sequence[float], random: np.random.Generator
) -> np.ndarray:
    """The split of each sample (n,): its number in `fractions`, or len(fractions) for train."""
    chosen = np.full(len(labels), len(fractions), dtype=np.int8)
    if not fractions or not labels:
        return chosen
    classes = numbered(labels)
    totals = np.array([max(1, round(len(labels) * fraction)) for fraction in fractions])
    in_group = place_groups(classes, groups, fractions, chosen, random)
    place_singles(classes, np.flatnonzero(~in_group), fractions, totals, chosen, random)
    return chosen


def place_singles(
    classes: np.ndarray,
    singles: np.ndarray,
    fractions: Sequence[float],
    totals: np.ndarray,
    chosen: np.ndarray,
    random: np.random.Generator,
) -> None:
    """Distribute samples without group, so that each class and the total are as close to the fractions as whole samples allow."""
    count = int(classes.max()) + 1
    placed = np.ones(len(chosen), dtype=bool)
    placed[singles] = False
    counts = np.stack([np.bincount(classes[placed & (chosen == split)], minlength=count) for split in range(len(fractions) + 1)])
    wanted = np.array(fractions)[:, None] * np.bincount(classes, minlength=count) - counts[:-1]
    # One sample of each class is reserved for train, unless a group has contributed one.
    available = np.maximum(np.bincount(classes[singles], minlength=count) - (counts[-1] == 0), 0)
    take = apportion(wanted, available, totals - counts[:-1].sum(1), random)

    shuffled = random.permutation(singles)
    shuffled = shuffled[np.argsort(classes[shuffled], kind="stable")]
    sizes = np.bincount(classes[singles], minlength=count)
    rank = np.arange(len(shuffled)) - np.repeat(np.cumsum(sizes) - sizes, sizes)  # of a sample within its class
    first = np.zeros(count, dtype=np.int64)
    for split, amount in enumerate(take):
        of_class = classes[shuffled]
        chosen[shuffled[(rank >= first[of_class]) & (rank < (first + amount)[of_class])]] = split
        first += amount


def apportion(wanted: np.ndarray, available: np.ndarray, totals: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Integers (S, C) close to `wanted`, at most `available` (C,) in sum: rounded down, then up by largest remainder, to `totals` (S,)."""
    take = np.floor(np.maximum(wanted, 0) + 1e-9).astype(np.int64)
    exceeded = take.sum(0) > available
    take[:, exceeded] = take[:, exceeded] * available[exceeded] // take.sum(0)[exceeded]
    available = available - take.sum(0)
    for split in range(len(wanted)):
        remainder = wanted[split] - take[split]
        candidates = random.permutation(np.flatnonzero((remainder > 1e-9) & (available > 0)))
        candidates = candidates[np.argsort(-remainder[candidates], kind="stable")][: max(int(totals[split] - take[split].sum()), 0)]
        take[split, candidates] += 1
        available[candidates] -= 1
    return take


def place_groups(
    classes: np.ndarray, groups: Sequence[str | None], fractions: Sequence[float], chosen: np.ndarray, random: np.random.Generator
) -> np.ndarray:
    """Write the split of every group of two or more samples into `chosen`; returns the mask of those samples (n,)."""
    group = numbered([i if name is None else name for i, name in enumerate(groups)])
    sizes = np.bincount(group)
    in_group = sizes[group] > 1
    large = random.permutation(np.flatnonzero(sizes > 1))
    large = large[np.argsort(-sizes[large], kind="stable")]
    if len(large):
        contents = class_counts(group[in_group], classes[in_group], large)
        split_of = np.zeros(len(sizes), dtype=chosen.dtype)
        split_of[large] = place_greedily(contents, np.bincount(classes), fractions, len(sizes), random)
        chosen[in_group] = split_of[group[in_group]]
    return in_group


def place_greedily(
    contents: list[list[tuple[int, int]]], of_class: np.ndarray, fractions: Sequence[float], units: int, random: np.random.Generator
) -> list[int]:
    """The split of each group; groups are given by their (class, count) pairs, largest first. units: number of groups and single samples.

    A group goes where it adds least to the sum of (got - target)^2 / target over the classes and the size of the splits.
    """
    train = len(fractions)
    shares = [*fractions, 1 - sum(fractions)]
    target = [(share * of_class).tolist() for share in shares]
    target_size = [share * int(of_class.sum()) for share in shares]
    got, got_size = [[0] * len(of_class) for _ in shares], [0] * len(shares)
    left = of_class.tolist()
    placed = []
    for units_left, pairs, tie in zip(range(units, 0, -1), contents, random.random(len(contents)).tolist(), strict=False):
        size = sum(k for _, k in pairs)
        empty = [split for split in range(train) if not got_size[split]]
        options: Sequence[int] = range(train + 1)
        if any(not got[train][c] and left[c] == k for c, k in pairs):
            options = [train]  # the last samples of a class that train can get
        elif units_left <= len(empty):
            options = empty
        costs = []
        for split in options:
            g, t = got[split], target[split]
            cost = SIZE_WEIGHT * size * (size + 2 * (got_size[split] - target_size[split])) / target_size[split]
            for c, k in pairs:
                cost += k * (k + 2 * (g[c] - t[c])) / t[c]
            costs.append(cost)
        least = min(costs)
        cheapest = [split for split, cost in zip(options, costs, strict=True) if cost == least]
        split = cheapest[int(tie * len(cheapest))]
        for c, k in pairs:
            got[split][c] += k
            left[c] -= k
        got_size[split] += size
        placed.append(split)
    return placed


def class_counts(group: np.ndarray, classes: np.ndarray, order: np.ndarray) -> list[list[tuple[int, int]]]:
    """For each group of `order`, its (class, number of samples) pairs."""
    count = int(classes.max()) + 1
    keys, counts = np.unique(group * count + classes, return_counts=True)
    pairs = list(zip((keys % count).tolist(), counts.tolist(), strict=True))
    owner = keys // count
    starts, ends = np.searchsorted(owner, order).tolist(), np.searchsorted(owner, order, side="right").tolist()
    return [pairs[start:end] for start, end in zip(starts, ends, strict=True)]


def numbered(names: Sequence[Hashable]) -> np.ndarray:
    """Integer codes of the names, from 0 in order of first appearance; equal names get equal codes."""
    known: dict[Hashable, int] = {}
    return np.array([known.setdefault(name, len(known)) for name in names], dtype=np.int64)
