"""Exact upper bounds on the scores that can be reached from one input alone."""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence

from fusion.tasks import Task


def bounds(task: Task, inputs: Mapping[str, Sequence[Hashable]], cells: Sequence[str | None]) -> dict[str, float]:
    """The best scores (the task's `bounded` one) that can be reached on exactly these samples by a constant answer (under the task's name
    for it, such as "majority"), and by any function of one input alone (under the input's name).

    A function of one input gives the same answer for equal inputs, at best the optimal one for the samples that share it. (If most
    inputs are unique, the bound is near the perfect score and not informative: see `repeated`.)

    >>> from fusion.tasks import Classification
    >>> inputs = {"image": ["a", "a", "b", "b"], "text": ["red?", "blue?", "red?", "blue?"]}
    >>> bounds(Classification(), inputs, ["yes", "no", "no", "yes"])
    {'majority': 0.5, 'image': 0.5, 'text': 0.5}
    """
    return {name: task.bound(seen, cells) for name, seen in {task.baseline: [None] * len(cells), **inputs}.items()}


def repeated(inputs: Sequence[Hashable]) -> float:
    """The share of samples whose input another sample has too. Only these can lower the bound from that input alone.

    >>> repeated(["a", "a", "b", "c"])
    0.5
    """
    counts = Counter(inputs)
    return sum(counts[one] > 1 for one in inputs) / len(inputs)


def bound_title(task: Task, bound: str) -> str:
    """Name of a bound in a table of results."""
    if bound == task.baseline:
        if task.draws_apart:
            return bound
        return "majority class" if task.one_of_classes else f"{bound} for all"
    return f"{'lower' if task.bounded in task.minimised else 'upper'} bound ({bound} only)"
