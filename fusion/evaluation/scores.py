"""Scores of a task's outputs, for all samples and for each group of them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fusion.tasks import Task


def score(task: Task, values: Tensor, cells: Sequence[str | None]) -> dict[str, float]:
    """All scores of a set of samples by name, with their number ("samples"), and the score of the best constant answer, under the
    task's name for it. Undefined scores are left out.

    Args:
        task: the task that defines the scores.
        values: (n, K), as `task.values` returns them.
        cells: the targets; a class that the task doesn't know always counts as wrong.
    """
    target = torch.from_numpy(task.encode(cells))
    metrics = task.metrics()
    task.update(metrics, values, target)
    scores = {name: float(value) for name, value in task.scores(metrics).items()}
    defined = {name: value for name, value in scores.items() if value == value}
    return {"samples": len(cells), **defined, task.baseline: task.bound([None] * len(cells), cells)}


def scores_by_group(
    task: Task, values: Tensor, cells: Sequence[str | None], groups: Sequence[str] | None = None
) -> dict[str, dict[str, float]]:
    """The scores of all samples under "all", then of each group by name; a group named "all" is "all (a group)".

    >>> from fusion.tasks import Classification
    >>> task = Classification()
    >>> task.set_learnt({"names": ["no", "yes"]})
    >>> values = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.7, 0.3]])
    >>> scores = scores_by_group(task, values, ["yes", "no", "yes"], ["a", "a", "b"])
    >>> [(name, round(found["accuracy"], 2)) for name, found in scores.items()]
    [('all', 0.67), ('a', 1.0), ('b', 0.0)]
    """
    scores = {"all": score(task, values, cells)}
    for group in sorted(set(groups or ())):
        members = [i for i, g in enumerate(groups or ()) if g == group]
        scores[group if group != "all" else "all (a group)"] = score(task, values[members], [cells[i] for i in members])
    return scores
