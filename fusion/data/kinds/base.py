"""The interface of every kind of input."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from fusion.data.cells import RawColumn
from fusion.encoders import Encoder
from fusion.errors import UserError
from fusion.processing.preprocessor import Preprocessor
from fusion.rebuilding import Rebuildable


@dataclass
class Reading:
    """State of reading one manifest: its file, the row of each sample, spellings of a missing cell. Results: bad (reasons why samples can't
    be used, by position) and notes (sentences)."""

    path: str
    rows: Sequence[int]
    nulls: Collection[str] = ()
    bad: dict[int, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass
class Checking:
    """How inputs are checked and stored. shared: other processes of this machine check the same inputs. leftovers: files to remove when
    the run ends."""

    memory_gib: float
    cache: Path
    shared: bool = False
    leftovers: list[Path] = field(default_factory=list)


class Defaults(Protocol):
    """Settings of FusionData that are used where an input doesn't set its own."""

    resize: Any
    augment: Any
    max_megapixels: float
    max_length: int


class Store(Protocol):
    """The inputs of one split, from which batches are made.

    in_memory: whether a batch is made without reading files. random: whether it depends on the seed. notes: sentences to report about them.
    """

    in_memory: bool
    random: bool
    notes: list[str]

    def batch(self, samples: np.ndarray, seed: int) -> Any:
        """The encoder's input for these samples, given by their numbers in the split."""

    def unaugmented(self) -> "Store":
        """The same without augmentation."""

    def sizes(self) -> np.ndarray | None:
        """(n,) length of each input, for a curriculum by length; None where lengths are not defined."""

    def distinct(self) -> np.ndarray | None:
        """(n,) index of each sample's distinct input, equal for equal inputs, -1 if missing; None where sharing them saves nothing."""


class Kind(Rebuildable, ABC):
    """One named input of a sample: the columns of the manifest that it reads, and how their cells become an encoder's input.

    A cell is one sample's value, as `read` returns it: hashable, None if missing.

    noun: its name in messages. column_option: the constructor's argument that names its columns. takes: the type of encoder input that it
    makes. option: the command-line option that sets its columns.
    """

    noun: ClassVar[str]
    column_option: ClassVar[str] = "column"
    takes: ClassVar[type]
    option: str = ""

    def complete(self, defaults: "Defaults") -> None:
        """Fill in the settings of the data that this input leaves open."""

    # Reading the manifest

    @property
    @abstractmethod
    def columns(self) -> list[str]:
        """The manifest columns that it reads."""

    @property
    def rich_columns(self) -> list[str]:
        """The columns whose cells may be lists, bytes, or structs of both."""
        return []

    @abstractmethod
    def read(self, columns: Mapping[str, RawColumn], reading: Reading) -> Sequence[Any]:
        """The cells, one per sample, from the file's raw columns."""

    def check(self, cells: Sequence[Any], encoder: Encoder, checking: Checking) -> dict[int, str]:
        """Check the files or values that the cells name, for an encoder. Returns by position the reason why a cell can't be used."""
        return {}

    @abstractmethod
    def learn(self, cells: Sequence[Any], encoder: Encoder) -> None:
        """Fit to the training split's cells, and configure the encoder accordingly. Raises UserError where they don't fit together."""

    @abstractmethod
    def store(self, cells: Sequence[Any], *, training: bool) -> Store:
        """The store of a split's cells; augmented if it is for training."""

    # Digests for the run's record

    def local(self, cell: Any, folder: str) -> str | None:
        """A cell as text; paths inside the manifest's folder are relative to it, so that both may be moved."""
        return cell

    def digest(self, cell: Any) -> str:
        """Digest of the files that a cell names, as they were when checked; "" where there is none."""
        return ""

    def digests_now(self, cells: Iterable[Any]) -> dict[Any, str]:
        """Digests of the files that these cells name, as they are now; unreadable ones are left out."""
        return {}

    def identity(self, cell: Any) -> Hashable:
        """A value that is equal for two samples just when their inputs are."""
        return cell

    # Raw values

    @abstractmethod
    def raw(self, values: Any, name: str) -> list[Any]:
        """Cells from Python values: a list, an array, a column of a data frame. Raises UserError for anything else."""

    @abstractmethod
    def batch(self, cells: Sequence[Any], unreadable: dict[int, UserError]) -> Any:
        """The encoder's input for these cells; errors of unreadable ones go to `unreadable` by position, and their rows of the batch are
        meaningless."""

    def preprocessor(self) -> Preprocessor:
        """What makes arrays of raw values without torch, for exported packages. Raises UserError for a kind that has none."""
        raise UserError(f"{type(self).__name__} has no preprocessor(), so that a model that reads it can't be exported")

    # State

    @abstractmethod
    def learnt(self) -> dict[str, Any]:
        """State determined by `check` and `learn`, as plain data."""

    @abstractmethod
    def set_learnt(self, learnt: dict[str, Any]) -> None:
        """Restore the state that `learnt` returned."""

    def differences(self, then: dict[str, Any]) -> Iterator[str]:
        """Sentences about how this state differs from an earlier one, `then`."""
        if then != self.learnt():
            yield f"its {self.noun}s are read differently"
