"""The contract that every task keeps."""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection

from fusion.rebuilding import Rebuildable

OnUnseen = Literal["error", "count_as_wrong"]


class Task(Rebuildable, nn.Module, ABC):
    """What is asked of a sample: how its target is read and learnt from the training split, the loss of each sample, scores and answers.

    A task knows no file, no device and no trainer. It is a module so that what it needs at the loss (weights of classes) is where the model
    is; its buffers are not part of a checkpoint's weights, `state` is.

    Shapes: output (B, out_dim), what the head gives; values (B, K) float32, what is scored (probabilities, standardised numbers); target
    (B, ...), rows of what `encode` gives.

    monitor: the score by which the best checkpoint is chosen, its greatest or, with mode "min", its least. headline: the scores that are
    printed, by the title of their column. baseline: the name of the score that one answer for all samples reaches, with bounded, the score
    of which `bound` is a bound. takes_lists: whether a target's cell may be a list. one_of_classes: whether exactly one class is right,
    which some heads assume.
    """

    monitor: ClassVar[str]
    mode: ClassVar[Literal["max", "min"]] = "max"
    headline: ClassVar[Mapping[str, str]]
    baseline: ClassVar[str]
    bounded: ClassVar[str]
    figure_names: ClassVar[tuple[str, ...]] = ()  # of `batch_figures`
    takes_lists: ClassVar[bool] = False
    one_of_classes: ClassVar[bool] = False

    names: list[str]  # of the outputs: classes, labels

    # The target, from cells to tensors.

    @abstractmethod
    def check(self, cell: str | None) -> str | None:
        """Why a target's cell can't be used, in a few words for the list of issues; None where it can. Lists are given as JSON."""

    @abstractmethod
    def learn(self, cells: Mapping[str, Sequence[str | None]], *, column: str, on_unseen: OnUnseen) -> None:
        """Learn from the training split what targets there are.

        Args:
            cells: by split, the targets' cells, all of which `check` accepts.
            column: their name in the manifest, for messages.
            on_unseen: whether classes that train lacks are an "error", or "count_as_wrong".

        Raises UserError for targets that nothing can be learnt from.
        """

    @property
    def out_dim(self) -> int:
        """How many numbers the head gives for a sample."""
        return len(self.names)

    @abstractmethod
    def encode(self, cells: Sequence[str | None]) -> np.ndarray:
        """(n, ...) the targets as the loss and the scores take them."""

    def unseen(self, cells: Sequence[str | None]) -> int:
        """How many of these samples have a class that train lacks."""
        return 0

    @abstractmethod
    def strata(self, cells: Sequence[str | None]) -> list[str]:
        """What splits are to have alike shares of: a class, a range of numbers."""

    @abstractmethod
    def summary(self, cells: Sequence[str | None]) -> str:
        """A split's targets in a line, for the plan."""

    # The loss.

    @abstractmethod
    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """(B,) the loss of each sample, times its weight where samples are weighted."""

    def weight(self, target: Tensor) -> Tensor | None:
        """(B,) the weights by whose mean over an update the losses are divided; None where none is weighted."""
        return None

    def plain_loss(self, output: Tensor, target: Tensor) -> Tensor:
        """(B,) the loss for comparison and for the report: without weights and smoothing, NaN where a sample has none."""
        return self.loss(output, target)

    def confidence(self, output: Tensor, target: Tensor) -> Tensor:
        """(B,) how much of the right answer an output has, from 0 to 1: exp(-loss), which is the true class's probability under cross
        entropy."""
        return torch.exp(-self.plain_loss(output, target))

    # Scores and answers.

    @abstractmethod
    def values(self, output: Tensor) -> Tensor:
        """(B, K) float32: probabilities, or standardised numbers."""

    def in_units(self, values: np.ndarray) -> np.ndarray:
        """(n, K) values as people read them: in the target's own units."""
        return values

    @abstractmethod
    def metrics(self) -> MetricCollection:
        """Fresh metrics, exact over any number of batches and ranks."""

    @abstractmethod
    def update(self, metrics: MetricCollection, values: Tensor, target: Tensor) -> None:
        """Take samples into the metrics."""

    def scores(self, metrics: MetricCollection) -> dict[str, Tensor]:
        """The metrics by name; those that the samples at hand don't define are left out."""
        return metrics.compute()

    def metric_names(self) -> list[str]:
        """The names that `scores` gives."""
        return list(map(str, self.metrics()))

    def batch_figures(self, output: Tensor, target: Tensor) -> dict[str, Tensor]:
        """What is logged of a training batch beside its loss, by name: means over its samples, without waiting for the device."""
        return {}

    @abstractmethod
    def answers(self, values: np.ndarray) -> list[Any]:
        """(n, K) to the answer of each sample, as a person would give it."""

    def cell_of(self, answer: Any) -> Any:
        """An answer as it is written into a table."""
        return answer

    def columns(self, values: np.ndarray) -> dict[str, list[Any]]:
        """What is written of (n, K) values into a table of predictions, by column."""
        return {f"p_{name}": values[:, i].tolist() for i, name in enumerate(self.names)}

    def bound(self, seen: Sequence[Hashable], cells: Sequence[str | None]) -> float:
        """The best `bounded` score on exactly these samples of any function of what is seen (alike where that is alike)."""
        found: dict[Hashable, dict[Hashable, int]] = defaultdict(lambda: defaultdict(int))
        for what, answer in zip(seen, self.strict(cells), strict=True):
            found[what][answer] += 1
        return sum(max(counts.values()) for counts in found.values()) / len(cells)

    def strict(self, cells: Sequence[str | None]) -> Sequence[Hashable]:
        """Targets that are equal where an answer to one is right for the other."""
        return list(cells)

    # State, as plain data.

    @abstractmethod
    def learnt(self) -> dict[str, Any]:
        """What `learn` found, as plain data."""

    @abstractmethod
    def set_learnt(self, learnt: dict[str, Any]) -> None:
        """Take what `learnt` gave."""
