"""Multi-label classification: any number of labels per sample, including none."""

import json
import math
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, pad
from torchmetrics import MetricCollection

from fusion.cell_text import canonical, cell_text
from fusion.errors import UserError
from fusion.losses import asymmetric_loss, binary_focal_loss, soft_label_loss
from fusion.processing.answers import Labels
from fusion.tasks.base import OnUnseen, Task, checked_weights, reject_unused
from fusion.tasks.classification import by_name, counted, reject_unseen
from fusion.tasks.metrics import MULTI_LABEL_SCORES, best_thresholds, binary_scores, collected, collecting, multi_label_scores

PRESENT, ABSENT = ("1", "true", "yes"), ("0", "false", "no", "")  # in a label's own column


class MultiLabel(Task):
    """Predict which of several labels a sample has, each independently.

        l = -1/L sum_c [w_c y_c log p_c + (1 - y_c) log(1 - p_c)]            p = sigmoid(output)

    A target's cell holds the labels with a separator between them, or a list (JSON in a text file, a list in Parquet or JSON Lines); or
    each label has a column of its own with 0 and 1 (data.columns.label: [red, round]). An empty cell is a sample without any label.

    Target: (B, L) 0 or 1; labels missing in the training split have columns after those that the model knows. Values: (B, L)
    probabilities; a label is predicted if its probability is above its threshold.

    Scores: average_precision (mean over the labels that occur), ranking_average_precision, f1_macro, f1_micro, f1_samples and
    subset_accuracy (the share of samples whose set of labels is right).

    Args:
        separator: the text between two labels of a text cell.
        threshold: probability above which a label is predicted, between 0 and 1; "tuned" for the one with the highest micro F1 on
            validation, "tuned_by_label" for each label's own with the highest F1; these are stored with the run, and make the
            validation's own F1 optimistic.
        loss: "bce" (above), "focal" (Lin et al., 2017) or "asymmetric" (Ridnik et al., 2021).
        gamma: of "focal": how much less well classified labels count, 2 at the default; 0 is "bce".
        gamma_positive: of "asymmetric": the same for labels that are there, 0 at the default.
        gamma_negative: of "asymmetric": the same for those that are not, 4 at the default.
        margin: of "asymmetric": labels that are not there count nothing below this probability, 0.05 at the default.
        pos_weights: weight w of each label where it is there, of "bce" and "focal": "balanced" for (n - n_c) / n_c of the training split,
            "none", or numbers by label, 1 for labels that are left out.

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
    takes_lists = distillable = softened = True
    tuned = ("thresholds",)

    pos_weight: Tensor | None

    def __init__(
        self,
        separator: str = ";",
        threshold: float | Literal["tuned", "tuned_by_label"] = 0.5,
        loss: Literal["bce", "focal", "asymmetric"] = "bce",
        gamma: float | None = None,
        gamma_positive: float | None = None,
        gamma_negative: float | None = None,
        margin: float | None = None,
        pos_weights: Literal["none", "balanced"] | dict[str, float] = "none",
    ) -> None:
        super().__init__()
        if not separator:
            raise UserError("task: separator is empty; expected the text between two labels, such as ;")
        if isinstance(threshold, str) and threshold not in ("tuned", "tuned_by_label"):
            raise UserError(f"task: threshold is '{threshold}'; expected a probability, tuned or tuned_by_label")
        if not isinstance(threshold, str) and not 0 < threshold < 1:
            raise UserError(f"task: threshold is {threshold}; expected a probability between 0 and 1")
        if loss not in ("bce", "focal", "asymmetric"):
            raise UserError(f"task: loss is '{loss}'; expected bce, focal or asymmetric")
        reject_unused(loss, "focal", gamma=gamma)
        reject_unused(loss, "asymmetric", gamma_positive=gamma_positive, gamma_negative=gamma_negative, margin=margin)
        if isinstance(pos_weights, str) and pos_weights not in ("none", "balanced"):
            raise UserError(f"task: pos_weights is '{pos_weights}'; expected none, balanced, or numbers by label")
        if loss == "asymmetric" and pos_weights != "none":
            raise UserError("task: pos_weights and loss=asymmetric both weigh labels that are there; leave out one of them")
        self.separator, self.threshold, self.form, self.pos_weights = separator, threshold, loss, pos_weights
        self.gamma = 2.0 if gamma is None else gamma
        self.asymmetry = {
            "gamma_positive": 0.0 if gamma_positive is None else gamma_positive,
            "gamma_negative": 4.0 if gamma_negative is None else gamma_negative,
            "margin": 0.05 if margin is None else margin,
        }
        for name, value in {"gamma": self.gamma, **self.asymmetry}.items():
            if not 0 <= value < math.inf:
                raise UserError(f"task: {name} is {value}; expected a number of at least 0")
        if self.asymmetry["margin"] >= 1:
            raise UserError(f"task: margin is {margin}; expected a probability, from 0 to below 1")
        self.names = []
        self.number: dict[str, int] = {}
        self.thresholds: list[float] = []
        self.label_columns: list[str] = []  # where each label has one
        self.register_buffer("pos_weight", None, persistent=False)

    def joined(
        self, columns: Mapping[str, Sequence[str | None]], bad: dict[int, str], inputs: Mapping[str, Iterable[Hashable]]
    ) -> list[str | None]:
        self.label_columns = list(columns)
        cells: list[str | None] = []
        for i, row in enumerate(zip(*columns.values(), strict=True)):
            present = []
            for name, cell in zip(columns, row, strict=True):
                value = (cell or "").strip().casefold()
                if value not in PRESENT and value not in ABSENT:
                    bad.setdefault(i, f"label {name} is {str(cell)[:40]!r}, expected 0 or 1")
                elif value in PRESENT:
                    present.append(name)
            cells.append(json.dumps(present, ensure_ascii=False))
        return cells

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
        never = [name for name in self.label_columns if name not in counts]
        if never:
            raise UserError(
                f"no training sample has the label '{never[0]}' (its column is 0 everywhere): leave it out of data.columns.label"
            )
        self.number = {name: i for i, name in enumerate(self.names)}
        fixed = 0.5 if isinstance(self.threshold, str) else self.threshold  # until it is tuned
        self.thresholds = [fixed] * len(self.names)
        if self.pos_weights != "none":
            count = len(cells.get("train", ()))
            own = {name: max(count - counts[name], 1) / counts[name] for name in self.names}
            weights = own if self.pos_weights == "balanced" else checked_weights("pos_weights", self.pos_weights, self.names)
            self.pos_weight = torch.tensor([weights[name] for name in self.names])
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
        if self.form == "focal":
            return binary_focal_loss(output, known, gamma=self.gamma, pos_weight=self.pos_weight)
        if self.form == "asymmetric":
            return asymmetric_loss(output, known, **self.asymmetry)
        return binary_cross_entropy_with_logits(output, known, pos_weight=self.pos_weight, reduction="none").mean(dim=1)

    def plain_loss(self, output: Tensor, target: Tensor) -> Tensor:
        return binary_cross_entropy_with_logits(output, target[:, : output.shape[1]].to(output.dtype), reduction="none").mean(dim=1)

    def teacher_outputs(self, output: Tensor) -> Tensor:
        return output.float()

    def soft_target(self, outputs: Tensor, temperature: float) -> Tensor:
        return (outputs / temperature).sigmoid()

    def distillation_loss(self, output: Tensor, soft_target: Tensor, temperature: float) -> Tensor:
        return soft_label_loss(output, soft_target, temperature=temperature)

    def values(self, output: Tensor) -> Tensor:
        return output.float().sigmoid()

    def metrics(self) -> MetricCollection:
        count = len(self.number)
        return collecting(count, torch.zeros(0, count, dtype=torch.uint8))

    def update(self, metrics: MetricCollection, values: Tensor, target: Tensor) -> None:
        metrics.update(pad(values, (0, target.shape[1] - values.shape[1])), target)

    def tune(self, metrics: MetricCollection) -> None:
        values, target = collected(metrics)
        if isinstance(self.threshold, str) and len(values):
            known = len(self.names)
            found = best_thresholds(values[:, :known], target[:, :known], shared=self.threshold == "tuned")
            self.thresholds = found.tolist()

    def scores(self, metrics: MetricCollection) -> dict[str, Tensor]:
        values, target = collected(metrics)
        unknown = [0.5] * (values.shape[1] - len(self.names))
        return multi_label_scores(values, target, values.new_tensor(self.thresholds + unknown)) if len(values) else {}

    def class_scores(self, values: Tensor, target: Tensor) -> dict[str, dict[str, float]]:
        thresholds, actual = values.new_tensor(self.thresholds), target[:, : values.shape[1]].bool()
        scores = by_name(self.names, binary_scores(values > thresholds, actual))
        return {name: scores[name] | {"threshold": threshold} for name, threshold in zip(self.names, self.thresholds, strict=True)}

    def metric_names(self) -> list[str]:
        return list(MULTI_LABEL_SCORES)

    def batch_figures(self, output: Tensor, target: Tensor) -> dict[str, Tensor]:
        predicted = output.sigmoid() > output.new_tensor(self.thresholds)
        return {"subset_accuracy": (predicted == target[:, : output.shape[1]].bool()).all(dim=1).float().mean()}

    def answering(self) -> Labels:
        return Labels(self.names, self.thresholds)

    def cell_of(self, answer: Any) -> Any:
        """Written so that a manifest with it is read as the same labels."""
        joined = self.separator.join(answer)
        plain = self.check(joined) is None and self.labels(joined) == answer
        return joined if plain else json.dumps(answer, ensure_ascii=False)

    def strict(self, cells: Sequence[str | None]) -> Sequence[Hashable]:
        return [frozenset(self.labels(cell)) for cell in cells]

    def learnt(self) -> dict[str, Any]:
        return {"names": list(self.names), "thresholds": list(self.thresholds)}

    def set_learnt(self, learnt: dict[str, Any]) -> None:
        self.names, self.thresholds = list(learnt["names"]), list(learnt["thresholds"])
        self.number = {name: i for i, name in enumerate(self.names)}
