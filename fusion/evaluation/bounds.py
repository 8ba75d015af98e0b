"""What could be scored without looking at both: exact upper bounds over the samples at hand."""

from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence


def ceilings(images: Sequence[Hashable], texts: Sequence[Hashable], labels: Sequence[str]) -> dict[str, float]:
    """Accuracies on exactly these samples that cannot be exceeded by: one answer for all ("majority"), any function of the image alone
    ("image"), any function of the text alone ("text").

    A function of one input answers alike wherever that input is alike, so at best it gives the commonest answer there: the bound is
    the sum of those counts. (Where most texts are unique, the bound is near 1 and says little: see `repeated`.)

    >>> ceilings(["a", "a", "b", "b"], ["red?", "blue?", "red?", "blue?"], ["yes", "no", "no", "yes"])
    {'majority': 0.5, 'image': 0.5, 'text': 0.5}
    """
    blind: dict[str, Sequence[Hashable]] = {"majority": [None] * len(labels), "image": images, "text": texts}
    return {name: sum(commonest(seen, labels)) / len(labels) for name, seen in blind.items()}


def repeated(inputs: Sequence[Hashable]) -> float:
    """The share of samples whose input another sample has too. Only there is a bound from that input alone below 1.

    >>> repeated(["a", "a", "b", "c"])
    0.5
    """
    counts = Counter(inputs)
    return sum(counts[one] > 1 for one in inputs) / len(inputs)


def commonest(seen: Sequence[Hashable], labels: Sequence[str]) -> list[int]:
    answers: dict[Hashable, Counter[str]] = defaultdict(Counter)
    for what, label in zip(seen, labels, strict=True):
        answers[what][label] += 1
    return [max(counts.values()) for counts in answers.values()]
