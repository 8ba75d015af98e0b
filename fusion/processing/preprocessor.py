"""The interface of preprocessors: one input's raw values to arrays."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, Self, TypeAlias

import numpy as np

from fusion.errors import UserError


class ImageArrays(NamedTuple):
    """A batch of images: pixels (U, C, H, W) uint8; present (B,) bool, False for a sample without image. Without image_index, U is B.

    If samples may have several images, sample b has those at image_index (B, P) int64 where image_mask (B, P) bool is True.
    """

    pixels: np.ndarray
    present: np.ndarray
    image_index: np.ndarray | None = None
    image_mask: np.ndarray | None = None


class TextArrays(NamedTuple):
    """A batch of texts: ids (B, N) int64; mask (B, N) bool, True for real tokens, all False where a sample has no text."""

    ids: np.ndarray
    mask: np.ndarray

    @property
    def present(self) -> np.ndarray:
        """(B,) bool: which samples have a text."""
        return np.any(self.mask, axis=1)


class TableArrays(NamedTuple):
    """A batch of table rows: numbers (B, F) float32, scaled; categories (B, G) int64, 0 for an unknown one; mask (B, F + G) bool, numbers
    first, False where a cell is missing."""

    numbers: np.ndarray
    categories: np.ndarray
    mask: np.ndarray

    @property
    def present(self) -> np.ndarray:
        """(B,) bool: which samples have any cell."""
        return np.any(self.mask, axis=1)


Arrays: TypeAlias = ImageArrays | TextArrays | TableArrays


class Preprocessor(ABC):
    """Converts one input's raw values to arrays exactly as for training, without torch. Its state is plain data.

    form: its name in the state.
    """

    form: ClassVar[str]

    @abstractmethod
    def raw(self, values: Any, name: str) -> list[Any]:
        """Cells from Python values: a list, an array, a column of a data frame. Raises UserError for anything else."""

    @abstractmethod
    def batch(self, cells: Sequence[Any], unreadable: dict[int, UserError]) -> Arrays:
        """The arrays of these cells; errors of unreadable ones go to `unreadable` by position, and their rows of the batch are
        meaningless."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Plain data from which `of_state` makes an equal preprocessor, without its form."""

    @classmethod
    @abstractmethod
    def of_state(cls, state: dict[str, Any]) -> Self:
        """The preprocessor of this state."""

    @abstractmethod
    def concat(self, parts: Sequence[Any]) -> Arrays:
        """One batch of several, in their order."""
