"""What a classification is scored by."""

from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score, MulticlassStatScores


class BalancedAccuracy(MulticlassStatScores):
    """Mean recall over the classes that occur among the targets, as scikit-learn's balanced_accuracy_score.

    (torchmetrics' MulticlassAccuracy with average="macro" also counts, as recall 0, a class that was predicted but never occurs.)

    >>> import torch
    >>> metric = BalancedAccuracy(3)
    >>> round(float(metric(torch.tensor([0, 2, 1, 0]), torch.tensor([0, 0, 1, 1]))), 4)
    0.5

    Args:
        classes: how many there are.
    """

    def __init__(self, classes: int) -> None:
        super().__init__(classes, average=None, validate_args=False)

    def compute(self) -> Tensor:
        hits, _, _, misses = self._final_state()
        support = hits + misses
        return (hits / support.clamp(min=1)).sum() / (support > 0).sum().clamp(min=1)


def classification_metrics(classes: int) -> MetricCollection:
    """accuracy (share of hits), balanced_accuracy (mean recall) and f1_macro (mean F1 over the classes that occur or are predicted).

    They add up counts, so that they are exact over any number of batches and ranks. Labels that train never shows are classes too,
    with numbers of their own after those that the model knows: always missed.
    """
    return MetricCollection(
        {
            "accuracy": MulticlassAccuracy(classes, average="micro", validate_args=False),
            "balanced_accuracy": BalancedAccuracy(classes),
            "f1_macro": MulticlassF1Score(classes, average="macro", validate_args=False),
        }
    )
