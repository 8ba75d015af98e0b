"""Regression: one number, or several."""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import huber_loss
from torchmetrics import MetricCollection

from fusion.cell_text import NUMBER
from fusion.errors import UserError
from fusion.inputs import Mixture
from fusion.losses import feature_loss, gaussian_loss, quantile_loss
from fusion.processing.answers import Numbers
from fusion.tasks.base import OnUnseen, Task, reject_unused
from fusion.tasks.metrics import collected, collecting, number_scores

LARGEST = 1e30  # float32 ends at 3.4e38, and only standardised numbers are squared
STRATA = 10
LOSSES = ("mse", "mae", "huber", "quantile", "gaussian")
QUANTILES = (0.05, 0.5, 0.95)
HALF_WIDTH = 1.6448536269514722  # of a normal distribution's central 90 %, in deviations
IN_UNITS = ("mae", "rmse", "interval_width")


class Regression(Task):
    """Predict a number, standardised by the mean and standard deviation of the training split; or several.

        z = (y - mean) / deviation        l = (output - z)^2 / 2 ("mse"), |output - z| ("mae"), or between the two ("huber": the first up
        to a difference of `delta`, from there on delta (|output - z| - delta / 2))

    "quantile" predicts quantiles (`fusion.losses.quantile_loss`), of which the middle one is the answer; "gaussian" predicts a mean and a
    standard deviation (`fusion.losses.gaussian_loss`). Both report the `coverage` of their interval, the share of targets within it: from
    the first to the last quantile, or the central 90 %, and its mean `interval_width`.

    A target is a number, or with several targets, a list of as many (JSON in a text file), or a column for each (data.columns.label:
    [length, width]); the loss is the mean over them.

    Target: (B, T) and values: (B, T K), standardised, float32, with K outputs for each of T targets (1, the quantiles, or mean and
    deviation). Answers and scores (mae, rmse, r2, spearman, interval_width) are in the target's own units; with several targets each has
    its own scores (mae_NAME), and mae is the mean of theirs in deviations.

    Args:
        loss: "mse", "mae", "huber", "quantile" or "gaussian", above.
        delta: of "huber": where it turns from squares to differences, in deviations of the target, 1 at the default.
        quantiles: of "quantile": ascending probabilities between 0 and 1, 0.05, 0.5 and 0.95 at the default.

    >>> task = Regression()
    >>> task.learn({"train": ["1", "2.5", "4"]}, column="price", on_unseen="error")
    >>> round(task.mean[0], 2), round(task.deviation[0], 2), task.check("12,5")
    (2.5, 1.22, "label '12,5' is not a number")
    """

    monitor = bounded = "mae"
    minimised = frozenset({"loss", "mae", "rmse", "interval_width"})
    headline: ClassVar[Mapping[str, str]] = {"MAE": "mae", "RMSE": "rmse", "R2": "r2"}
    baseline = "median"
    takes_lists = distillable = True

    def __init__(
        self,
        loss: Literal["mse", "mae", "huber", "quantile", "gaussian"] = "mse",
        delta: float | None = None,
        quantiles: list[float] | None = None,
    ) -> None:
        super().__init__()
        if loss not in LOSSES:
            raise UserError(f"task: loss is '{loss}'; expected {', '.join(LOSSES[:-1])} or {LOSSES[-1]}")
        reject_unused(loss, "huber", delta=delta)
        reject_unused(loss, "quantile", quantiles=quantiles)
        if delta is not None and not 0 < delta < math.inf:
            raise UserError(f"task: delta is {delta}; expected a number above 0")
        levels = list(QUANTILES if quantiles is None else quantiles)
        if not levels or sorted(set(levels)) != levels or not 0 < levels[0] <= levels[-1] < 1:
            raise UserError(f"task: quantiles are {levels}; expected ascending probabilities between 0 and 1, such as [0.05, 0.5, 0.95]")
        self.form, self.delta, self.quantiles = loss, 1.0 if delta is None else delta, levels
        self.names = []
        self.mean: list[float] = []
        self.deviation: list[float] = []

    # Targets

    def check(self, cell: str | None) -> str | None:
        if cell is None:
            return "label is missing"
        try:
            parts = self.parts(cell)
        except ValueError:
            return f"label {cell[:40]!r} begins like a list, but is not a JSON list of numbers"
        if self.names and len(parts) != len(self.names):
            return f"label {cell[:40]!r} has {len(parts)} numbers, expected {len(self.names)}"
        return next((flaw for part in parts if (flaw := flaw_of(part)) is not None), None)

    def parts(self, cell: str) -> list[str | None]:
        """The texts of a cell's numbers. Raises ValueError for an invalid list."""
        if not cell.lstrip().startswith("["):
            return [cell]
        try:
            found = json.loads(cell)
        except RecursionError as error:
            raise ValueError("nested lists") from error
        if not isinstance(found, list) or not found or any(isinstance(one, list | dict | bool) for one in found):
            raise ValueError("not a list of numbers")
        return [None if one is None else str(one).strip() for one in found]

    def joined(
        self, columns: Mapping[str, Sequence[str | None]], bad: dict[int, str], inputs: Mapping[str, Iterable[Hashable]]
    ) -> list[str | None]:
        rows = list(zip(*columns.values(), strict=True))
        for i, row in enumerate(rows):
            for name, cell in zip(columns, row, strict=True):
                if (flaw := flaw_of(cell)) is not None:
                    bad.setdefault(i, f"{flaw} (column {name})")
        return [json.dumps(row) for row in rows]

    def learn(self, cells: Mapping[str, Sequence[str | None]], *, column: str, on_unseen: OnUnseen) -> None:
        train = cells.get("train", ())
        if not train:
            raise UserError(f"a regression needs different targets: in the training split no sample is left (column '{column}')")
        counts = {len(self.parts(str(cell))) for part in cells.values() for cell in part}
        if len(counts) > 1:
            sizes = " and ".join(map(str, sorted(counts)))
            raise UserError(f"column '{column}' has lists of {sizes} numbers; expected as many for each sample")
        numbers = self.numbers(train)
        names = column.split(",") if numbers.shape[1] > 1 else [column]
        self.names = names if len(names) == numbers.shape[1] else [f"{column}_{i}" for i in range(numbers.shape[1])]
        deviation = numbers.std(axis=0)
        for i, name in enumerate(self.names):
            if len(numbers) < 2 or not 0 < deviation[i] < math.inf:
                raise UserError(
                    f"a regression needs different targets: in the training split every target is {numbers[0, i]:g}, up to rounding "
                    f"(column '{name}')"
                )
        self.mean, self.deviation = numbers.mean(axis=0).tolist(), deviation.tolist()

    @property
    def width(self) -> int:
        """Outputs for each target."""
        return {"quantile": len(self.quantiles), "gaussian": 2}.get(self.form, 1)

    @property
    def out_dim(self) -> int:
        return len(self.names) * self.width

    def numbers(self, cells: Sequence[str | None]) -> np.ndarray:
        """(n, T) float64"""
        rows = [[float(str(part)) for part in self.parts(str(cell))] for cell in cells]
        return np.array(rows, dtype=np.float64).reshape(len(rows), len(rows[0]) if rows else len(self.names))

    def encode(self, cells: Sequence[str | None]) -> np.ndarray:
        return ((self.numbers(cells) - self.mean) / self.deviation).astype(np.float32)

    def strata(self, cells: Sequence[str | None]) -> list[str]:
        """Ranges with about as many samples in each, at most ten; of the first target."""
        ranges = max(1, min(STRATA, len(cells) // STRATA))
        first = np.array([float(str(self.parts(str(cell))[0])) for cell in cells])
        ranks = np.argsort(np.argsort(first, kind="stable"), kind="stable")
        return [str(rank * ranges // len(cells)) for rank in ranks.tolist()]

    def summary(self, cells: Sequence[str | None]) -> str:
        low, middle, high = np.quantile(self.numbers(cells), [0, 0.5, 1], axis=0).tolist()
        lines = [f"from {a:g} to {c:g}, median {b:g}" for a, b, c in zip(low, middle, high, strict=True)]
        return lines[0] if len(lines) == 1 else "; ".join(f"{name} {line}" for name, line in zip(self.names, lines, strict=True))

    # The loss

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        outputs = output.to(torch.promote_types(output.dtype, torch.float32)).unflatten(1, (len(self.names), self.width))
        if self.form == "quantile":
            return quantile_loss(outputs.flatten(0, 1), target.flatten(), self.quantiles).view_as(target).mean(dim=1)
        if self.form == "gaussian":
            return gaussian_loss(outputs[..., 0], outputs[..., 1], target).mean(dim=1)
        error = outputs[..., 0] - target
        if self.form == "mse":
            return error.square().mean(dim=1) / 2
        each = error.abs() if self.form == "mae" else huber_loss(error, torch.zeros_like(error), reduction="none", delta=self.delta)
        return each.mean(dim=1)

    def confidence(self, output: Tensor, target: Tensor) -> Tensor:
        if self.form != "gaussian":
            return super().confidence(output, target)
        mean = output.float().unflatten(1, (len(self.names), 2))[..., 0]  # a density may be above 1
        return torch.exp(-(mean - target).square().mean(dim=1) / 2)

    def of_mixture(self, each: Callable[[Tensor, Tensor], Tensor], output: Tensor, target: Tensor, mixture: Mixture | None) -> Tensor:
        """Mixes the numbers themselves, as Yao et al. (2022), "C-Mixup: Improving Generalization in Regression"."""
        if mixture is None:
            return each(output, target)
        partner, weight = mixture
        return each(output, weight * target + (1 - weight) * target.index_select(0, partner))

    # Distillation

    def teacher_outputs(self, output: Tensor) -> Tensor:
        """The answers: of quantiles the middle one, of a Gaussian the mean."""
        answers = self.answer_outputs(output.double())
        return answers * answers.new_tensor(self.deviation) + answers.new_tensor(self.mean)

    def soft_target(self, outputs: Tensor, temperature: float) -> Tensor:
        return ((outputs - outputs.new_tensor(self.mean)) / outputs.new_tensor(self.deviation)).float()

    def distillation_loss(self, output: Tensor, soft_target: Tensor, temperature: float) -> Tensor:
        """Half the squared difference of the answers, in deviations, averaged over the targets; numbers have no temperature."""
        return feature_loss(self.answer_outputs(output), soft_target)

    def answer_outputs(self, output: Tensor) -> Tensor:
        """(B, T) of the outputs those that are the answers."""
        outputs = output.unflatten(1, (len(self.names), self.width))
        return (outputs.sort(dim=2).values if self.form == "quantile" else outputs)[..., self.answer_place]

    # Scores and answers

    def values(self, output: Tensor) -> Tensor:
        outputs = output.float().unflatten(1, (len(self.names), self.width))
        if self.form == "quantile":  # which may cross
            outputs = outputs.sort(dim=2).values
        elif self.form == "gaussian":
            outputs = torch.stack([outputs[..., 0], (outputs[..., 1].clamp(-10, 10) / 2).exp()], dim=2)
        return outputs.flatten(1)

    def answering(self) -> Numbers:
        spread_place = 1 if self.form == "gaussian" else None
        return Numbers(self.names, self.mean, self.deviation, self.width, self.answer_place, spread_place)

    @property
    def answer_place(self) -> int:
        """Of the output that is the answer."""
        return len(self.quantiles) // 2 if self.form == "quantile" else 0

    def metrics(self) -> MetricCollection:
        return collecting(self.out_dim, torch.zeros(0, len(self.names)))

    def update(self, metrics: MetricCollection, values: Tensor, target: Tensor) -> None:
        metrics.update(values, target)

    def scores(self, metrics: MetricCollection) -> dict[str, Tensor]:
        values, target = (one.double() for one in collected(metrics))
        if not len(values):
            return {}
        units = values.new_tensor(self.deviation)
        outputs = values.unflatten(1, (len(self.names), self.width))
        each = number_scores(outputs[..., self.answer_place], target)
        if self.form in ("quantile", "gaussian") and self.width > 1:
            center, half = outputs[..., 0], outputs[..., 1] * HALF_WIDTH
            low, high = (center - half, center + half) if self.form == "gaussian" else (outputs[..., 0], outputs[..., -1])
            each |= {"coverage": ((low <= target) & (target <= high)).double().mean(dim=0), "interval_width": (high - low).mean(dim=0)}
        scores: dict[str, Tensor] = {}
        for name, score in each.items():
            if len(self.names) == 1:
                scores[name] = (score * units if name in IN_UNITS else score)[0]
            else:
                scores[name] = score.mean()
                own = score * units if name in IN_UNITS else score
                scores |= {f"{name}_{target_name}": one for target_name, one in zip(self.names, own, strict=True)}
        return {name: score.float() for name, score in scores.items()}

    def metric_names(self) -> list[str]:
        names = ["mae", "rmse", "r2", "spearman"]
        names += ["coverage", "interval_width"] if self.form in ("quantile", "gaussian") and self.width > 1 else []
        return names + ([f"{name}_{target}" for name in names for target in self.names] if len(self.names) > 1 else [])

    def cell_of(self, answer: Any) -> Any:
        return json.dumps(answer) if isinstance(answer, list) else answer

    def columns(self, values: np.ndarray) -> dict[str, list[Any]]:
        """Of "quantile", each quantile (q_0.05); of "gaussian", the deviation; of several targets, each answer by name."""
        found = self.in_units(values).reshape(len(values), len(self.names), self.width)
        several = len(self.names) > 1
        columns = {}
        for t, name in enumerate(self.names):
            suffix = f"_{name}" if several else ""
            if several:
                columns[name] = found[:, t, self.answer_place].tolist()
            if self.form == "quantile":
                columns |= {f"q_{level:g}{suffix}": found[:, t, k].tolist() for k, level in enumerate(self.quantiles)}
            elif self.form == "gaussian":
                columns[f"deviation{suffix}"] = found[:, t, 1].tolist()
        return columns

    def bound(self, seen: Sequence[Hashable], cells: Sequence[str | None]) -> float:
        """The least mean absolute error: of the median over the samples with equal inputs."""
        groups = defaultdict(list)
        for what, numbers in zip(seen, self.numbers(cells), strict=True):
            groups[what].append(numbers)
        units = np.ones(1) if len(self.names) == 1 else np.array(self.deviation)
        total = sum(float((np.abs(np.array(same) - np.median(same, axis=0)) / units).mean(axis=1).sum()) for same in groups.values())
        return total / len(cells)

    # Checkpoint state, as plain data

    def learnt(self) -> dict[str, Any]:
        return {"names": list(self.names), "mean": list(self.mean), "deviation": list(self.deviation)}

    def set_learnt(self, learnt: dict[str, Any]) -> None:
        self.names, self.mean, self.deviation = (list(learnt[key]) for key in ("names", "mean", "deviation"))


def flaw_of(text: str | None) -> str | None:
    """Why a text is not a usable number, or None if it is."""
    if text is None:
        return "label is missing"
    if not NUMBER.fullmatch(text.strip()):
        return f"label {text[:40]!r} is not a number"
    return f"label {text[:40]!r} is beyond {LARGEST:g}" if abs(float(text)) > LARGEST else None
