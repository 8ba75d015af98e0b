"""Metrics that torchmetrics doesn't provide."""

import warnings
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MetricCollection, R2Score
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score, MulticlassStatScores, MultilabelAveragePrecision
from torchmetrics.utilities.data import dim_zero_cat


class BalancedAccuracy(MulticlassStatScores):
    """Mean recall over the classes that occur among the targets, as scikit-learn's balanced_accuracy_score.

    (torchmetrics' MulticlassAccuracy with average="macro" also counts, as recall 0, a class that was predicted but never occurs.)

    >>> import torch
    >>> metric = BalancedAccuracy(3)
    >>> round(float(metric(torch.tensor([0, 2, 1, 0]), torch.tensor([0, 0, 1, 1]))), 4)
    0.5

    Args:
        classes: number of classes.
    """

    def __init__(self, classes: int) -> None:
        super().__init__(classes, average=None, validate_args=False)

    def compute(self) -> Tensor:
        hits, _, _, misses = self._final_state()
        support = hits + misses
        return (hits / support.clamp(min=1)).sum() / (support > 0).sum().clamp(min=1)


class MeanAveragePrecision(MultilabelAveragePrecision):
    """Mean of the labels' average precision, over those that occur among the targets; NaN where none does.

    (torchmetrics' average="macro" counts a label that never occurs as 0.)

    >>> import torch
    >>> metric = MeanAveragePrecision(3)
    >>> round(float(metric(torch.tensor([[0.9, 0.2, 0.1], [0.1, 0.3, 0.2]]), torch.tensor([[1, 1, 0], [0, 0, 0]]))), 2)
    0.75

    Args:
        labels: number of labels.
    """

    def __init__(self, labels: int) -> None:
        super().__init__(labels, average="none", validate_args=False)

    def sync(self, *args: Any, **options: Any) -> None:
        """A rank without samples takes part with empty tensors of the same shape and dtype as the others'."""
        if isinstance(self.preds, list) and not self.preds:
            self.preds = [torch.zeros(0, self.num_labels, device=self.device)]
            self.target = [torch.zeros(0, self.num_labels, device=self.device, dtype=torch.int64)]
        super().sync(*args, **options)

    def compute(self) -> Tensor:  # type: ignore[override]
        # (already synchronised over the ranks)
        occurs = dim_zero_cat(self.target).sum(dim=0) > 0
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="No positive samples")
            return super().compute()[occurs].mean()


class R2(R2Score):
    """R2 of standardised targets; NaN for fewer than two targets, and for targets that differ only by rounding.

    (torchmetrics' R2Score raises for one target, and divides by a variance that is rounding error only.)

    >>> import torch
    >>> metric = R2()
    >>> round(float(metric(torch.tensor([0.0, 1.0, 3.0]), torch.tensor([0.0, 1.0, 2.0]))), 2)
    0.5
    """

    def compute(self) -> Tensor:
        spread = self.sum_squared_error - self.sum_error.square() / self.total.clamp(min=1)
        explained = 1 - self.residual / spread
        defined = (self.total > 1) & (spread > 1e-5 * self.sum_squared_error)
        return torch.where(defined, explained, torch.nan)


def classification_metrics(classes: int) -> MetricCollection:
    """accuracy (share of hits), balanced_accuracy (mean recall) and f1_macro (mean F1 over the classes that occur or are predicted).

    They add up counts, so that they are exact over any number of batches and ranks. Labels missing in the training split are classes too,
    with indices after those that the model knows: always wrong.
    """
    return MetricCollection(
        {
            "accuracy": MulticlassAccuracy(classes, average="micro", validate_args=False),
            "balanced_accuracy": BalancedAccuracy(classes),
            "f1_macro": MulticlassF1Score(classes, average="macro", validate_args=False),
        }
    )
