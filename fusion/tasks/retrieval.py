"""Retrieval: two groups of inputs embedded in one space, in which those that belong together are near."""

import json
from collections.abc import Hashable, Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torchmetrics import MetricCollection

from fusion.errors import UserError
from fusion.heads import DualEncoder, FusionHead
from fusion.losses import info_nce_loss, sigmoid_pair_loss
from fusion.processing.answers import Similarities
from fusion.tasks.base import OnUnseen, Pool, Task
from fusion.tasks.metrics import Pairs, collected, collecting, retrieval_ranks, retrieval_scores

SCORES = ("recall_1", "recall_5", "recall_10", "median_rank", "mean_rank")
MISSING = -1
LOSS_ROWS = 256  # samples whose validation loss is computed at once


class Retrieval(Task):
    """Find the text of an image and the image of a text, or of any two groups of inputs.

    Every row of the manifest is a pair; there is no label. Each sample's pair is contrasted with all samples of its update, on all devices
    and in all accumulated batches, which therefore share no item of either side.

    Target: (B, 2) int64, the number of the left and of the right item, equal for equal items. Values: (B, 2 (dim + 1)), as the head
    DualEncoder gives them: inner products are logits.

    Scores: recall_1, recall_5, recall_10, median_rank and mean_rank of the best of the right candidates (several captions of an image are
    all right), means of both directions, and each of each direction.

    Args:
        dim: width of the embedding.
        loss: "info_nce", CLIP's symmetric cross entropy over the update, or "sigmoid", SigLIP's binary decision about every pair, for which
            the head needs a bias.
        left: inputs of the first side, as the head's; the first input at the default.
        right: inputs of the other side, as the head's; all inputs that are not on the left at the default.

    >>> task = Retrieval()
    >>> task.encode(task.pair({"image": ["a.png", "a.png"], "text": ["a dog", None]})[:1]).tolist()
    [[0, 0]]
    """

    monitor = "recall_1"
    bounded = "recall_1"
    minimised = frozenset({"loss"} | {name for name in SCORES if name.endswith("rank")})
    headline: ClassVar[Mapping[str, str]] = {"R@1": "recall_1", "R@5": "recall_5", "R@10": "recall_10", "median rank": "median_rank"}
    baseline = "chance"
    figure_names = ("temperature",)
    contrasts = draws_apart = scores_loss = True
    mixable = False

    def __init__(
        self,
        dim: int = 256,
        loss: Literal["info_nce", "sigmoid"] = "info_nce",
        left: list[str] | None = None,
        right: list[str] | None = None,
    ) -> None:
        super().__init__()
        if dim < 1:
            raise UserError(f"task: dim is {dim}; expected at least 1")
        if loss not in ("info_nce", "sigmoid"):
            raise UserError(f"task: loss is '{loss}'; expected info_nce or sigmoid")
        self.dim, self.kind, self.left, self.right = dim, loss, left, right
        self.sides = ("left", "right")  # names of the sides in the scores, known with the inputs
        self.names = ["similarity"]

    @property
    def out_dim(self) -> int:
        return 2 * (self.dim + 1)

    def check_head(self, head: FusionHead) -> None:
        if not isinstance(head, DualEncoder):
            raise UserError(
                f"{type(self).__name__} embeds two sides apart, but the head {type(head).__name__} fuses them: use --model.head=DualEncoder"
            )
        own = {"left": self.left, "right": self.right}
        for side, names in head.sides.items():
            if own[side] is not None and sorted(own[side] or ()) != sorted(names):
                raise UserError(f"task: {side} is {own[side]}, but the head's {side} is {names}; give both the same inputs")
        if self.kind == "sigmoid" and head.bias is None:
            raise UserError("task: loss=sigmoid needs a bias of the logits: --model.head.bias=-10, and --model.head.temperature=0.1")
        if self.kind != "sigmoid" and head.bias is not None:
            raise UserError("head: bias has no effect on loss=info_nce, which compares logits; leave it out, or set loss=sigmoid")

    # Targets

    @property
    def target_columns(self) -> list[str]:
        return []

    def joined(
        self, columns: Mapping[str, Sequence[str | None]], bad: dict[int, str], inputs: Mapping[str, Iterable[Hashable]]
    ) -> list[str | None]:
        return self.pair(inputs)

    def pair(self, inputs: Mapping[str, Iterable[Hashable]]) -> list[str | None]:
        """One cell per sample from the identities of its inputs, by name; None for one that lacks a side."""
        names = list(inputs)
        left = self.left or [name for name in names if name not in (self.right or names[1:])]
        right = self.right or [name for name in names if name not in left]
        for name in (*left, *right):
            if name not in names:
                raise UserError(f"task: there is no input '{name}' for a side; the inputs are {', '.join(names)}")
        if not left or not right:
            raise UserError(f"{type(self).__name__} needs inputs on two sides; there is only {', '.join(names)}")
        self.sides = ("+".join(left), "+".join(right))
        columns = {name: list(values) for name, values in inputs.items()}
        sides = [list(zip(*(columns[name] for name in side), strict=True)) for side in (left, right)]
        return [
            None if absent(one) or absent(other) else json.dumps([digest(one), digest(other)]) for one, other in zip(*sides, strict=True)
        ]

    def check(self, cell: str | None) -> str | None:
        return f"no {' or no '.join(self.sides)}: both are needed for a pair" if cell is None else None

    def learn(self, cells: Mapping[str, Sequence[str | None]], *, column: str, on_unseen: OnUnseen) -> None:
        target = self.encode(cells.get("train", ()))
        for side, name in enumerate(self.sides):
            distinct = len(np.unique(target[:, side]))
            if distinct < 2:
                what = "no pair is left" if not len(target) else f"all {len(target):,} pairs have the same {name}"
                raise UserError(f"{type(self).__name__} needs at least two different items on each side: in the training split {what}")

    def encode(self, cells: Sequence[str | None]) -> np.ndarray:
        numbers: tuple[dict[str, int], dict[str, int]] = ({}, {})
        target = np.full((len(cells), 2), MISSING, dtype=np.int64)
        for i, cell in enumerate(cells):
            for side, item in enumerate(json.loads(cell) if cell is not None else ()):
                target[i, side] = numbers[side].setdefault(item, len(numbers[side]))
        return target

    def strata(self, cells: Sequence[str | None]) -> list[str]:
        return ["pair"] * len(cells)

    def units(self, cells: Sequence[str | None]) -> list[str | None]:
        return [cell and json.loads(cell)[0] for cell in cells]

    def summary(self, cells: Sequence[str | None]) -> str:
        target = self.encode(cells)
        return ", ".join(f"{len(np.unique(target[:, side])):,} different {name}s" for side, name in enumerate(self.sides))

    # Loss

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """The loss (B,) of each sample among these."""
        return self.contrast(Pool(output, target, torch.arange(len(output), device=output.device)))

    def contrast(self, pool: Pool) -> Tensor:
        """A sample that lacks a side is no candidate and has loss 0; the others' losses are scaled so that the mean over all is theirs."""
        lefts, rights = pool.output.chunk(2, dim=1)
        left, right = lefts[pool.scored], rights[pool.scored]
        complete = (lefts != 0).any(dim=1) & (rights != 0).any(dim=1)
        # No negatives: other pairs of the same image or text, and pairs that lack a side.
        excluded = (pool.target[pool.scored][:, None] == pool.target[None]).any(dim=2) | ~complete
        target = pool.scored.where(complete[pool.scored], -100)
        if self.kind == "sigmoid":
            loss = sigmoid_pair_loss(left, right, rights=rights, target=target, excluded=excluded)
        else:
            loss = info_nce_loss(left, right, lefts=lefts, rights=rights, target=target, excluded=excluded)
        return loss * (len(complete) / complete.sum().clamp(min=1))

    def plain_loss(self, output: Tensor, target: Tensor) -> Tensor:
        """NaN: a pair has no loss by itself; that of a whole split is among the scores."""
        return output.new_full((len(output),), torch.nan)

    # Scores and answers

    def values(self, output: Tensor) -> Tensor:
        return output.float()

    def answering(self) -> Similarities:
        return Similarities(self.names)

    def metrics(self) -> MetricCollection:
        return collecting(self.out_dim, torch.zeros(0, 2, dtype=torch.int64))

    def update(self, metrics: MetricCollection, values: Tensor, target: Tensor) -> None:
        metrics.update(values, target)

    def scores(self, metrics: MetricCollection) -> dict[str, Tensor]:
        values, target = collected(metrics)
        if not len(target):
            return {}
        left, right = values.chunk(2, dim=1)
        losses = [self.contrast(Pool(values, target, rows)) for rows in torch.arange(len(values)).split(LOSS_ROWS)]
        return retrieval_scores(retrieval_ranks(Pairs.of(left, right, target)), self.sides) | {"loss": torch.cat(losses).mean()}

    def metric_names(self) -> list[str]:
        one, other = self.sides
        return [*SCORES, *(f"{direction}_{name}" for direction in (f"{one}_to_{other}", f"{other}_to_{one}") for name in SCORES)]

    def batch_figures(self, output: Tensor, target: Tensor) -> dict[str, Tensor]:
        left, right = (side[:, :-1].float().square().sum(dim=1) for side in output.chunk(2, dim=1))
        return {"temperature": 1 / torch.maximum(left, right).amax()}  # of samples that lack a side, the other one's

    def columns(self, values: np.ndarray) -> dict[str, list[Any]]:
        return {}

    def bound(self, seen: Sequence[Hashable], cells: Sequence[str | None]) -> float:
        """The recall_1 of a random order: the mean over both directions' queries of the share of right candidates."""
        pairs = np.unique(self.encode(cells), axis=0)
        counts = [len(np.unique(pairs[:, side])) for side in (0, 1)]
        return len(pairs) / (counts[0] * counts[1])

    def learnt(self) -> dict[str, Any]:
        return {"sides": list(self.sides)}

    def set_learnt(self, learnt: dict[str, Any]) -> None:
        self.sides = learnt["sides"][0], learnt["sides"][1]


def absent(cells: Sequence[Hashable]) -> bool:
    return all(cell is None for cell in cells)


def digest(cells: Sequence[Hashable]) -> str:
    return blake2b(repr(cells).encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()
