"""Batches in which no two samples share an item, as contrastive losses need: a shared one would be its own negative."""

from collections import defaultdict, deque

import numpy as np

from fusion.errors import UserError

WINDOW = 4  # batches' worth of samples looked at at a time
TRIES = 3


def distinct_batches(order: np.ndarray, items: np.ndarray, batch_size: int, rng: np.random.Generator) -> np.ndarray:
    """Rearranges an epoch's samples into len(order) // batch_size consecutive batches without shared items.

    Each sample comes at most once, in about this order: one that shares an item with the batch waits for a next one. Where the samples that
    are left don't fill the last batches, others of the epoch come a second time.

    Args:
        order: (n,) a permutation of samples.
        items: (count, S) int64, the number of each sample's item on each of S sides.
        batch_size: samples in a batch.
        rng: draws the samples that come twice.

    Raises UserError where no such batch is found.

    >>> items = np.array([[0, 0], [0, 1], [1, 2], [1, 3]])
    >>> items[distinct_batches(np.arange(4), items, 2, np.random.default_rng(0))][:, 0].tolist()
    [0, 1, 0, 1]
    """
    batches = []
    waiting, position = order[:0], 0
    for _ in range(len(order) // batch_size):
        batch = order[:0]
        while len(batch) < batch_size:
            ahead = order[position : position + WINDOW * batch_size]
            position += len(ahead)
            looked_at, later = np.split(np.concatenate([waiting, ahead]), [2 * WINDOW * batch_size])
            batch, waiting = extended(batch, looked_at, items, batch_size)
            waiting = np.concatenate([waiting, later])
            if not len(ahead):
                break
        batches.append(batch if len(batch) == batch_size else refilled(batch, order, items, batch_size, rng))
    return np.concatenate(batches) if batches else order[:0]


def extended(batch: np.ndarray, candidates: np.ndarray, items: np.ndarray, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The batch with as many of the candidates as fit, the first ones first; and the candidates that are left."""
    while len(batch) < batch_size and len(candidates):
        fits = np.ones(len(candidates), dtype=bool)
        for side in range(items.shape[1]):
            of_side = items[candidates, side]
            fits &= ~np.isin(of_side, items[batch, side])
            # Of the candidates that fit on the earlier sides, only the first with each item.
            numbers = np.flatnonzero(fits)
            fits[:] = False
            fits[numbers[np.unique(of_side[numbers], return_index=True)[1]]] = True
        chosen = np.flatnonzero(fits)[: batch_size - len(batch)]
        if not len(chosen):
            break
        batch = np.concatenate([batch, candidates[chosen]])
        candidates = np.delete(candidates, chosen)
    return batch, candidates


def refilled(batch: np.ndarray, order: np.ndarray, items: np.ndarray, batch_size: int, rng: np.random.Generator) -> np.ndarray:
    """The batch filled up with any samples of the epoch, else another one. Raises UserError where there is none of this size."""
    largest = 0
    for start in (batch, *[order[:0]] * TRIES):
        full = extended(start, rng.permutation(order), items, batch_size)[0]
        if len(full) == batch_size:
            return full
        largest = max(largest, len(full))
    if items.shape[1] == 2:
        exact = largest_matching(rng.permutation(order), items)
        if len(exact) >= batch_size:
            return rng.permutation(exact)[:batch_size]
        largest = len(exact)
    raise UserError(
        f"data.batch_size is {batch_size}, but there are no {batch_size} training pairs without a common item: at most {largest}; set "
        f"--data.batch_size={largest} or less"
    )


def largest_matching(order: np.ndarray, items: np.ndarray) -> np.ndarray:
    """A largest set of samples without shared items on both of two sides: a maximum bipartite matching, by augmenting paths.

    >>> largest_matching(np.arange(4), np.array([[0, 0], [0, 1], [1, 0], [2, 2]])).tolist()  # not sample 0, with which neither 1 nor 2 fits
    [2, 1, 3]
    """
    of_left = defaultdict(list)
    for sample in order.tolist():
        of_left[int(items[sample, 0])].append(sample)
    chosen: dict[int, int] = {}  # by right item
    for start in of_left:
        reached: dict[int, tuple[int | None, int]] = {}  # right item: the right item before it on the path, and the sample that leads to it
        queue: deque[tuple[int, int | None]] = deque([(start, None)])
        end = None
        while queue and end is None:
            left, before = queue.popleft()
            for sample in of_left[left]:
                right = int(items[sample, 1])
                if right in reached:
                    continue
                reached[right] = (before, sample)
                if right not in chosen:
                    end = right
                    break
                queue.append((int(items[chosen[right], 0]), right))
        while end is not None:
            before, sample = reached[end]
            chosen[end] = sample
            end = before
    return np.array(list(chosen.values()), dtype=np.int64)
