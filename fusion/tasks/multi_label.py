"""Multi-label classification: any number of labels per sample, including none."""

import json
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from torchmetrics import MetricCollection
from torchmetrics.classification import MultilabelExactMatch, MultilabelF1Score

from fusion.cell_text import canonical, cell_text
from fusion.errors import UserError
from fusion.tasks.base import OnUnseen, Task
from fusion.tasks.classification import counted, reject_unseen
from fusion.tasks.metrics import MeanAveragePrecision


class MultiLabel(Task):
    """Predict which of several labels a sample has, each independently, with binary cross entropy.

        l = -1/L sum_c [y_c log p_c + (1 - y_c) log(1 - p_c)]            p = sigmoid(output)

    A target's cell holds the labels with a separator between them, or a list (JSON in a text file, a list in Parquet or JSON Lines). An
    empty cell is a sample without any label. Target: (B, L) 0 or 1; labels missing in the training split have columns after those that
    the model knows. Values: (B, L) probabilities; a label is predicted if its probability is above `threshold`.

    Scores: mean average precision over the labels that occur, F1 (macro and micro) and the share of samples whose set of labels is right
    (subset_accuracy), at `threshold`.

    Args:
        separator: the text between two labels of a text cell.
        threshold: probability above which a label is predicted, between 0 and 1.

    >>> task = MultiLabel()
    >>> task.learn({"train": ["red;round", "round", None]}, column="label", on_unseen="error")
    >>> task.names, task.encode(["round; red", '["red"]', None]).tolist()
    (['red', 'round'], [[1, 1], [1, 0], [0, 0]])
    """

    monitor = "average_precision"
    bounded = "subset_accuracy"
    headline: ClassVar[Mapping[str, str]] = {
        "mAP": "average_precision",
        "F1 macro": "f1_macro",
        "F1 micro": "f1_micro",
        "exact": "subset_accuracy",
    }
    baseline = "majority"
    figure_names = ("subset_accuracy",)
    takes_lists = True

    def __init__(self, separator: str = ";", threshold: float = 0.5) -> None:
        super().__init__()
        if not separator:
            raise UserError("task: separator is empty; expected the text between two labels, such as ;")
        if not 0 < threshold < 1:
            raise UserError(f"task: threshold is {threshold}; expected a probability between 0 and 1")
        self.separator, self.threshold = separator, threshold
        self.names = []
        self.number: dict[str, int] = {}

    def check(self, cell: str | None) -> str | None:
        try:
            self.labels(cell)
        except ValueError:
            return f"label {str(cell)[:40]!r} begins like a list, but is not a JSON list of texts"
        return None

    def labels(self, cell: str | None) -> list[str]:
        """The labels of a cell, each once. Raises ValueError for an invalid list."""
        if cell is None or not cell.strip():
            return []
        if cell.lstrip().startswith("["):
            try:
                parsed = json.loads(cell)
            except RecursionError as error:
                raise ValueError("nested lists") from error
            if not isinstance(parsed, list) or any(isinstance(label, list | dict) for label in parsed):
                raise ValueError("not a list of texts")
            names = [text for label in parsed if (text := cell_text(label)) is not None]
        else:
            names = cell.split(self.separator)
        # Canonical spelling, as for cells: the label 1.0 among several is the label 1.
        return list(dict.fromkeys(canonical(name.strip()) for name in names if name.strip()))

    def learn(self, cells: Mapping[str, Sequence[str | None]], *, column: str, on_unseen: OnUnseen) -> None:
        counts = self.counts(cells.get("train", ()))
        self.names = sorted(counts)
        if not self.names:
            raise UserError(f"no training sample has any label (column '{column}'): there is nothing to learn")
        self.number = {name: i for i, name in enumerate(self.names)}
        each = {split: [label for cell in column for label in self.labels(cell)] for split, column in cells.items()}
        reject_unseen(each, counts, on_unseen)
        for labels in each.values():
            for label in labels:
                self.number.setdefault(label, len(self.number))

    def counts(self, cells: Sequence[str | None]) -> Counter[str]:
        return Counter(label for cell in cells for label in self.labels(cell))

    def encode(self, cells: Sequence[str | None]) -> np.ndarray:
        indices = [[self.number.setdefault(label, len(self.number)) for label in self.labels(cell)] for cell in cells]
        target = np.zeros((len(indices), len(self.number)), dtype=np.uint8)
        for row, columns in zip(target, indices, strict=True):
            row[columns] = 1
        return target

    def unseen(self, cells: Sequence[str | None]) -> int:
        known = set(self.names)
        return sum(not known.issuperset(self.labels(cell)) for cell in cells)

    def strata(self, cells: Sequence[str | None]) -> list[str]:
        """The rarest label of each sample: the others are frequent enough to be balanced anyway."""
        counts = self.counts(cells)
        return [min(self.labels(cell), key=lambda label: (counts[label], label), default="") for cell in cells]

    def summary(self, cells: Sequence[str | None]) -> str:
        unlabelled = sum(not self.labels(cell) for cell in cells)
        return counted(self.counts(cells), "labels") + (f"; {unlabelled:,} samples have none" if unlabelled else "")

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        known = target[:, : output.shape[1]].to(output.dtype)
        return binary_cross_entropy_with_logits(output, known, reduction="none").mean(dim=1)

    def values(self, output: Tensor) -> Tensor:
        return output.float().sigmoid()

    def metrics(self) -> MetricCollection:
        count, at = len(self.number), self.threshold
        return MetricCollection(
            {
                "average_precision": MeanAveragePrecision(count),
                "f1_macro": MultilabelF1Score(count, at, average="macro", validate_args=False),
                "f1_micro": MultilabelF1Score(count, at, average="micro", validate_args=False),
                "subset_accuracy": MultilabelExactMatch(count, at, validate_args=False),
            },
            compute_groups=False,
        )

    def update(self, metrics: MetricCollection, values: Tensor, target: Tensor) -> None:
        unknown = target.shape[1] - values.shape[1]
        metrics.update(torch.cat([values, values.new_zeros(len(values), unknown)], dim=1), target.long())

    def batch_figures(self, output: Tensor, target: Tensor) -> dict[str, Tensor]:
        predicted = output.sigmoid() > self.threshold
        return {"subset_accuracy": (predicted == target[:, : output.shape[1]].bool()).all(dim=1).float().mean()}

    def answers(self, values: np.ndarray) -> list[Any]:
        return [[self.names[i] for i in np.flatnonzero(row > self.threshold)] for row in values]

    def cell_of(self, answer: Any) -> Any:
        """Written so that a manifest with it is read as the same labels."""
        joined = self.separator.join(answer)
        plain = self.check(joined) is None and self.labels(joined) == answer
        return joined if plain else json.dumps(answer, ensure_ascii=False)

    def strict(self, cells: Sequence[str | None]) -> Sequence[Hashable]:
        return [frozenset(self.labels(cell)) for cell in cells]

    def learnt(self) -> dict[str, Any]:
        return {"names": list(self.names)}

    def set_learnt(self, learnt: dict[str, Any]) -> None:
        self.names = list(learnt["names"])
        self.number = {name: i for i, name in enumerate(self.names)}
