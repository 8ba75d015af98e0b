"""Ordinal regression: one class of several that have an order."""

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassCohenKappa

from fusion.cell_text import NUMBER
from fusion.errors import UserError
from fusion.losses import cumulative_link_loss, cumulative_log_probabilities, cumulative_logits, soft_target_loss
from fusion.processing.answers import OrderedClasses
from fusion.tasks.base import OnUnseen, Task
from fusion.tasks.classification import by_name, counted, reject_unseen
from fusion.tasks.metrics import binary_scores, collected, collecting


class Ordinal(Task):
    """Predict one class of several in an order, such as 1 to 5 stars, or low, middle and high.

        l = -log P(y)            P(y > k) = sigmoid(f - sum_{j <= k} softplus(output_j)), f = output_0

    A cumulative link model (`fusion.losses.cumulative_link_loss`); the answer is the median class, which has the least expected error.

    Target: (B,) int64, the class's index in the order. Values: (B, C) probabilities.

    Scores: accuracy, mae (mean difference of the indices) and quadratic_kappa, the agreement beyond chance with quadratic weights (Cohen,
    1968).

    Args:
        order: the classes, the lowest first. None: numbers by their value.

    >>> task = Ordinal(order=["low", "middle", "high"])
    >>> task.learn({"train": ["high", "low", "low"]}, column="label", on_unseen="error")
    >>> task.names, task.encode(["low", "high"]).tolist()
    (['low', 'middle', 'high'], [0, 2])
    """

    monitor = "quadratic_kappa"
    bounded = "mae"
    minimised = frozenset({"loss", "mae"})
    headline: ClassVar[Mapping[str, str]] = {"accuracy": "accuracy", "MAE": "mae", "kappa": "quadratic_kappa"}
    baseline = "median"
    figure_names = ("accuracy",)
    distillable = softened = True

    def __init__(self, order: list[str] | None = None) -> None:
        super().__init__()
        if order is not None and (len(order) < 2 or len(set(order)) < len(order)):
            raise UserError(f"task: order is {order}; expected at least two classes, each once, the lowest first")
        self.order = None if order is None else list(map(str, order))
        self.names = []
        self.number: dict[str, int] = {}

    def check(self, cell: str | None) -> str | None:
        if cell is None:
            return "label is missing"
        if self.order is not None:
            return None if cell in self.order else f"label {cell[:40]!r} is not in the task's order"
        return None if NUMBER.fullmatch(cell) else f"label {cell[:40]!r} is not a number; classes of other names need the task's order"

    def learn(self, cells: Mapping[str, Sequence[str | None]], *, column: str, on_unseen: OnUnseen) -> None:
        counts = Counter(map(str, cells.get("train", ())))
        if len(counts) < 2:
            only = f"only '{next(iter(counts))}' occurs" if counts else "no sample is left"
            raise UserError(f"an ordinal task needs at least two classes: in the training split {only} (column '{column}')")
        self.names = self.order or sorted(counts, key=float)
        self.number = {name: i for i, name in enumerate(self.names)}
        reject_unseen(cells, self.number, on_unseen)

    @property
    def out_dim(self) -> int:
        return len(self.names) - 1

    def encode(self, cells: Sequence[str | None]) -> np.ndarray:
        return np.array([self.number.get(str(cell), -1) for cell in cells], dtype=np.int64)

    def unseen(self, cells: Sequence[str | None]) -> int:
        return sum(str(cell) not in self.number for cell in cells)

    def strata(self, cells: Sequence[str | None]) -> list[str]:
        return list(map(str, cells))

    def summary(self, cells: Sequence[str | None]) -> str:
        return counted(Counter(map(str, cells)), "classes")

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return cumulative_link_loss(output, target, ignore_index=-1)

    def plain_loss(self, output: Tensor, target: Tensor) -> Tensor:
        return self.loss(output, target).where(target >= 0, torch.nan)

    def teacher_outputs(self, output: Tensor) -> Tensor:
        """Log probabilities, which are logits of the classes."""
        return cumulative_log_probabilities(output)

    def soft_target(self, outputs: Tensor, temperature: float) -> Tensor:
        return (outputs / temperature).softmax(dim=1)

    def distillation_loss(self, output: Tensor, soft_target: Tensor, temperature: float) -> Tensor:
        return soft_target_loss(cumulative_log_probabilities(output), soft_target, temperature=temperature)

    def values(self, output: Tensor) -> Tensor:
        above = cumulative_logits(output.float()).sigmoid()
        ones = torch.ones_like(above[:, :1])
        return torch.cat([ones, above], dim=1) - torch.cat([above, torch.zeros_like(ones)], dim=1)

    def metrics(self) -> MetricCollection:
        classes = len(self.names)
        return collecting(classes, torch.zeros(0, dtype=torch.int64))

    def update(self, metrics: MetricCollection, values: Tensor, target: Tensor) -> None:
        metrics.update(values, target)

    def scores(self, metrics: MetricCollection) -> dict[str, Tensor]:
        """Of classes that train and order lack there is no index: always wrong, and without an error in steps."""
        values, target = collected(metrics)
        if not len(target):
            return {}
        predicted, known = median(values), target >= 0
        scores = {"accuracy": (predicted == target).float().mean()}
        if bool(known.any()):
            scores["mae"] = (predicted - target)[known].abs().float().mean()
            kappa = MulticlassCohenKappa(values.shape[1], weights="quadratic", validate_args=False).to(values.device)
            scores["quadratic_kappa"] = kappa(predicted[known], target[known])
        return scores

    def class_scores(self, values: Tensor, target: Tensor) -> dict[str, dict[str, float]]:
        classes = torch.arange(len(self.names))
        return by_name(self.names, binary_scores(median(values)[:, None] == classes, target[:, None] == classes))

    def metric_names(self) -> list[str]:
        return ["accuracy", "mae", "quadratic_kappa"]

    def batch_figures(self, output: Tensor, target: Tensor) -> dict[str, Tensor]:
        return {"accuracy": (median(self.values(output)) == target).float().mean()}

    def answering(self) -> OrderedClasses:
        return OrderedClasses(self.names)

    def bound(self, seen: Sequence[Hashable], cells: Sequence[str | None]) -> float:
        """The least mean difference of indices: of the median over the samples with equal inputs."""
        groups = defaultdict(list)
        for what, number in zip(seen, self.encode(cells).tolist(), strict=True):
            if number >= 0:
                groups[what].append(number)
        count = sum(map(len, groups.values()))
        total = sum(float(np.abs(np.array(same) - math.floor(float(np.median(same)))).sum()) for same in groups.values())
        return total / count if count else math.nan

    def learnt(self) -> dict[str, Any]:
        return {"names": list(self.names)}

    def set_learnt(self, learnt: dict[str, Any]) -> None:
        self.names = list(learnt["names"])
        self.number = {name: i for i, name in enumerate(self.names)}


def median(probabilities: Tensor) -> Tensor:
    """(n,) the first class up to which the probabilities (n, C) add up to at least a half.

    >>> median(torch.tensor([[0.4, 0.3, 0.3], [0.5, 0.0, 0.5]])).tolist()
    [1, 0]
    """
    return (probabilities.cumsum(dim=1) < 0.5 - 1e-6).sum(dim=1).clamp(max=probabilities.shape[1] - 1)
