"""Scores of labels that are each there or not, from (n, L) probabilities and (n, L) targets."""

import warnings

import torch
from torch import Tensor
from torchmetrics.functional.classification import multilabel_average_precision, multilabel_f1_score, multilabel_ranking_average_precision

MULTI_LABEL_SCORES = ("average_precision", "f1_macro", "f1_micro", "f1_samples", "ranking_average_precision", "subset_accuracy")


def multi_label_scores(values: Tensor, target: Tensor, thresholds: Tensor) -> dict[str, Tensor]:
    """All scores of labels.

    average_precision (mean over the labels that occur; NaN where none does), ranking_average_precision (mean over the samples of the
    precision at the rank of each right label; 1 for a sample without labels). Of the predictions, the labels above their thresholds:
    f1_macro (mean over the labels), f1_micro, f1_samples (mean over the samples; 1 where both sets are empty) and subset_accuracy (the
    share of samples whose set of labels is right).

    Args:
        values: (n, L) probabilities, n of at least 1.
        target: (n, L) 0 or 1.
        thresholds: (L,).

    >>> values, target = torch.tensor([[0.9, 0.2], [0.6, 0.1]]), torch.tensor([[1, 1], [0, 0]])
    >>> scores = multi_label_scores(values, target, torch.tensor([0.5, 0.15]))
    >>> {name: round(float(score), 2) for name, score in scores.items()}  # doctest: +NORMALIZE_WHITESPACE
    {'average_precision': 1.0, 'ranking_average_precision': 1.0, 'f1_macro': 0.83, 'f1_micro': 0.8, 'f1_samples': 0.5,
     'subset_accuracy': 0.5}
    """
    labels, target = values.shape[1], target.long()
    predicted = (values > thresholds).long()
    occurs = target.sum(dim=0) > 0
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="No positive samples")
        precision = multilabel_average_precision(values, target, labels, average="none", validate_args=False)[occurs]
    hits, either = (predicted * target).sum(dim=1), (predicted + target).sum(dim=1)
    return {
        "average_precision": precision.mean(),
        "ranking_average_precision": multilabel_ranking_average_precision(values, target, labels, validate_args=False),
        "f1_macro": multilabel_f1_score(predicted, target, labels, average="macro", validate_args=False),
        "f1_micro": multilabel_f1_score(predicted, target, labels, average="micro", validate_args=False),
        "f1_samples": torch.where(either > 0, 2 * hits / either.clamp(min=1), 1.0).mean(),
        "subset_accuracy": (predicted == target).all(dim=1).float().mean(),
    }


def best_thresholds(values: Tensor, target: Tensor, *, shared: bool = False) -> Tensor:
    """(L,) thresholds that give the highest F1: of each label by itself, or one for all of them with the highest micro F1.

    A threshold is halfway between two probabilities that occur. A label that never occurs gets 0.5.

    Args:
        values: (n, L) probabilities.
        target: (n, L) 0 or 1.
        shared: one threshold for all labels.

    >>> best_thresholds(torch.tensor([[0.9], [0.4], [0.2]]), torch.tensor([[1], [1], [0]]))
    tensor([0.3000])
    """
    if shared:
        return best_threshold(values.flatten(), target.flatten()).expand(values.shape[1]).clone()
    return torch.stack([best_threshold(values[:, i], target[:, i]) for i in range(values.shape[1])])


def best_threshold(values: Tensor, target: Tensor) -> Tensor:
    if not bool(target.any()):
        return values.new_tensor(0.5)
    ordered, order = values.double().sort(descending=True)
    hits = target[order].double().cumsum(0)
    f1 = 2 * hits / (torch.arange(1, len(ordered) + 1, device=values.device) + hits[-1])
    below = torch.cat([ordered[1:], ordered.new_zeros(1)])
    place = f1.where(ordered > below, -1).argmax()  # equal probabilities are on the same side of every threshold
    return ((ordered[place] + below[place]) / 2).to(values.dtype)
