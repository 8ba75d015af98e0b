"""Scores of predictions, for all samples and for each group of them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fusion.evaluation.metrics import classification_metrics


@dataclass(frozen=True)
class Score:
    """samples: how many; accuracy, balanced_accuracy, f1_macro: of the predictions; majority: of always giving the commonest label."""

    samples: int
    accuracy: float
    balanced_accuracy: float
    f1_macro: float
    majority: float


def score(predicted: Sequence[str], labels: Sequence[str], classes: Sequence[str]) -> Score:
    """Score one set of predictions; a label that is not among the classes is always a miss."""
    number = {label: i for i, label in enumerate(dict.fromkeys([*classes, *labels]))}
    target = np.array([number[label] for label in labels])
    metrics = classification_metrics(len(number))
    metrics.update(torch.tensor([number[label] for label in predicted]), torch.from_numpy(target))
    values = {name: float(value) for name, value in metrics.compute().items()}
    return Score(len(labels), majority=max(Counter(labels).values()) / len(labels), **values)


def scores_by_group(
    predicted: Sequence[str], labels: Sequence[str], classes: Sequence[str], groups: Sequence[str] | None = None
) -> dict[str, Score]:
    """The score of all samples under "all", then of each group by name; one that is called so too is "all (a group)".

    >>> scores = scores_by_group(["yes", "no", "no"], ["yes", "no", "yes"], ["no", "yes"], ["a", "a", "b"])
    >>> [(name, round(s.accuracy, 2)) for name, s in scores.items()]
    [('all', 0.67), ('a', 1.0), ('b', 0.0)]
    """
    found = {"all": score(predicted, labels, classes)}
    for group in sorted(set(groups or ())):
        rows = [i for i, g in enumerate(groups or ()) if g == group]
        found[group if group != "all" else "all (a group)"] = score([predicted[i] for i in rows], [labels[i] for i in rows], classes)
    return found
