"""Scores of one class of several, from (B, C) probabilities and (B,) classes."""

import warnings

import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score, MulticlassStatScores
from torchmetrics.functional.classification import multiclass_auroc, multiclass_average_precision

from fusion.tasks.metrics.collected import Collected

RANKED = ("auroc", "average_precision")
BINS = 15  # of the calibration error (Guo et al., 2017)
TOP = 5
SUMS = torch.float32 if torch.backends.mps.is_available() else torch.float64  # Apple's GPUs have no float64
MOST_RANKED = 100  # classes for which every probability is kept until the end of an evaluation


def classification_metrics(classes: int, *, ranked: bool = False) -> MetricCollection:
    """All scores of one class of several.

    accuracy, top5_accuracy (of more than 5 classes), balanced_accuracy (mean recall), f1_macro (mean F1 over the classes that occur or are
    predicted), f1_micro, f1_weighted (by the classes' frequencies), cohen_kappa, matthews, log_loss, brier, calibration_error; and for up
    to 100 classes, or where `ranked`, auroc and average_precision of each class against the others, averaged over those that occur.

    They add up counts and sums, exact over any number of batches and ranks; the last two keep all probabilities instead. Labels missing in
    train are classes too, with indices after those that the model knows and probability 0.
    """
    by_class = {
        "balanced_accuracy": BalancedAccuracy(classes),
        "cohen_kappa": CohenKappa(classes),
        "matthews": Matthews(classes),
        "f1_macro": MulticlassF1Score(classes, average="macro", validate_args=False),
        "f1_weighted": MulticlassF1Score(classes, average="weighted", validate_args=False),
    }
    of_all = {
        "accuracy": MulticlassAccuracy(classes, average="micro", validate_args=False),
        "f1_micro": MulticlassF1Score(classes, average="micro", validate_args=False),
    }
    others: dict[str, Metric] = {"log_loss": LogLoss(), "brier": Brier(), "calibration_error": CalibrationError()}
    if classes > TOP:
        others["top5_accuracy"] = MulticlassAccuracy(classes, top_k=TOP, average="micro", validate_args=False)
    if classes <= MOST_RANKED or ranked:
        others["ranked"] = OneAgainstRest(classes)
    # Metrics with the same counts are updated once. Without the groups torchmetrics would also group those whose counts happen to be equal.
    groups = [list(by_class), list(of_all), *([name] for name in others)]
    return MetricCollection({**by_class, **of_all, **others}, compute_groups=groups)


class ClassCounts(MulticlassStatScores):
    """A score from counts by class alone: exact over any number of batches and ranks, without a matrix of classes by classes.

    Args:
        classes: number of classes.
    """

    def __init__(self, classes: int) -> None:
        super().__init__(classes, average=None, validate_args=False)

    def counts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Hits, predictions and targets of each class (C,), float64; on the CPU, since Apple's GPUs have no float64."""
        hits, false, _, misses = (count.cpu().double() for count in self._final_state())
        return hits, hits + false, hits + misses


class BalancedAccuracy(ClassCounts):
    """Mean recall over the classes that occur among the targets, as scikit-learn's balanced_accuracy_score.

    (torchmetrics' MulticlassAccuracy with average="macro" also counts, as recall 0, a class that was predicted but never occurs.)

    >>> import torch
    >>> metric = BalancedAccuracy(3)
    >>> round(float(metric(torch.tensor([0, 2, 1, 0]), torch.tensor([0, 0, 1, 1]))), 4)
    0.5

    """

    def compute(self) -> Tensor:
        hits, _, occurring = self.counts()
        return ((hits / occurring.clamp(min=1)).sum() / (occurring > 0).sum().clamp(min=1)).float()


class CohenKappa(ClassCounts):
    """Agreement beyond chance (Cohen, 1960): (p_o - p_e) / (1 - p_e); NaN where chance alone agrees fully.

    >>> metric = CohenKappa(2)
    >>> float(metric(torch.tensor([0, 1, 1, 1]), torch.tensor([0, 0, 1, 1])))
    0.5

    """

    def compute(self) -> Tensor:
        hits, predicted, occurring = self.counts()
        total = occurring.sum()
        observed = hits.sum() / total
        chance = (predicted * occurring).sum() / total.square()
        return ((observed - chance) / (1 - chance)).float()


class Matthews(ClassCounts):
    """Matthews correlation of several classes (Gorodkin, 2004); 0 where only one class is predicted, or occurs.

    >>> metric = Matthews(2)
    >>> round(float(metric(torch.tensor([0, 1, 1, 1]), torch.tensor([0, 0, 1, 1]))), 4)
    0.5774

    """

    def compute(self) -> Tensor:
        hits, predicted, occurring = self.counts()
        total = occurring.sum()
        covariance = hits.sum() * total - (predicted * occurring).sum()
        spread = (total.square() - predicted.square().sum()) * (total.square() - occurring.square().sum())
        return torch.where(spread > 0, covariance / spread.clamp(min=1).sqrt(), 0.0).float()


class SampleMean(MeanMetric):
    """torchmetrics' mean, summed such that it is the same in any order of the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.set_dtype(SUMS)

    def compute(self) -> Tensor:
        return super().compute().float()


class LogLoss(SampleMean):
    """Mean of -log p_y, with p_y of at least float32's epsilon, as scikit-learn's log_loss: an impossible class costs 15.9.

    >>> round(float(LogLoss()(torch.tensor([[0.5, 0.5], [0.0, 1.0]]), torch.tensor([0, 1]))), 4)
    0.3466
    """

    def update(self, probabilities: Tensor, target: Tensor) -> None:  # type: ignore[override]
        super().update(-probabilities.gather(1, target[:, None])[:, 0].clamp(min=torch.finfo(torch.float32).eps).log())


class Brier(SampleMean):
    """Mean squared distance between probabilities and the true class as a one-hot vector (Brier, 1950): from 0 to 2.

    >>> float(Brier()(torch.tensor([[0.5, 0.5], [0.0, 1.0]]), torch.tensor([0, 1])))
    0.25
    """

    def update(self, probabilities: Tensor, target: Tensor) -> None:  # type: ignore[override]
        super().update(probabilities.square().sum(dim=1) - 2 * probabilities.gather(1, target[:, None])[:, 0] + 1)


class CalibrationError(Metric):
    """Expected calibration error (Naeini et al., 2015): mean difference of confidence and accuracy over bins of equal width, weighted by
    their samples. The confidence is the largest probability; bins are open below and closed above, so that 1 is in the last one.

    (torchmetrics 1.9 puts a confidence of exactly 1 into a bin of its own.)

    >>> round(float(CalibrationError()(torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.0, 1.0]]), torch.tensor([0, 1, 1]))), 4)
    0.2667
    """

    counts: Tensor
    confidences: Tensor
    hits: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("counts", "confidences", "hits"):
            self.add_state(name, torch.zeros(BINS, dtype=SUMS), dist_reduce_fx="sum")

    def update(self, probabilities: Tensor, target: Tensor) -> None:
        confidence, predicted = probabilities.max(dim=1)
        confidence = confidence.to(SUMS)
        place = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
        self.counts.index_add_(0, place, torch.ones_like(confidence))
        self.confidences.index_add_(0, place, confidence)
        self.hits.index_add_(0, place, (predicted == target).to(confidence.dtype))

    def compute(self) -> Tensor:
        return ((self.confidences - self.hits).abs().sum() / self.counts.sum()).float()


class OneAgainstRest(Collected):
    """auroc and average_precision of each class against the others, averaged over the classes that occur, but not in every sample; NaN
    where there is none.

    >>> metric = OneAgainstRest(3)
    >>> scores = metric(torch.tensor([[0.9, 0.1, 0.0], [0.4, 0.6, 0.0], [0.3, 0.7, 0.0]]), torch.tensor([0, 1, 0]))
    >>> {name: round(float(score), 4) for name, score in scores.items()}
    {'auroc': 0.5, 'average_precision': 0.6667}

    Args:
        classes: number of classes.
    """

    def __init__(self, classes: int) -> None:
        super().__init__(classes, torch.zeros(0, dtype=torch.int64))

    def compute(self) -> dict[str, Tensor]:
        probabilities, target = self.all()
        by_class = one_against_rest(probabilities, target)
        return {name: scores[~scores.isnan()].mean() for name, scores in by_class.items()}


def binary_scores(predicted: Tensor, target: Tensor) -> dict[str, Tensor]:
    """precision, recall and f1 (C,) of each class, 0 where undefined, and its samples, from (n, C) bool.

    >>> scores = binary_scores(torch.tensor([[True], [True], [False]]), torch.tensor([[True], [False], [True]]))
    >>> {name: score.item() for name, score in scores.items()}
    {'precision': 0.5, 'recall': 0.5, 'f1': 0.5, 'samples': 2}
    """
    hits, given, there = (predicted & target).sum(dim=0), predicted.sum(dim=0), target.sum(dim=0)
    return {
        "precision": hits / given.clamp(min=1),
        "recall": hits / there.clamp(min=1),
        "f1": 2 * hits / (given + there).clamp(min=1),
        "samples": there,
    }


def one_against_rest(probabilities: Tensor, target: Tensor) -> dict[str, Tensor]:
    """auroc and average_precision (C,) of each class against the others; NaN for a class that never occurs, or always."""
    classes = probabilities.shape[1]
    counts = torch.bincount(target, minlength=classes)
    defined = (counts > 0) & (counts < len(target))
    if not bool(defined.any()):
        return {name: torch.full((classes,), torch.nan) for name in ("auroc", "average_precision")}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*No (positive|negative) samples")
        auroc = multiclass_auroc(probabilities, target, classes, average="none", validate_args=False)
        precision = multiclass_average_precision(probabilities, target, classes, average="none", validate_args=False)
    return {name: scores.where(defined, torch.nan) for name, scores in (("auroc", auroc), ("average_precision", precision))}
