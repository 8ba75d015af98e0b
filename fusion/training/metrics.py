"""What a classification is scored by."""

from torch import nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score


def classification_metrics(classes: int, *, unseen: bool = False) -> MetricCollection:
    """accuracy (share of hits), balanced_accuracy (mean recall over the classes) and f1_macro (mean F1 over the classes).

    They add up counts, so that they are exact over any number of batches and ranks. With `unseen`, the label number `classes`
    (one that train never showed) counts as one more class, which is always missed.
    """
    count = classes + unseen
    return MetricCollection(
        {
            "accuracy": MulticlassAccuracy(count, average="micro", validate_args=False),
            "balanced_accuracy": MulticlassAccuracy(count, average="macro", validate_args=False),
            "f1_macro": MulticlassF1Score(count, average="macro", validate_args=False),
        }
    )


def per_split(classes: int, splits: dict[str, bool]) -> nn.ModuleDict:
    """Metrics for each split; the value says whether it holds labels that train never showed."""
    return nn.ModuleDict({name: classification_metrics(classes, unseen=unseen) for name, unseen in splits.items()})
