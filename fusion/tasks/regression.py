"""Regression: one number."""

import math
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import huber_loss
from torchmetrics import MeanAbsoluteError, MeanSquaredError, MetricCollection

from fusion.cell_text import NUMBER
from fusion.errors import UserError
from fusion.tasks.base import OnUnseen, Task
from fusion.tasks.metrics import R2

LARGEST = 1e30  # float32 ends at 3.4e38, and only standardised numbers are squared
STRATA = 10


class Regression(Task):
    """Predict a number, standardised by the training split's mean and standard deviation.

        z = (y - mean) / deviation        l = (output - z)^2 / 2 ("mse"), |output - z| ("mae"), or between the two ("huber": the first up
        to a difference of `delta`, from there on delta (|output - z| - delta / 2))

    Target: (B,) and values: (B, 1), standardised, float32. Answers and scores (mae, rmse, r2) are in the target's own units.

    Args:
        loss: "mse", "mae" or "huber", as above.
        delta: difference from which "huber" is linear instead of quadratic, in standard deviations of the target.

    >>> task = Regression()
    >>> task.learn({"train": ["1", "2.5", "4"]}, column="price", on_unseen="error")
    >>> round(task.mean, 2), round(task.deviation, 2), task.check("12,5")
    (2.5, 1.22, "label '12,5' is not a number")
    """

    monitor = bounded = "mae"
    mode = "min"
    headline: ClassVar[Mapping[str, str]] = {"MAE": "mae", "RMSE": "rmse", "R2": "r2"}
    baseline = "median"

    def __init__(self, loss: Literal["mse", "mae", "huber"] = "mse", delta: float = 1.0) -> None:
        super().__init__()
        if loss not in ("mse", "mae", "huber"):
            raise UserError(f"task: loss is '{loss}'; expected mse, mae or huber")
        if not 0 < delta < math.inf:
            raise UserError(f"task: delta is {delta}; expected a number above 0")
        self.form, self.delta = loss, delta
        self.names = []
        self.mean, self.deviation = 0.0, 1.0

    def check(self, cell: str | None) -> str | None:
        if cell is None:
            return "label is missing"
        if not NUMBER.fullmatch(cell):
            return f"label {cell[:40]!r} is not a number"
        if abs(float(cell)) > LARGEST:
            return f"label {cell[:40]!r} is beyond {LARGEST:g}"
        return None

    def learn(self, cells: Mapping[str, Sequence[str | None]], *, column: str, on_unseen: OnUnseen) -> None:
        numbers = self.numbers(cells.get("train", ()))
        if len(numbers) < 2 or not 0 < numbers.std() < math.inf:
            reason = f"every target is {numbers[0]:g} up to rounding" if len(numbers) else "no sample is left"
            raise UserError(f"a regression needs different targets: in the training split {reason} (column '{column}')")
        self.names, self.mean, self.deviation = [column], float(numbers.mean()), float(numbers.std())

    @property
    def out_dim(self) -> int:
        return 1

    def numbers(self, cells: Sequence[str | None]) -> np.ndarray:
        return np.array([float(str(cell)) for cell in cells], dtype=np.float64)

    def encode(self, cells: Sequence[str | None]) -> np.ndarray:
        return ((self.numbers(cells) - self.mean) / self.deviation).astype(np.float32)

    def strata(self, cells: Sequence[str | None]) -> list[str]:
        """Ranges with about the same number of samples each, at most ten."""
        ranges = max(1, min(STRATA, len(cells) // STRATA))
        ranks = np.argsort(np.argsort(self.numbers(cells), kind="stable"), kind="stable")
        return [str(rank * ranges // len(cells)) for rank in ranks.tolist()]

    def summary(self, cells: Sequence[str | None]) -> str:
        low, middle, high = np.quantile(self.numbers(cells), [0, 0.5, 1]).tolist()
        return f"from {low:g} to {high:g}, median {middle:g}"

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        error = output[:, 0].to(torch.promote_types(output.dtype, torch.float32)) - target
        if self.form == "mse":
            return error.square() / 2
        return error.abs() if self.form == "mae" else huber_loss(error, torch.zeros_like(error), reduction="none", delta=self.delta)

    def values(self, output: Tensor) -> Tensor:
        return output.float()

    def in_units(self, values: np.ndarray) -> np.ndarray:
        return values.astype(np.float64) * self.deviation + self.mean

    def metrics(self) -> MetricCollection:
        return MetricCollection({"mae": MeanAbsoluteError(), "rmse": MeanSquaredError(squared=False), "r2": R2()}, compute_groups=False)

    def update(self, metrics: MetricCollection, values: Tensor, target: Tensor) -> None:
        metrics.update(values[:, 0], target)

    def scores(self, metrics: MetricCollection) -> dict[str, Tensor]:
        scores: dict[str, Any] = {name: metrics[name].compute() * self.deviation for name in ("mae", "rmse")}
        return scores | {"r2": metrics["r2"].compute()}

    def answers(self, values: np.ndarray) -> list[Any]:
        return self.in_units(values)[:, 0].tolist()

    def columns(self, values: np.ndarray) -> dict[str, list[Any]]:
        return {}

    def bound(self, seen: Sequence[Hashable], cells: Sequence[str | None]) -> float:
        """The lowest mean absolute error of any function of `seen`: that of the median over each group of samples with equal `seen`."""
        groups = defaultdict(list)
        for value, number in zip(seen, self.numbers(cells).tolist(), strict=True):
            groups[value].append(number)
        return sum(float(np.abs(np.array(group) - np.median(group)).sum()) for group in groups.values()) / len(cells)

    def learnt(self) -> dict[str, Any]:
        return {"names": list(self.names), "mean": self.mean, "deviation": self.deviation}

    def set_learnt(self, learnt: dict[str, Any]) -> None:
        self.names, self.mean, self.deviation = list(learnt["names"]), learnt["mean"], learnt["deviation"]
