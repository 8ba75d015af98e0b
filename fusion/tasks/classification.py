"""Classification: one class of several."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot, pad
from torchmetrics import MetricCollection

from fusion.errors import UserError
from fusion.losses import effective_number_weights, focal_loss, soft_target_loss
from fusion.processing.answers import Classes
from fusion.tasks.base import OnUnseen, Task, checked_weights, reject_unused
from fusion.tasks.metrics import RANKED, binary_scores, classification_metrics, one_against_rest

MOST_CLASSES = 8


class Classification(Task):
    """Predict one class of several.

        l = -w_y ((1 - s) log p_y + s / C sum_c (w_c / w_y) log p_c)            p = softmax(output + tau log n)

    Target: (B,) int64, the class's index; labels missing in the training split have indices from C on, which no model can predict.
    Values: (B, C) probabilities, softmax(output).

    Scores: see `fusion.tasks.metrics.classification_metrics`.

    Args:
        label_smoothing: share s of each target that is spread over all classes (Szegedy et al., 2016).
        class_weights: "balanced" weights each class by n / (C n_c), the inverse of its frequency in train; "effective" by the inverse of
            its effective number of samples (Cui et al., 2019, with `beta`); "none" uses no weights; or numbers by class, 1 for classes
            that are left out. The loss is divided by the mean weight of an update.
        beta: of class_weights=effective: from 0 (no weights) to below 1, 0.999 at the default.
        loss: "cross_entropy" (above) or "focal": -w_y (1 - p_y)^gamma log p_y (Lin et al., 2017).
        gamma: of loss=focal: how much less well classified samples count, 2 at the default; 0 is cross entropy.
        logit_adjustment: tau, for long tails (Menon et al., 2021): logits are offset by the classes' frequencies n in training only, so
            that predictions minimise the balanced error; 1 is the paper's, 0 off.

    >>> task = Classification()
    >>> task.learn({"train": ["yes", "no", "yes"]}, column="label", on_unseen="error")
    >>> task.names, task.encode(["yes", "no"]).tolist()
    (['no', 'yes'], [1, 0])
    """

    monitor = bounded = "accuracy"
    minimised = frozenset({"loss", "log_loss", "brier", "calibration_error"})
    headline: ClassVar[Mapping[str, str]] = {"accuracy": "accuracy", "balanced": "balanced_accuracy", "F1 macro": "f1_macro"}
    baseline = "majority"
    figure_names = ("accuracy",)
    one_of_classes = distillable = softened = True
    class_weight: Tensor | None
    prior: Tensor | None

    def __init__(
        self,
        label_smoothing: float = 0.0,
        class_weights: Literal["none", "balanced", "effective"] | dict[str, float] = "none",
        beta: float | None = None,
        loss: Literal["cross_entropy", "focal"] = "cross_entropy",
        gamma: float | None = None,
        logit_adjustment: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise UserError(f"task: label_smoothing is {label_smoothing}; expected a share, from 0 to below 1")
        if loss not in ("cross_entropy", "focal"):
            raise UserError(f"task: loss is '{loss}'; expected cross_entropy or focal")
        reject_unused(loss, "focal", gamma=gamma)
        if loss == "focal" and label_smoothing:
            raise UserError("task: label_smoothing is an option of cross entropy, but loss is focal; leave out one of them")
        if isinstance(class_weights, str) and class_weights not in ("none", "balanced", "effective"):
            raise UserError(f"task: class_weights is '{class_weights}'; expected none, balanced, effective, or numbers by class")
        if beta is not None and class_weights != "effective":
            raise UserError("task: beta is an option of class_weights=effective; leave it out, or set that")
        if not 0 <= (0.999 if beta is None else beta) < 1:
            raise UserError(f"task: beta is {beta}; expected a number from 0 to below 1")
        if not 0 <= (2.0 if gamma is None else gamma) < math.inf:
            raise UserError(f"task: gamma is {gamma}; expected a number of at least 0")
        if not 0 <= logit_adjustment < math.inf:
            raise UserError(f"task: logit_adjustment is {logit_adjustment}; expected a number of at least 0")
        self.label_smoothing, self.class_weights, self.beta = label_smoothing, class_weights, 0.999 if beta is None else beta
        self.gamma = None if loss != "focal" else 2.0 if gamma is None else gamma
        self.logit_adjustment = logit_adjustment
        self.names = []
        self.number: dict[str, int] = {}
        self.register_buffer("class_weight", None, persistent=False)
        self.register_buffer("prior", None, persistent=False)

    def check(self, cell: str | None) -> str | None:
        return "label is missing" if cell is None else None

    def learn(self, cells: Mapping[str, Sequence[str | None]], *, column: str, on_unseen: OnUnseen) -> None:
        counts = Counter(map(str, cells.get("train", ())))
        self.names = sorted(counts)
        if len(self.names) < 2:
            only = f"only '{self.names[0]}' occurs" if self.names else "no sample is left"
            raise UserError(f"a classifier needs at least two classes: in the training split {only} (column '{column}')")
        self.number = {name: i for i, name in enumerate(self.names)}
        reject_unseen(cells, counts, on_unseen)
        for split in cells:
            self.encode(cells[split])
        each = torch.tensor([counts[name] for name in self.names])
        if self.class_weights == "balanced":
            self.class_weight = each.sum() / (len(each) * each)
        elif self.class_weights == "effective":
            self.class_weight = effective_number_weights(each, self.beta)
        elif self.class_weights != "none":
            assert isinstance(self.class_weights, dict)
            weights = checked_weights("class_weights", self.class_weights, self.names)
            self.class_weight = torch.tensor([weights[name] for name in self.names])
        if self.logit_adjustment:
            self.prior = each / each.sum()

    def encode(self, cells: Sequence[str | None]) -> np.ndarray:
        return np.array([self.number.setdefault(str(cell), len(self.number)) for cell in cells], dtype=np.int64)

    def unseen(self, cells: Sequence[str | None]) -> int:
        known = set(self.names)
        return sum(str(cell) not in known for cell in cells)

    def strata(self, cells: Sequence[str | None]) -> list[str]:
        return list(map(str, cells))

    def summary(self, cells: Sequence[str | None]) -> str:
        return counted(Counter(map(str, cells)), "classes")

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        logits = output if self.prior is None else output.float() + self.logit_adjustment * self.prior.log()
        if self.gamma is not None:
            return focal_loss(logits, target, gamma=self.gamma, weight=self.class_weight)
        return cross_entropy(logits, target, weight=self.class_weight, label_smoothing=self.label_smoothing, reduction="none")

    def weight(self, target: Tensor) -> Tensor | None:
        return None if self.class_weight is None else self.class_weight[target]

    def plain_loss(self, output: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(output.float(), target.where(target < output.shape[1], -1), ignore_index=-1, reduction="none").where(
            target < output.shape[1], torch.nan
        )

    def confidence(self, output: Tensor, target: Tensor) -> Tensor:
        return output.float().softmax(dim=1).gather(1, target[:, None])[:, 0]

    def teacher_outputs(self, output: Tensor) -> Tensor:
        return output.float()

    def soft_target(self, outputs: Tensor, temperature: float) -> Tensor:
        return (outputs / temperature).softmax(dim=1)

    def distillation_loss(self, output: Tensor, soft_target: Tensor, temperature: float) -> Tensor:
        return soft_target_loss(output, soft_target, temperature=temperature)

    def values(self, output: Tensor) -> Tensor:
        return output.float().softmax(dim=1)

    def metrics(self) -> MetricCollection:
        return classification_metrics(max(2, len(self.number)), ranked=self.monitor in RANKED)

    def class_scores(self, values: Tensor, target: Tensor) -> dict[str, dict[str, float]]:
        every = self.with_unknown(values)
        predicted, actual = (one_hot(index, every.shape[1]).bool() for index in (every.argmax(dim=1), target))
        return by_name(self.names, binary_scores(predicted, actual) | one_against_rest(every, target))

    def metric_names(self) -> list[str]:
        names = [str(name) for name in self.metrics()]
        return [name for name in names if name != "ranked"] + (list(RANKED) if "ranked" in names else [])

    def update(self, metrics: MetricCollection, values: Tensor, target: Tensor) -> None:
        metrics.update(self.with_unknown(values), target)

    def with_unknown(self, values: Tensor) -> Tensor:
        """Probabilities of all classes that occur anywhere, 0 for those missing in train."""
        return pad(values, (0, max(2, len(self.number)) - values.shape[1]))

    def batch_figures(self, output: Tensor, target: Tensor) -> dict[str, Tensor]:
        return {"accuracy": (output.argmax(dim=1) == target).float().mean()}

    def answering(self) -> Classes:
        return Classes(self.names)

    def learnt(self) -> dict[str, Any]:
        return {"names": list(self.names)}

    def set_learnt(self, learnt: dict[str, Any]) -> None:
        self.names = list(learnt["names"])
        self.number = {name: i for i, name in enumerate(self.names)}


def reject_unseen(cells: Mapping[str, Sequence[str | None]], known: Mapping[str, int], on_unseen: OnUnseen) -> None:
    """Raises UserError for labels of other splits that are missing in the training split, unless they count as wrong."""
    unseen = {
        str(label): split for split in cells if split != "train" for label in sorted(set(map(str, cells[split]))) if label not in known
    }
    if unseen and on_unseen == "error":
        shown = ", ".join(f"'{label}' ({split})" for label, split in list(unseen.items())[:5]) + (", ..." if len(unseen) > 5 else "")
        raise UserError(
            f"{len(unseen)} labels never occur in train: {shown}. Fix the labels or the split, or count them as wrong: "
            "--data.on_unseen_label=count_as_wrong"
        )


def by_name(names: Sequence[str], scores: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """Scores (C,) of each class, by class; without those that are undefined."""
    lists = {name: score.tolist() for name, score in scores.items()}
    return {name: {score: values[i] for score, values in lists.items() if values[i] == values[i]} for i, name in enumerate(names)}


def counted(counts: Counter[str], what: str) -> str:
    """
    >>> counted(Counter("aab"), "classes")
    'a 2, b 1'
    """
    shown = ", ".join(f"{label} {count}" for label, count in counts.most_common(MOST_CLASSES))
    return shown + (f" and {len(counts) - MOST_CLASSES} more {what}" if len(counts) > MOST_CLASSES else "")
