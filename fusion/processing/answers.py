"""Answers from a model's values, without torch; their state is plain data."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np

from fusion.errors import UserError, nearest


class Answering(ABC):
    """How values (n, K) of a model become answers.

    form: its name in the state. names: of the values: classes, labels, targets.
    """

    form: ClassVar[str]
    names: list[str]

    @abstractmethod
    def answers(self, values: np.ndarray) -> list[Any]:
        """Converts values (n, K) to each sample's answer: a class, a list of labels, a number."""

    def in_units(self, values: np.ndarray) -> np.ndarray:
        """Converts values (n, K) to the target's own units."""
        return values

    def confidence(self, values: np.ndarray) -> np.ndarray | None:
        """(n,) the probability of each answer; None where there is none."""
        return None

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Plain data from which `of_state` makes an equal one."""

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> Self:
        return cls(**state)


class Classes(Answering):
    """One of several classes, by their probabilities (n, C): the most likely one."""

    form = "classes"

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)

    def answers(self, values: np.ndarray) -> list[Any]:
        return [self.names[i] for i in values.argmax(axis=1)]

    def confidence(self, values: np.ndarray) -> np.ndarray:
        return values.max(axis=1)

    def state(self) -> dict[str, Any]:
        return {"names": self.names}


class OrderedClasses(Classes):
    """One of several ordered classes, by their probabilities (n, C): the first up to which they add up to at least a half."""

    form = "ordered classes"

    def places(self, values: np.ndarray) -> np.ndarray:
        """
        >>> OrderedClasses(["low", "middle", "high"]).places(np.array([[0.4, 0.3, 0.3], [0.5, 0.0, 0.5]])).tolist()
        [1, 0]
        """
        return (values.cumsum(axis=1) < 0.5 - 1e-6).sum(axis=1).clip(max=values.shape[1] - 1)

    def answers(self, values: np.ndarray) -> list[Any]:
        return [self.names[i] for i in self.places(values)]

    def confidence(self, values: np.ndarray) -> np.ndarray:
        return np.take_along_axis(values, self.places(values)[:, None], axis=1)[:, 0]


class Labels(Answering):
    """Any number of labels, by their probabilities (n, L): those above their thresholds."""

    form = "labels"

    def __init__(self, names: Sequence[str], thresholds: Sequence[float]) -> None:
        self.names, self.thresholds = list(names), list(thresholds)

    def answers(self, values: np.ndarray) -> list[Any]:
        thresholds = np.array(self.thresholds, dtype=values.dtype)
        return [[self.names[i] for i in np.flatnonzero(row > thresholds)] for row in values]

    def confidence(self, values: np.ndarray) -> np.ndarray:
        """Of the label that is the least certain."""
        return np.maximum(values, 1 - values).min(axis=1)

    def state(self) -> dict[str, Any]:
        return {"names": self.names, "thresholds": self.thresholds}


class Numbers(Answering):
    """Numbers, from T standardised targets of `width` values each (n, T * width).

    Args:
        names: of the targets.
        mean: of each target in train.
        deviation: of each target in train.
        width: values of a target: 1, its quantiles, or its mean and deviation.
        answer_place: of the value that is the answer.
        spread_place: of the value that is a deviation, which the mean is not added to; None without one.
    """

    form = "numbers"

    def __init__(
        self,
        names: Sequence[str],
        mean: Sequence[float],
        deviation: Sequence[float],
        width: int = 1,
        answer_place: int = 0,
        spread_place: int | None = None,
    ) -> None:
        self.names, self.mean, self.deviation = list(names), list(mean), list(deviation)
        self.width, self.answer_place, self.spread_place = width, answer_place, spread_place

    def answers(self, values: np.ndarray) -> list[Any]:
        chosen = self.in_units(values).reshape(len(values), len(self.names), self.width)[..., self.answer_place]
        return chosen[:, 0].tolist() if len(self.names) == 1 else chosen.tolist()

    def in_units(self, values: np.ndarray) -> np.ndarray:
        scaled = values.astype(np.float64).reshape(len(values), len(self.names), self.width) * np.array(self.deviation)[:, None]
        offset = np.repeat(np.array(self.mean)[:, None], self.width, axis=1)
        if self.spread_place is not None:
            offset[:, self.spread_place] = 0
        return (scaled + offset).reshape(len(values), len(self.names) * self.width)

    def state(self) -> dict[str, Any]:
        names = ("names", "mean", "deviation", "width", "answer_place", "spread_place")
        return {name: getattr(self, name) for name in names}


class Similarities(Answering):
    """The cosine of a sample's two sides, from their embeddings (n, 2 (dim + 1)), each with a last value that is no part of it."""

    form = "similarities"

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)

    def answers(self, values: np.ndarray) -> list[Any]:
        return self.in_units(values)[:, 0].tolist()

    def in_units(self, values: np.ndarray) -> np.ndarray:
        left, right = embeddings(values)
        return (left * right).sum(axis=1, keepdims=True)

    def state(self) -> dict[str, Any]:
        return {"names": self.names}


class SeveralAnswers(Answering):
    """The answers of several tasks, by name, from their values side by side.

    Args:
        names: of all values.
        parts: the answering of each task, by name, or anything with `answers` and `in_units`.
        widths: number of values of each task.
    """

    form = "several"

    def __init__(self, names: Sequence[str], parts: Mapping[str, Any], widths: Sequence[int]) -> None:
        self.names, self.parts, self.widths = list(names), dict(parts), list(widths)

    def split(self, values: np.ndarray) -> list[np.ndarray]:
        return np.split(values, np.cumsum(self.widths)[:-1], axis=1)

    def answers(self, values: np.ndarray) -> list[Any]:
        """Of each sample the answers by task."""
        each = [part.answers(own) for part, own in zip(self.parts.values(), self.split(values), strict=True)]
        return [dict(zip(self.parts, row, strict=True)) for row in zip(*each, strict=True)]

    def in_units(self, values: np.ndarray) -> np.ndarray:
        return np.concatenate([part.in_units(own) for part, own in zip(self.parts.values(), self.split(values), strict=True)], axis=1)

    def state(self) -> dict[str, Any]:
        parts = {name: state_of(part) for name, part in self.parts.items()}
        return {"names": self.names, "parts": parts, "widths": self.widths}

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> Self:
        return cls(state["names"], {name: answering_of(part) for name, part in state["parts"].items()}, state["widths"])


def embeddings(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Left and right embeddings (n, dim) of unit length, whose inner products are cosines; 0 where the side is absent."""
    sides = [side[:, :-1] for side in np.split(np.asarray(values, dtype=np.float32), 2, axis=1)]
    left, right = (side / np.maximum(np.linalg.norm(side, axis=1, keepdims=True), 1e-12) for side in sides)
    return left, right


FORMS: dict[str, type[Answering]] = {each.form: each for each in (Classes, OrderedClasses, Labels, Numbers, Similarities, SeveralAnswers)}


def state_of(answering: Any) -> dict[str, Any]:
    """Plain data from which `answering_of` makes an equal one. Raises UserError for a class that packages don't know."""
    if FORMS.get(getattr(answering, "form", "")) is not type(answering):
        raise UserError(f"{type(answering).__name__} can't be part of a package, which holds no code; use one of {', '.join(FORMS)}")
    return {"form": answering.form, **answering.state()}


def answering_of(state: Mapping[str, Any]) -> Answering:
    """The answering of a state. Raises UserError for an unknown form."""
    form = str(state.get("form"))
    if form not in FORMS:
        raise UserError(f"unknown answers '{form}'. {nearest(form, FORMS)}")
    return FORMS[form].of_state({key: value for key, value in state.items() if key != "form"})
