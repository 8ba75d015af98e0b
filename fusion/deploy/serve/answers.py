"""Answers as JSON, from a model's predictions."""

import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fusion.predictions import Predictions

TOLERANCE = 0.05  # relative difference from which on two numbers count as different answers


class Answer(NamedTuple):
    """One sample's answer.

    answer: a class, a list of labels, a number, or a dict of these by task. confidence: its probability, None for numbers. missing:
    the inputs that the sample doesn't have. json: the response's fields without the request's id, from the first key on, closed by }.
    """

    answer: Any
    confidence: float | None
    missing: list[str]
    json: bytes


def answers_of(predictions: Predictions, confidence: np.ndarray | None, version: str) -> list[Answer | None]:
    """The answer of each sample; None where a value is not finite, which JSON can't express. confidence: (n,) their probabilities."""
    finite = np.isfinite(predictions.values).all(axis=1)
    present = {name: mask.tolist() for name, mask in predictions.present.items()}
    confidences = [None] * len(finite) if confidence is None else confidence.tolist()
    found: list[Answer | None] = []
    for i, (answer, row) in enumerate(zip(predictions.answers, predictions.values.tolist(), strict=True)):
        if not finite[i]:
            found.append(None)
            continue
        named = dict(zip(predictions.names, row, strict=True)) if len(predictions.names) == len(row) else row
        own = {name: mask[i] for name, mask in present.items()}
        fields = {"answer": answer, "probabilities" if has_classes(answer) else "values": named, "present": own, "version": version}
        missing = [name for name, is_present in own.items() if not is_present]
        found.append(Answer(answer, confidences[i], missing, json.dumps(fields)[1:].encode()))
    return found


def has_classes(answer: Any) -> bool:
    """Whether an answer is a class or a list of labels, so that its values are their probabilities.

    >>> has_classes("yes"), has_classes([]), has_classes(["red", "blue"]), has_classes(3.5), has_classes([3.5, 1.0])
    (True, True, True, False, False)
    """
    return isinstance(answer, str) or (isinstance(answer, list) and all(isinstance(one, str) for one in answer))


def labels_of(answer: Any) -> Sequence[str]:
    """The classes and labels in an answer; none of a number."""
    return [answer] if isinstance(answer, str) else answer if has_classes(answer) else []


def agree(one: Any, other: Any) -> bool:
    """Whether two answers are the same: equal classes and sets of labels, numbers that differ by at most 5 %.

    >>> agree("yes", "yes"), agree(["a", "b"], ["b", "a"]), agree(100.0, 104.0), agree(100.0, 110.0), agree({"x": "a"}, {"x": "b"})
    (True, True, True, False, False)
    """
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(agree(one[name], other[name]) for name in one)
    if isinstance(one, list) and isinstance(other, list):
        if has_classes(one) and has_classes(other):
            return set(one) == set(other)
        return len(one) == len(other) and all(map(agree, one, other))
    if isinstance(one, int | float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=TOLERANCE, abs_tol=1e-9)
    return bool(one == other)
