"""The contract of all tasks."""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection

from fusion.errors import UserError, nearest
from fusion.heads import FusionHead
from fusion.inputs import Mixture
from fusion.processing.answers import Answering
from fusion.rebuilding import Rebuildable

OnUnseen = Literal["error", "count_as_wrong"]


class Pool(NamedTuple):
    """All samples of an update, on all ranks and in all accumulated batches, of which some are scored: their outputs (G, ...) and targets
    (G, ...), and scored (B,) int64, the numbers of those among them."""

    output: Tensor
    target: Tensor
    scored: Tensor


class Task(Rebuildable, nn.Module, ABC):
    """Defines how targets are read and learnt from the training split, the loss of each sample, the scores and the answers.

    A task depends on no file, device or trainer. It is a module so that tensors of its loss (class weights) are on the model's device;
    its buffers are not part of a checkpoint's weights, but its `state` is stored in the checkpoint.

    Shapes: output (B, out_dim), of the head; values (B, K) float32, which are scored (probabilities, standardised numbers); target
    (B, ...), rows of the array that `encode` returns.

    monitor: the score by which the best checkpoint is chosen; may be set to any of `metric_names`, or "loss". minimised: the scores of
    which the lowest is the best. headline: the scores that are printed, by column title. baseline: the name under which the `bounded` score
    of the best constant answer is reported. bounded: the score that `bound` bounds. takes_lists: whether a target's cell may be a list.
    one_of_classes: whether the classes are mutually exclusive, which some heads assume. tuned: attributes that `tune` sets, each under its
    name in `learnt`. target_columns: the columns that are read instead of data.columns.label, if not None. contrasts: whether a sample's
    loss compares it with the others of its update (see `contrast`). draws_apart: whether no two samples of an update may have the same
    number in one of the columns of the target. scores_loss: whether `scores` include the loss, since single samples have none.
    mixable: whether a sample can be mixed with another one together with its target (model.mixing): its loss must not depend on others.
    distillable: whether a model can learn from another one of the same task (model.teacher). softened: whether that has a temperature.
    """

    monitor: str
    minimised: ClassVar[frozenset[str]] = frozenset({"loss"})
    headline: ClassVar[Mapping[str, str]]
    baseline: ClassVar[str]
    bounded: ClassVar[str]
    figure_names: ClassVar[tuple[str, ...]] = ()  # of `batch_figures`
    takes_lists: ClassVar[bool] = False
    tuned: ClassVar[tuple[str, ...]] = ()
    one_of_classes: ClassVar[bool] = False
    contrasts: ClassVar[bool] = False
    draws_apart: ClassVar[bool] = False
    scores_loss: ClassVar[bool] = False
    mixable: ClassVar[bool] = True
    distillable: ClassVar[bool] = False
    softened: ClassVar[bool] = False

    names: list[str]  # of the outputs: classes, labels

    @property
    def target_columns(self) -> list[str] | None:
        return None

    @property
    def mode(self) -> Literal["max", "min"]:
        """Whether the highest `monitor` is the best, or the lowest."""
        return "min" if self.monitor in self.minimised else "max"

    # Targets

    @abstractmethod
    def check(self, cell: str | None) -> str | None:
        """Returns why a target's cell is invalid, in a few words for the list of issues, or None if it is valid. Lists are JSON."""

    @abstractmethod
    def learn(self, cells: Mapping[str, Sequence[str | None]], *, column: str, on_unseen: OnUnseen) -> None:
        """Learn the classes, labels or scale of the targets from the training split.

        Args:
            cells: by split, the targets' cells, all of which `check` accepts.
            column: the name of their column in the manifest, for messages.
            on_unseen: whether classes that are missing in the training split are an "error", or "count_as_wrong".

        Raises UserError for targets that nothing can be learnt from.
        """

    def joined(
        self, columns: Mapping[str, Sequence[str | None]], bad: dict[int, str], inputs: Mapping[str, Iterable[Hashable]]
    ) -> list[str | None]:
        """One target cell per sample from several columns by name (data.columns.label: [..], or `target_columns`), or from the identities
        of its inputs, by name; reasons for invalid ones, by position, go to `bad`. Raises UserError for a task whose target is one column.
        """
        raise UserError(f"data.columns.label names {len(columns)} columns, but {type(self).__name__} reads one")

    @property
    def out_dim(self) -> int:
        """Width of the head's output."""
        return len(self.names)

    def check_head(self, head: FusionHead) -> None:
        """Raises UserError for a head whose output this task can't use."""
        if head.embeds_pairs:
            raise UserError(
                f"the head {type(head).__name__} embeds pairs, for the task Retrieval; choose another head for {type(self).__name__}"
            )
        if head.one_of_classes and not self.one_of_classes:
            raise UserError(
                f"the head {type(head).__name__} treats its outputs as classes of which exactly one is right, which isn't "
                f"so in {type(self).__name__}; choose another head"
            )

    @abstractmethod
    def encode(self, cells: Sequence[str | None]) -> np.ndarray:
        """Returns the targets (n, ...) as the loss and the scores expect them."""

    def unseen(self, cells: Sequence[str | None]) -> int:
        """Number of samples with a class that is missing in the training split."""
        return 0

    @abstractmethod
    def strata(self, cells: Sequence[str | None]) -> list[str]:
        """Returns each sample's stratum (a class, a range of numbers), of which all splits get about the same share."""

    def units(self, cells: Sequence[str | None]) -> list[str | None]:
        """Returns for each sample what it must share a split with, where the manifest has no groups; None for nothing."""
        return [None] * len(cells)

    @abstractmethod
    def summary(self, cells: Sequence[str | None]) -> str:
        """Describes a split's targets in one line, for the plan."""

    # Loss

    @abstractmethod
    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Returns the loss (B,) of each sample, times its weight if samples are weighted."""

    def update_loss(self, output: Tensor, target: Tensor, update_target: Tensor | None = None, mixture: Mixture | None = None) -> Tensor:
        """Returns the loss (B,) of each sample; where samples are weighted, divided by the mean weight of the whole update (update_target),
        so that the mean over ranks and accumulated batches is the weighted mean of the whole update. Of mixed samples divided by the same
        mean weight: a batch is mixed within itself, so that the mean of its weights is the same.
        """
        each = self.of_mixture(self.loss, output, target, mixture)
        weight = self.weight(target if update_target is None else update_target)
        return each if weight is None else each / weight.mean()

    def contrast(self, pool: Pool) -> Tensor:
        """Returns the loss (B,) of the scored samples of an update, where `contrasts`."""
        raise NotImplementedError

    def weight(self, target: Tensor) -> Tensor | None:
        """Returns the weights (B,), by the mean of which over an update the losses are divided; None without weights."""
        return None

    def plain_loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Returns the loss (B,) for comparison and reports: without weights and smoothing, NaN for a sample that has none."""
        return self.loss(output, target)

    def confidence(self, output: Tensor, target: Tensor) -> Tensor:
        """Returns the confidence (B,) in the true answer, from 0 to 1: exp(-loss), which is the true class's probability under cross
        entropy."""
        return torch.exp(-self.plain_loss(output, target))

    def of_mixture(self, each: Callable[[Tensor, Tensor], Tensor], output: Tensor, target: Tensor, mixture: Mixture | None) -> Tensor:
        """Returns the values (B,) of `each` (the loss, the confidence) for samples that are mixed with one another: the weighted mean of
        its values for the targets of both. Without a mixture, each(output, target)."""
        if mixture is None:
            return each(output, target)
        partner, weight = mixture
        return weight * each(output, target) + (1 - weight) * each(output, target.index_select(0, partner))

    # Distillation, where `distillable`

    def teacher_outputs(self, output: Tensor) -> Tensor:
        """Returns the outputs of a teacher by name, (B, len(names)), of which a student picks its own names: logits, or numbers in the
        target's own units."""
        raise NotImplementedError

    def soft_target(self, outputs: Tensor, temperature: float) -> Tensor:
        """Returns the student's target (B, len(names)) from the `teacher_outputs` of its names; of several teachers the mean of their
        targets is used."""
        raise NotImplementedError

    def distillation_loss(self, output: Tensor, soft_target: Tensor, temperature: float) -> Tensor:
        """Returns the loss (B,) of each sample by the teacher's soft target: 0 where the student equals the teacher."""
        raise NotImplementedError

    # Scores and answers

    @abstractmethod
    def values(self, output: Tensor) -> Tensor:
        """Returns (B, K) float32: probabilities, or standardised numbers."""

    def answering(self) -> Answering:
        """How values become answers, without torch, for this task and for exported packages. Raises UserError for a task that defines
        `answers` alone."""
        raise UserError(f"{type(self).__name__} has no answering(), so that its models can't be exported")

    @abstractmethod
    def metrics(self) -> MetricCollection:
        """Fresh metrics, exact over any number of batches and ranks."""

    @abstractmethod
    def update(self, metrics: MetricCollection, values: Tensor, target: Tensor) -> None:
        """Add samples to the metrics."""

    def tune(self, metrics: MetricCollection) -> None:
        """Learn from a validation's metrics what training doesn't set, such as thresholds; called on all ranks after each validation."""

    def set_tuned(self, learnt: dict[str, Any]) -> None:
        """Restore what `tune` had set, of what `learnt` returned."""
        for name in self.tuned:
            setattr(self, name, learnt[name])

    def scores(self, metrics: MetricCollection) -> dict[str, Tensor]:
        """Computes the metrics, by name; undefined ones are NaN or left out."""
        return metrics.compute()

    def class_scores(self, values: Tensor, target: Tensor) -> dict[str, dict[str, float]]:
        """Scores of each class or label by itself, with its number of samples; none for a task without them."""
        return {}

    def metric_names(self) -> list[str]:
        """The names of the scores."""
        return list(map(str, self.metrics()))

    def batch_figures(self, output: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Figures that are logged of a training batch besides its loss, by name: means over its samples, without a device
        synchronisation."""
        return {}

    def end_epoch(self, means: Mapping[str, float]) -> None:
        """Called on all ranks after each training epoch, with the means of `batch_figures` over it."""

    def answers(self, values: np.ndarray) -> list[Any]:
        """Converts values (n, K) to each sample's answer: a class, a list of labels, a number."""
        return self.answering().answers(values)

    def in_units(self, values: np.ndarray) -> np.ndarray:
        """Converts values (n, K) to the target's own units."""
        return values if type(self).answering is Task.answering else self.answering().in_units(values)

    def cell_of(self, answer: Any) -> Any:
        """An answer as a table's cell."""
        return answer

    def columns(self, values: np.ndarray) -> dict[str, list[Any]]:
        """The columns for values (n, K) in a table of predictions, by name."""
        return {f"p_{name}": values[:, i].tolist() for i, name in enumerate(self.names)}

    def bound(self, seen: Sequence[Hashable], cells: Sequence[str | None]) -> float:
        """The best `bounded` score that any function of `seen` can reach on exactly these samples."""
        counts: dict[Hashable, dict[Hashable, int]] = defaultdict(lambda: defaultdict(int))
        for value, answer in zip(seen, self.strict(cells), strict=True):
            counts[value][answer] += 1
        return sum(max(of_value.values()) for of_value in counts.values()) / len(cells)

    def strict(self, cells: Sequence[str | None]) -> Sequence[Hashable]:
        """The targets in a form in which two are equal if the same answer is right for both."""
        return list(cells)

    # Checkpoint state, as plain data

    @abstractmethod
    def learnt(self) -> dict[str, Any]:
        """The state that `learn` has set, as plain data."""

    @abstractmethod
    def set_learnt(self, learnt: dict[str, Any]) -> None:
        """Restore the state that `learnt` returned."""


def reject_unused(loss: str, of: str, **options: Any) -> None:
    """Raises UserError for options of another loss than the chosen one."""
    for name, value in options.items():
        if value is not None and loss != of:
            raise UserError(f"task: {name} is an option of loss={of}, but loss is {loss}; leave out {name}, or set loss={of}")


def checked_weights(option: str, weights: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    """The weight of every name, 1 for those left out. Raises UserError for unknown names and weights that are not above 0."""
    for name, weight in weights.items():
        if name not in names:
            raise UserError(f"task: {option} has '{name}', which never occurs in train. {nearest(name, names)}")
        if not 0 < weight < float("inf"):
            raise UserError(f"task: {option} of '{name}' is {weight}; expected a number above 0")
    return {name: float(weights.get(name, 1.0)) for name in names}
