"""Ranks of the right candidates in retrieval, exact, computed in chunks."""

import torch
from torch import Tensor

CHUNK_VALUES = 2**22  # scores computed at once


class Pairs:
    """The distinct items of both sides of a set of pairs, and which belong together.

    lefts (U, D), rights (V, D): the embeddings of the distinct items. left, right (P,) int64: the distinct pairs, by their items' numbers.
    """

    def __init__(self, lefts: Tensor, rights: Tensor, left: Tensor, right: Tensor) -> None:
        self.lefts, self.rights, self.left, self.right = lefts, rights, left, right

    @classmethod
    def of(cls, left: Tensor, right: Tensor, ids: Tensor) -> "Pairs":
        """From pairs: embeddings left and right (P, D), and ids (P, 2) int64 of their items, equal for equal items. Pairs with a negative
        id are left out.

        >>> pairs = Pairs.of(torch.eye(3), torch.eye(3), torch.tensor([[7, 0], [7, 1], [8, 2]]))
        >>> len(pairs.lefts), len(pairs.rights), pairs.left.tolist()
        (2, 3, [0, 0, 1])
        """
        known = (ids >= 0).all(dim=1)
        items, numbers = [], []
        for side, embeddings in enumerate((left, right)):
            distinct, inverse = torch.unique(ids[known, side], return_inverse=True)
            first = torch.full_like(distinct, len(inverse)).scatter_reduce(0, inverse, torch.arange(len(inverse)), "amin")
            items.append(embeddings[known.nonzero()[first, 0]])
            numbers.append(inverse)
        distinct_pairs = torch.unique(torch.stack(numbers, dim=1), dim=0)
        return cls(items[0], items[1], distinct_pairs[:, 0], distinct_pairs[:, 1])


def retrieval_ranks(pairs: Pairs) -> tuple[Tensor, Tensor]:
    """The rank, from 1, of the best of the right candidates of each left item (U,), and of each right item (V,).

    Candidates are ordered by their inner product with the query. One that isn't right and has the same score counts as ranked before, so
    that equal embeddings rank last, and NaN does too. The scores are computed in chunks: memory grows with the number of items.

    >>> pairs = Pairs.of(torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[0, 0], [1, 1]]))
    >>> [ranks.tolist() for ranks in retrieval_ranks(pairs)]
    [[2, 2], [1, 2]]
    """
    lefts, rights = pairs.lefts.float(), pairs.rights.float()
    own = (lefts[pairs.left] * rights[pairs.right]).sum(dim=1)
    best_of_left = torch.full((len(lefts),), -torch.inf).scatter_reduce(0, pairs.left, own, "amax")
    best_of_right = torch.full((len(rights),), -torch.inf).scatter_reduce(0, pairs.right, own, "amax")
    order = pairs.left.argsort(stable=True)
    left, right = pairs.left[order], pairs.right[order]
    before_of_left = torch.zeros(len(lefts), dtype=torch.int64)
    before_of_right = torch.zeros(len(rights), dtype=torch.int64)
    rows = max(1, CHUNK_VALUES // max(1, len(rights)))
    for start in range(0, len(lefts), rows):
        stop = min(start + rows, len(lefts))
        scores = lefts[start:stop] @ rights.T
        begin, end = torch.searchsorted(left, torch.tensor([start, stop])).tolist()
        scores[left[begin:end] - start, right[begin:end]] = -torch.inf
        # Not below, instead of at least: NaN counts as ranked before.
        before_of_left[start:stop] = (~(scores < best_of_left[start:stop, None])).sum(dim=1)
        before_of_right += (~(scores < best_of_right)).sum(dim=0)
    return (before_of_left + 1).clamp(max=len(rights)), (before_of_right + 1).clamp(max=len(lefts))


def retrieval_scores(ranks: tuple[Tensor, Tensor], names: tuple[str, str], ks: tuple[int, ...] = (1, 5, 10)) -> dict[str, Tensor]:
    """recall_K, median_rank and mean_rank of both directions' mean, then of each direction, such as image_to_text_recall_1.

    recall_K is the share of queries for which at least one right candidate is among the first K, as is usual for several captions of an
    image. Empty where there are no pairs.

    Args:
        ranks: as `retrieval_ranks` gives them.
        names: of the two sides.
        ks: the numbers of first candidates.

    >>> scores = retrieval_scores((torch.tensor([1, 2]), torch.tensor([1, 7])), ("image", "text"))
    >>> {name: float(scores[name]) for name in ("recall_1", "recall_5", "mean_rank", "text_to_image_median_rank")}
    {'recall_1': 0.5, 'recall_5': 0.75, 'mean_rank': 2.75, 'text_to_image_median_rank': 4.0}
    """
    if not all(map(len, ranks)):
        return {}
    directions = {f"{names[0]}_to_{names[1]}": ranks[0], f"{names[1]}_to_{names[0]}": ranks[1]}
    of = {
        direction: {f"recall_{k}": (rank <= k).double().mean() for k in ks}
        | {"median_rank": median(rank), "mean_rank": rank.double().mean()}
        for direction, rank in directions.items()
    }
    one, other = of.values()
    mean = {name: (one[name] + other[name]) / 2 for name in one}
    return mean | {f"{direction}_{name}": value for direction, scores in of.items() for name, value in scores.items()}


def median(ranks: Tensor) -> Tensor:
    """The mean of the middle two, or the middle one (torch.median gives the lower of two)."""
    ordered = ranks.double().sort().values
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
