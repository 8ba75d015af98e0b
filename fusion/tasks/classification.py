"""Classification: one class of several."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics import MetricCollection

from fusion.errors import UserError
from fusion.tasks.base import OnUnseen, Task
from fusion.tasks.metrics import classification_metrics

MOST_CLASSES = 8


class Classification(Task):
    """Predict one class of several, with cross entropy.

        l = -w_y ((1 - s) log p_y + s / C sum_c (w_c / w_y) log p_c)            p = softmax(output)

    Target: (B,) int64, the class's index; labels missing in the training split have indices from C on, which no model can predict.
    Values: (B, C) probabilities.

    Args:
        label_smoothing: share s of each target that is spread over all classes (Szegedy et al., 2016).
        class_weights: "balanced" weights each class by n / (C n_c), the inverse of its frequency in train; "none" uses no weights.

    >>> task = Classification()
    >>> task.learn({"train": ["yes", "no", "yes"]}, column="label", on_unseen="error")
    >>> task.names, task.encode(["yes", "no"]).tolist()
    (['no', 'yes'], [1, 0])
    """

    monitor = bounded = "accuracy"
    headline: ClassVar[Mapping[str, str]] = {"accuracy": "accuracy", "balanced": "balanced_accuracy", "F1 macro": "f1_macro"}
    baseline = "majority"
    figure_names = ("accuracy",)
    one_of_classes = True
    class_weight: Tensor | None

    def __init__(self, label_smoothing: float = 0.0, class_weights: Literal["none", "balanced"] = "none") -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise UserError(f"task: label_smoothing is {label_smoothing}; expected a share, from 0 to below 1")
        self.label_smoothing, self.class_weights = label_smoothing, class_weights
        self.names = []
        self.number: dict[str, int] = {}
        self.register_buffer("class_weight", None, persistent=False)

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
        if self.class_weights == "balanced":
            each = torch.tensor([counts[name] for name in self.names])
            self.class_weight = each.sum() / (len(each) * each.clamp(min=1))

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
        return cross_entropy(output, target, weight=self.class_weight, label_smoothing=self.label_smoothing, reduction="none")

    def weight(self, target: Tensor) -> Tensor | None:
        return None if self.class_weight is None else self.class_weight[target]

    def plain_loss(self, output: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(output.float(), target.where(target < output.shape[1], -1), ignore_index=-1, reduction="none").where(
            target < output.shape[1], torch.nan
        )

    def confidence(self, output: Tensor, target: Tensor) -> Tensor:
        return output.float().softmax(dim=1).gather(1, target[:, None])[:, 0]

    def values(self, output: Tensor) -> Tensor:
        return output.float().softmax(dim=1)

    def metrics(self) -> MetricCollection:
        return classification_metrics(max(2, len(self.number)))

    def update(self, metrics: MetricCollection, values: Tensor, target: Tensor) -> None:
        metrics.update(values.argmax(dim=1), target)

    def batch_figures(self, output: Tensor, target: Tensor) -> dict[str, Tensor]:
        return {"accuracy": (output.argmax(dim=1) == target).float().mean()}

    def answers(self, values: np.ndarray) -> list[Any]:
        return [self.names[i] for i in values.argmax(axis=1)]

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


def counted(counts: Counter[str], what: str) -> str:
    """
    >>> counted(Counter("aab"), "classes")
    'a 2, b 1'
    """
    shown = ", ".join(f"{label} {count}" for label, count in counts.most_common(MOST_CLASSES))
    return shown + (f" and {len(counts) - MOST_CLASSES} more {what}" if len(counts) > MOST_CLASSES else "")
