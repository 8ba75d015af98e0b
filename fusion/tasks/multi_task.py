"""Several tasks at once over shared encoders, with one head for each."""

import json
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torchmetrics import MetricCollection

from fusion.cell_text import canonical
from fusion.errors import UserError
from fusion.heads import FusionHead, PerTask
from fusion.inputs import Mixture
from fusion.processing.answers import SeveralAnswers
from fusion.rebuilding import rebuilt
from fusion.tasks.base import OnUnseen, Pool, Task
from fusion.tasks.metrics import collected, collecting
from fusion.tasks.retrieval import Retrieval
from fusion.tasks.weighting import dynamic_weights

Weighting = Literal["fixed", "uncertainty", "dynamic", "gradnorm"]


@dataclass
class SubTask:
    """One of several tasks.

    Args:
        task: the task.
        column: the manifest's column with its targets; a sample whose cell is empty doesn't take part in this task, but for MultiLabel it
            is one without labels. None: for Retrieval, which has none.
        name: its name in scores and predictions; the column at the default.
        weight: factor of its loss, above 0.
        head: class of its head, if not model.head: a class of fusion.heads, or a dotted name.
        head_args: arguments of that head.
    """

    task: Task
    column: str | None = None
    name: str | None = None
    weight: float = 1.0
    head: str | None = None
    head_args: dict[str, Any] | None = None

    def state(self) -> dict[str, Any]:
        spec = {"class": f"{type(self.task).__module__}.{type(self.task).__qualname__}", "init": dict(self.task.init_args)}
        return {name: getattr(self, name) for name in ("column", "name", "weight", "head", "head_args")} | {"task": spec}


class MultiTask(Task):
    """Train several tasks together: the loss is the weighted sum of theirs.

        l = sum_i w_i l_i            mean over the samples that have a target of task i

    Every task gets its own head, of the class of model.head or its own; encoders are shared. Scores are those of the tasks, by name:
    sentiment_accuracy. The best checkpoint is chosen by the loss, unless --monitor names a score. An alignment of modalities as an addition
    to another task is a Retrieval with a small weight and the head DualEncoder.

    Target: (B, W) float32, all tasks' targets side by side, NaN where missing. Values: (B, K), side by side.

    Args:
        tasks: the tasks.
        weighting: "fixed" keeps the given weights, which Kurin et al. (2022, "In Defense of the Unitary Scalarization") found as good as
            any balancing; "uncertainty" learns a variance of each task (Kendall et al., 2018); "dynamic" gives more weight to losses that
            fall slowly (Liu et al., 2019); "gradnorm" makes the tasks' gradients of the encoders' last layers of similar size (Chen et al.,
            2018).
        temperature: of weighting=dynamic: the higher, the more equal the weights; 2 at the default.
        smoothing: of weighting=dynamic: share of the previous mean in the mean loss of an epoch, from 0 (none, at the default) to below 1.
        alpha: of weighting=gradnorm: how much larger the gradients of tasks that learn slowly are to be; 1.5 at the default.
        lr: of weighting=gradnorm: step size of the weights; 0.025 at the default.
    """

    monitor = "loss"
    takes_lists = True

    def __init__(
        self,
        tasks: list[SubTask],
        weighting: Weighting = "fixed",
        temperature: float | None = None,
        smoothing: float | None = None,
        alpha: float | None = None,
        lr: float | None = None,
    ) -> None:
        super().__init__()
        parts = [part if isinstance(part, SubTask) else sub_task(part) for part in tasks]
        check_parts(parts)
        if weighting not in ("fixed", "uncertainty", "dynamic", "gradnorm"):
            raise UserError(f"task: weighting is '{weighting}'; expected fixed, uncertainty, dynamic or gradnorm")
        for of, option, value, least, most in (
            ("dynamic", "temperature", temperature, 0, math.inf),
            ("dynamic", "smoothing", smoothing, -1e-9, 1),
            ("gradnorm", "alpha", alpha, -1e-9, math.inf),
            ("gradnorm", "lr", lr, 0, math.inf),
        ):
            if value is not None and weighting != of:
                raise UserError(f"task: {option} is an option of weighting={of}, but weighting is {weighting}; leave it out")
            if value is not None and not least < value < most:
                raise UserError(
                    f"task: {option} is {value}; expected a number {'from 0' if least else 'above 0'}{' to below 1' * (most == 1)}"
                )
        self.parts = parts
        self.tasks = torch.nn.ModuleList(part.task for part in parts)
        self.titles = [str(part.name or part.column or type(part.task).__name__.lower()) for part in parts]
        self.weighting = weighting
        self.temperature, self.smoothing = 2.0 if temperature is None else temperature, smoothing or 0.0
        self.alpha, self.lr = 1.5 if alpha is None else alpha, 0.025 if lr is None else lr
        self.contrasts = any(task.contrasts for task in self.each)  # type: ignore[misc]
        self.mixable = all(task.mixable for task in self.each)  # type: ignore[misc]
        if all(task.contrasts for task in self.each):
            raise UserError("task: MultiTask needs a task besides Retrieval, by whose loss the best checkpoint is chosen")
        if self.contrasts and weighting == "gradnorm":
            raise UserError("task: weighting=gradnorm needs losses of single samples, which Retrieval has none of; use another weighting")
        self.minimised = frozenset({"loss"} | {f"{t}_{name}" for t, task in self.named() for name in task.minimised})  # type: ignore[misc]
        self.headline = {f"{t} {title}": f"{t}_{name}" for t, task in self.named() for title, name in [headline_of(task)]}  # type: ignore[misc]
        first = self.titles[0]
        self.bounded, self.baseline = f"{first}_{self.each[0].bounded}", f"{first}_{self.each[0].baseline}"  # type: ignore[misc]
        self.figure_names = tuple(f"{title}_loss" for title in self.titles)  # type: ignore[misc]
        self.tuned = ("state_of_tasks", "state_of_weights")  # type: ignore[misc]
        self.register_buffer("weights", torch.tensor([float(part.weight) for part in parts]), persistent=False)
        self.earlier: list[list[float]] = []  # mean losses of the last two epochs, for dynamic weights
        self.initial: list[float | None] = [None] * len(parts)  # losses of the first update that had any of their samples, for GradNorm
        self.target_specs: list[tuple[torch.dtype, tuple[int, ...]]] = []
        self.shares: list[float] = [1.0] * len(parts)  # of the training samples that have each target

    weights: Tensor

    @property
    def each(self) -> list[Task]:
        return list(self.tasks)  # type: ignore[arg-type]

    def named(self) -> list[tuple[str, Task]]:
        return list(zip(self.titles, self.each, strict=True))

    def state(self) -> dict[str, Any]:
        return super().state() | {"init": self.init_args | {"tasks": [part.state() for part in self.parts]}}

    # Targets

    @property
    def target_columns(self) -> list[str]:
        return [part.column for part in self.parts if part.column is not None]

    def joined(
        self, columns: Mapping[str, Sequence[str | None]], bad: dict[int, str], inputs: Mapping[str, Iterable[Hashable]]
    ) -> list[str | None]:
        identities = {name: list(cells) for name, cells in inputs.items()}
        by_task: list[Sequence[str | None]] = []
        for part in self.parts:
            if isinstance(part.task, Retrieval):
                by_task.append(part.task.pair(identities))
            else:
                by_task.append([cell if cell is None else canonical(cell.strip()) or None for cell in columns[str(part.column)]])
        return [json.dumps(row, ensure_ascii=False) for row in zip(*by_task, strict=True)]

    def cells(self, cells: Sequence[str | None]) -> list[list[str | None]]:
        """The cells by task."""
        rows = [[None] * len(self.parts) if cell is None else json.loads(cell) for cell in cells]
        return [[row[i] for row in rows] for i in range(len(self.parts))]

    def has_target(self, cells: Sequence[str | None], task: Task) -> np.ndarray:
        """(n,) bool: which cells are a target; an empty one is none, unless the task accepts it (no labels)."""
        if task.check(None) is None:
            return np.ones(len(cells), dtype=bool)
        return np.array([cell is not None for cell in cells], dtype=bool)

    def check(self, cell: str | None) -> str | None:
        by_task = [of_task[0] for of_task in self.cells([cell])]
        flaws = [
            f"{title}: {flaw}"
            for (title, task), one in zip(self.named(), by_task, strict=True)
            if one is not None and (flaw := task.check(one)) is not None
        ]
        if flaws:
            return flaws[0]
        return (
            None if any(self.has_target([one], task)[0] for one, task in zip(by_task, self.each, strict=True)) else "all labels are missing"
        )

    def learn(self, cells: Mapping[str, Sequence[str | None]], *, column: str, on_unseen: OnUnseen) -> None:
        by_split = {split: self.cells(of_split) for split, of_split in cells.items()}
        self.names, self.target_specs, self.shares = [], [], []
        for i, (title, task) in enumerate(self.named()):
            present = {
                split: [c for c, has in zip(of[i], self.has_target(of[i], task), strict=True) if has] for split, of in by_split.items()
            }
            task.learn(present, column=self.parts[i].column or title, on_unseen=on_unseen)
            encoded = torch.from_numpy(task.encode(present.get("train", [])[:1]))
            self.target_specs.append((encoded.dtype, tuple(encoded.shape[1:])))
            self.names += [f"{title}_{name}" for name in task.names]
            self.shares.append(len(present.get("train", [])) / max(1, len(cells.get("train", []))))

    @property
    def out_dim(self) -> int:
        return sum(task.out_dim for task in self.each) + (len(self.parts) if self.weighting == "uncertainty" else 0)

    def encode(self, cells: Sequence[str | None]) -> np.ndarray:
        columns = []
        for (_, shape), task, of_task in zip(self.target_specs, self.each, self.cells(cells), strict=True):
            target = np.full((len(cells), math.prod(shape)), np.nan, dtype=np.float32)
            has = self.has_target(of_task, task)
            if has.any():
                target[has] = task.encode([cell for cell, there in zip(of_task, has, strict=True) if there]).reshape(int(has.sum()), -1)
            columns.append(target)
        return np.concatenate(columns, axis=1)

    def targets(self, target: Tensor) -> list[tuple[Tensor, Tensor]]:
        """By task, the targets (B, ...) in the task's own form, and (B,) bool, where there is one; elsewhere its values are meaningless."""
        found = []
        parts = target.split([math.prod(shape) for _, shape in self.target_specs], dim=1)
        for (dtype, shape), part in zip(self.target_specs, parts, strict=True):
            missing = part.isnan().any(dim=1)
            found.append((part.nan_to_num(0.0).to(dtype).reshape(len(part), *shape), ~missing))
        return found

    def outputs(self, output: Tensor) -> list[Tensor]:
        """The heads' outputs by task."""
        return list(output[:, : sum(task.out_dim for task in self.each)].split([task.out_dim for task in self.each], dim=1))

    def unseen(self, cells: Sequence[str | None]) -> int:
        by_task = zip(self.each, self.cells(cells), strict=True)
        return sum(task.unseen([c for c, has in zip(of, self.has_target(of, task), strict=True) if has]) for task, of in by_task)

    def strata(self, cells: Sequence[str | None]) -> list[str]:
        """Those of the first task."""
        task, of_task = self.each[0], self.cells(cells)[0]
        has = self.has_target(of_task, task)
        strata = iter(task.strata([cell for cell, there in zip(of_task, has, strict=True) if there]))
        return [next(strata) if there else "" for there in has]

    def units(self, cells: Sequence[str | None]) -> list[str | None]:
        """Those of a task that has any."""
        for task, of_task in zip(self.each, self.cells(cells), strict=True):
            units = task.units(of_task)
            if any(units):
                return units
        return super().units(cells)

    def summary(self, cells: Sequence[str | None]) -> str:
        lines = []
        for (title, task), of_task in zip(self.named(), self.cells(cells), strict=True):
            present = [cell for cell, has in zip(of_task, self.has_target(of_task, task), strict=True) if has]
            lacking = f" ({len(cells) - len(present):,} without)" if len(present) < len(cells) else ""
            lines.append(f"{title}: {task.summary(present)}{lacking}")
        return "; ".join(lines)

    # Heads

    def check_head(self, head: FusionHead) -> None:
        if not isinstance(head, PerTask):
            raise UserError(f"MultiTask needs a head for each task (PerTask), but the head is {type(head).__name__}")
        for task, own in zip(self.each, head.heads, strict=True):
            task.check_head(own)  # type: ignore[arg-type]
            if getattr(own, "matcher", None) is not None:
                raise UserError(
                    "a matcher needs batches without shared items, which only Retrieval alone has; leave matcher out of head_args"
                )

    # Loss

    def update_loss(self, output: Tensor, target: Tensor, update_target: Tensor | None = None, mixture: Mixture | None = None) -> Tensor:
        return self.weighted(self.update_losses(output, target, update_target, mixture), output)

    def update_losses(
        self, output: Tensor, target: Tensor, update_target: Tensor | None = None, mixture: Mixture | None = None
    ) -> list[Tensor]:
        """Of each task (B,), normalised so that its mean over the update is the weighted mean over the samples that have its target."""
        of_update = self.targets(target if update_target is None else update_target)
        losses = []
        for task, own, (one, has), (everyone, all_have) in zip(
            self.each, self.outputs(output), self.targets(target), of_update, strict=True
        ):
            if mixture is not None:  # only samples with this target that have a partner with it
                has = has & has.index_select(0, mixture.partner)
            each = task.of_mixture(task.loss, own, one, mixture)
            losses.append(torch.where(has, each, 0.0) / mean_weight(task, everyone, all_have))
        return losses

    def contrast(self, pool: Pool) -> Tensor:
        rows = pool.scored
        losses = []
        targets = self.targets(pool.target)
        for task, own, (one, has) in zip(self.each, self.outputs(pool.output), targets, strict=True):
            if task.contrasts:
                losses.append(task.contrast(Pool(own, one, rows)))
            else:
                losses.append(torch.where(has[rows], task.loss(own[rows], one[rows]), 0.0) / mean_weight(task, one, has))
        return self.weighted(losses, pool.output[rows])

    def weighted(self, losses: Sequence[Tensor], output: Tensor) -> Tensor:
        """Their weighted sum (B,)."""
        total = torch.stack([loss.float() for loss in losses], dim=1) * self.weights
        if self.weighting != "uncertainty":
            return total.sum(dim=1)
        # Kendall et al. (2018), with s = log variance: l / var + s / 2; of numbers, the squared error of Regression is halved already.
        log_variance = output[:, -len(self.parts) :].float()
        return (total * torch.exp(-log_variance) + log_variance / 2).sum(dim=1)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return self.update_loss(output, target)

    def plain_loss(self, output: Tensor, target: Tensor) -> Tensor:
        """The sum by the given weights, whatever the weighting, each loss divided by the share of training samples that have its target,
        so that the mean is that of `update_loss`; NaN for a sample that has no target, or for tasks without losses of single samples."""
        each = []
        for task, own, (one, has) in zip(self.each, self.outputs(output), self.targets(target), strict=True):
            each.append(torch.where(has, task.plain_loss(own, one), torch.nan))
        weights = output.new_tensor([part.weight / share for part, share in zip(self.parts, self.shares, strict=True)], dtype=torch.float32)
        losses = torch.stack(each, dim=1) * weights
        return torch.where(losses.isnan().all(dim=1), torch.nan, losses.nansum(dim=1))

    def batch_figures(self, output: Tensor, target: Tensor) -> dict[str, Tensor]:
        figures = {}
        parts = zip(self.named(), self.outputs(output), self.targets(target), self.shares, strict=True)
        for (title, task), own, (one, has), share in parts:
            # Not by the number in this batch: means over batches then have no bias, however an update is divided.
            figures[f"{title}_loss"] = torch.where(has, task.loss(own, one).float(), 0.0).mean() / share
        return figures

    def end_epoch(self, means: Mapping[str, float]) -> None:
        if self.weighting != "dynamic":
            return
        losses = [means[f"{title}_loss"] for title in self.titles]
        if self.earlier:
            losses = [self.smoothing * a + (1 - self.smoothing) * b for a, b in zip(self.earlier[-1], losses, strict=True)]
        self.earlier = [*self.earlier[-1:], losses]
        if len(self.earlier) == 2:
            given = torch.tensor([float(part.weight) for part in self.parts], dtype=torch.float64)
            factors = torch.tensor(dynamic_weights(self.earlier[0], self.earlier[1], self.temperature), dtype=torch.float64)
            self.set_weights((given * factors).tolist())

    def set_weights(self, weights: Sequence[float]) -> None:
        self.weights = torch.tensor(weights, dtype=torch.float32, device=self.weights.device)

    # Scores and answers

    def values(self, output: Tensor) -> Tensor:
        return torch.cat([task.values(own) for task, own in zip(self.each, self.outputs(output), strict=True)], dim=1)

    def value_widths(self) -> list[int]:
        return [task.values(torch.zeros(1, task.out_dim)).shape[1] for task in self.each]

    def by_task(self, values: np.ndarray) -> list[np.ndarray]:
        return np.split(values, np.cumsum(self.value_widths())[:-1], axis=1)

    def metrics(self) -> MetricCollection:
        width = sum(math.prod(shape) for _, shape in self.target_specs)
        return collecting(sum(self.value_widths()), torch.zeros(0, width))

    def update(self, metrics: MetricCollection, values: Tensor, target: Tensor) -> None:
        metrics.update(values, target)

    def metrics_by_task(self, metrics: MetricCollection) -> list[tuple[str, Task, MetricCollection]]:
        """Each task's own metrics, of the samples that have its target; without tasks of which there are none."""
        values, target = collected(metrics)
        found = []
        for (title, task), own, (one, has) in zip(
            self.named(), values.split(self.value_widths(), dim=1), self.targets(target), strict=True
        ):
            if bool(has.any()):
                of_task = task.metrics()
                for metric in of_task.values(copy_state=False):
                    metric.sync_on_compute = False  # the samples are those of all ranks already
                task.update(of_task, own[has], one[has])
                found.append((title, task, of_task))
        return found

    def tune(self, metrics: MetricCollection) -> None:
        for _, task, of_task in self.metrics_by_task(metrics):
            task.tune(of_task)

    def scores(self, metrics: MetricCollection) -> dict[str, Tensor]:
        return {
            f"{title}_{name}": value
            for title, task, of_task in self.metrics_by_task(metrics)
            for name, value in task.scores(of_task).items()
        }

    def class_scores(self, values: Tensor, target: Tensor) -> dict[str, dict[str, float]]:
        by_task = zip(self.named(), values.split(self.value_widths(), dim=1), self.targets(target), strict=True)
        return {
            f"{title} {name}": scores
            for (title, task), own, (one, has) in by_task
            for name, scores in task.class_scores(own[has], one[has]).items()
        }

    def metric_names(self) -> list[str]:
        return [f"{title}_{name}" for title, task in self.named() for name in task.metric_names()]

    def answering(self) -> SeveralAnswers:
        # A task of one's own may define answers alone.
        parts = {title: task if type(task).answering is Task.answering else task.answering() for title, task in self.named()}
        return SeveralAnswers(self.names, parts, self.value_widths())

    def cell_of(self, answer: Any) -> Any:
        return json.dumps({title: task.cell_of(answer[title]) for title, task in self.named()}, ensure_ascii=False)

    def columns(self, values: np.ndarray) -> dict[str, list[Any]]:
        columns: dict[str, list[Any]] = {}
        for (title, task), own in zip(self.named(), self.by_task(values), strict=True):
            columns[f"{title}_prediction"] = [task.cell_of(answer) for answer in task.answers(own)]
            columns |= {f"{title}_{name}": cells for name, cells in task.columns(own).items()}
        return columns

    def bound(self, seen: Sequence[Hashable], cells: Sequence[str | None]) -> float:
        """Of the first task."""
        task, of_task = self.each[0], self.cells(cells)[0]
        has = self.has_target(of_task, task)
        kept = [(what, cell) for what, cell, there in zip(seen, of_task, has, strict=True) if there]
        return task.bound([what for what, _ in kept], [cell for _, cell in kept]) if kept else math.nan

    # State

    @property
    def state_of_tasks(self) -> list[dict[str, Any]]:
        return [{name: task.learnt()[name] for name in task.tuned} for task in self.each]

    @state_of_tasks.setter
    def state_of_tasks(self, states: Sequence[dict[str, Any]]) -> None:
        for task, state in zip(self.each, states, strict=True):
            task.set_tuned(state)

    @property
    def state_of_weights(self) -> dict[str, Any]:
        return {"weights": self.weights.tolist(), "earlier": self.earlier, "initial": self.initial}

    @state_of_weights.setter
    def state_of_weights(self, state: dict[str, Any]) -> None:
        self.set_weights(state["weights"])
        self.earlier, self.initial = state["earlier"], state["initial"]

    def learnt(self) -> dict[str, Any]:
        specs = [[str(dtype).removeprefix("torch."), list(shape)] for dtype, shape in self.target_specs]
        of_tasks = [task.learnt() for task in self.each]
        own = {"state_of_tasks": self.state_of_tasks, "state_of_weights": self.state_of_weights}
        return {"names": list(self.names), "tasks": of_tasks, "target_specs": specs, "shares": list(self.shares)} | own

    def set_learnt(self, learnt: dict[str, Any]) -> None:
        self.names = list(learnt["names"])
        self.shares = list(learnt["shares"])
        self.target_specs = [(getattr(torch, dtype), tuple(shape)) for dtype, shape in learnt["target_specs"]]
        for task, state in zip(self.each, learnt["tasks"], strict=True):
            task.set_learnt(state)
        self.set_tuned(learnt)


def sub_task(state: Mapping[str, Any]) -> SubTask:
    """From its state."""
    return SubTask(**dict(state) | {"task": rebuilt(state["task"], Task)})


def check_parts(parts: Sequence[SubTask]) -> None:
    """Raises UserError for fewer than two tasks, two of one name, and columns or weights that can't be."""
    if len(parts) < 2:
        raise UserError(f"task: MultiTask has {len(parts)} tasks; expected at least two (a single one is given as model.task itself)")
    seen: dict[str, int] = {}
    for i, part in enumerate(parts):
        kind = type(part.task).__name__
        if isinstance(part.task, MultiTask):
            raise UserError("task: a MultiTask can't be one of the tasks of another; list all tasks in one")
        if isinstance(part.task, Retrieval) != (part.column is None):
            needs = "reads no column; leave it out" if part.column is not None else "needs a column"
            raise UserError(f"task: tasks[{i}] ({kind}) {needs}")
        title = str(part.name or part.column or kind.lower())
        if title in seen:
            raise UserError(f"task: tasks[{seen[title]}] and tasks[{i}] are both called '{title}'; give one of them another name")
        seen[title] = i
        if not 0 < part.weight < math.inf:
            raise UserError(f"task: the weight of '{title}' is {part.weight}; expected a number above 0")
        if part.head_args is not None and part.head is None:
            raise UserError(f"task: '{title}' has head_args but no head; give the class of its head, too")


def mean_weight(task: Task, target: Tensor, has: Tensor) -> Tensor:
    """The mean weight of all samples of an update, 0 for those without a target (1 each, where the task doesn't weight samples)."""
    weight = task.weight(target)
    return (has.float() if weight is None else torch.where(has, weight, 0.0)).mean().clamp(min=1e-12)


def headline_of(task: Task) -> tuple[str, str]:
    """Title and name of the score that is printed of a task: the one that has bounds, if it is among its own, else its first."""
    entries = list(task.headline.items())
    return next(((title, name) for title, name in entries if name == task.bounded), entries[0])
