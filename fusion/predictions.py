"""Predictions for raw samples: paths, images, arrays and texts in, answers out, by a model of any runtime."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
from PIL import Image

from fusion.errors import UserError

Picture: TypeAlias = str | Path | bytes | Image.Image | np.ndarray
Output: TypeAlias = tuple[np.ndarray, dict[str, np.ndarray]]  # values (B, K), and presence (B,) by modality


@dataclass(frozen=True)
class Predictions:
    """Predictions of a model for N samples.

    answers: for each sample the most likely class, the list of its labels, or the number. values (N, K) float32: the probabilities of the
    K classes or labels, or the numbers. names: of the K. present: modality -> (N,) bool, whether the sample has it.

    labels, probabilities and classes are aliases of answers, values and names, for classification.
    """

    answers: list[Any]
    values: np.ndarray
    names: list[str]
    present: dict[str, np.ndarray]

    @property
    def labels(self) -> list[Any]:
        return self.answers

    @property
    def probabilities(self) -> np.ndarray:
        return self.values

    @property
    def classes(self) -> list[str]:
        return self.names


class Reader(Protocol):
    """Reads one input: raw values to cells, and cells to a batch, which has `present` (B,) bool."""

    def raw(self, values: Any, name: str) -> list[Any]: ...

    def batch(self, cells: Sequence[Any], unreadable: dict[int, UserError]) -> Any: ...


class Answers(Protocol):
    """Converts values (n, K) to answers and to the target's own units. names: of the K."""

    names: list[str]

    def answers(self, values: np.ndarray) -> list[Any]: ...

    def in_units(self, values: np.ndarray) -> np.ndarray: ...


class RawPredictor(ABC):
    """A model that answers raw samples: what `Predictor` (PyTorch) and `Package` (exported) have in common."""

    @property
    @abstractmethod
    def preprocessors(self) -> Mapping[str, Reader]:
        """The reader of each input, by name, in the model's order."""

    @property
    @abstractmethod
    def answering(self) -> Answers:
        """Makes answers of values."""

    @abstractmethod
    def run(self, inputs: Mapping[str, Any]) -> Output:
        """Returns the values (B, K) that the task scores and presence by modality, for a batch of each reader."""

    @property
    @abstractmethod
    def width(self) -> int:
        """K, the number of values."""

    @property
    def modalities(self) -> list[str]:
        return list(self.preprocessors)

    def predict(
        self,
        images: Iterable[Picture | None] | None = None,
        texts: Iterable[Any] | None = None,
        *,
        batch_size: int = 64,
        **inputs: Any,
    ) -> Predictions:
        """Predicts samples; None, NaN, pandas' NA or a blank text if a sample has no such input.

        images: paths, bytes of files, PIL images, or arrays (H, W, 3) uint8, lists of these if a sample has several. texts: also
        numbers, booleans and times, which are converted as in a manifest. Both are lists, iterators, NumPy arrays or columns of a data
        frame, in order, regardless of their index. Other inputs are passed by name: title=[...], facts=FRAME (with the table's columns).

        Raises UserError for a sample without any input, lists of different lengths, and images that can't be read.
        """
        return self.gather(self.outputs(images, texts, batch_size=batch_size, **inputs))

    def outputs(
        self, images: Iterable[Picture | None] | None = None, texts: Iterable[Any] | None = None, *, batch_size: int = 64, **inputs: Any
    ) -> list[Output]:
        """Returns for each batch of samples, given as for `predict`, the values (B, K) that the task scores, and presence by modality."""
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}; expected at least 1")
        columns = self.cells(images, texts, **inputs)
        outputs = []
        for start in range(0, len(next(iter(columns.values()))), batch_size):
            unreadable: dict[int, tuple[str, UserError]] = {}
            outputs.append(self.predict_batch({name: column[start : start + batch_size] for name, column in columns.items()}, unreadable))
            for index, (name, error) in unreadable.items():
                cell = columns[name][start + index]
                path = f" ({cell})" if isinstance(cell, Path) else ""
                raise type(error)(f"sample {start + index}: its {name} can't be read: {error}{path}")
        return outputs

    def cells(
        self, images: Iterable[Picture | None] | None = None, texts: Iterable[Any] | None = None, **inputs: Any
    ) -> dict[str, list[Any]]:
        """The cells of samples given as for `predict`, by input. Raises UserError for unknown inputs, different lengths, and a sample
        without any input."""
        usual = {"image": "images", "text": "texts"}
        pair = {"image": images, "text": texts}
        # An input may be called "images" itself.
        named = {usual[name] if usual[name] in self.modalities else name: values for name, values in pair.items()} | inputs
        given = {name: values for name, values in named.items() if values is not None}
        unknown = [name for name in given if name not in self.modalities]
        if unknown:
            raise UserError(f"this model reads {' and '.join(self.modalities)}, not {unknown[0]}")
        cells = {name: self.preprocessors[name].raw(values, usual.get(name, name)) for name, values in given.items()}
        lengths = {name: len(column) for name, column in cells.items()}
        if len(set(lengths.values())) != 1:
            expected = " and ".join(usual.get(name, name) for name in self.modalities)
            raise UserError(f"expected {expected} of equal length, None for a missing input; got {lengths or 'nothing'}")
        count = next(iter(lengths.values()))
        columns = {name: cells.get(name) or [None] * count for name in self.modalities}
        for i in range(count):
            if all(column[i] is None for column in columns.values()):
                raise UserError(f"sample {i} has none of {', '.join(self.modalities)}; at least one is needed")
        return columns

    def predict_batch(self, columns: Mapping[str, Sequence[Any]], unreadable: dict[int, tuple[str, UserError]] | None = None) -> Output:
        """Returns the values (B, K) that the task scores (probabilities, standardised numbers) and presence, for a batch of cells by input.

        Raises the error of an input that can't be read; or, if `unreadable` is given, stores it there with the input's name, by its index
        in the batch, whose row is then meaningless.
        """
        inputs = {}
        for name, reader in self.preprocessors.items():
            failed: dict[int, UserError] = {}
            inputs[name] = reader.batch(columns[name], failed)
            for index, error in failed.items():
                if unreadable is None:
                    raise error
                unreadable.setdefault(index, (name, error))
        return self.run(inputs)

    def gather(self, outputs: Iterable[Output]) -> Predictions:
        """Combines the outputs of several batches."""
        batches, answering = list(outputs), self.answering
        values = np.concatenate([values for values, _ in batches]) if batches else np.zeros((0, self.width), np.float32)
        present = {name: np.concatenate([np.zeros(0, bool), *(mask[name] for _, mask in batches)]) for name in self.modalities}
        return Predictions(answering.answers(values), answering.in_units(values), list(answering.names), present)
