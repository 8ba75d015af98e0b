"""What could be scored without looking at both: exact upper bounds over the samples at hand."""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence

from fusion.tasks import Task


def bounds(task: Task, inputs: Mapping[str, Sequence[Hashable]], cells: Sequence[str | None]) -> dict[str, float]:
    """Scores (the task's `bounded` one) on exactly these samples that can't be bettered by one answer for all (by the task's name for it:
    "majority"), nor by any function of one input alone (by the input's name).

    A function of one input answers alike wherever that input is alike, so at best it gives the best answer there. (Where most inputs are
    unique, the bound is near the perfect score and says little: see `repeated`.)

    >>> from fusion.tasks import Classification
    >>> inputs = {"image": ["a", "a", "b", "b"], "text": ["red?", "blue?", "red?", "blue?"]}
    >>> bounds(Classification(), inputs, ["yes", "no", "no", "yes"])
    {'majority': 0.5, 'image': 0.5, 'text': 0.5}
    """
    return {name: task.bound(seen, cells) for name, seen in {task.baseline: [None] * len(cells), **inputs}.items()}


def repeated(inputs: Sequence[Hashable]) -> float:
    """The share of samples whose input another sample has too. Only there is a bound from that input alone below 1.

    >>> repeated(["a", "a", "b", "c"])
    0.5
    """
    counts = Counter(inputs)
    return sum(counts[one] > 1 for one in inputs) / len(inputs)
