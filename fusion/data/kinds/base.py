"""The contract that every kind of input keeps."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from fusion.data.cells import RawColumn
from fusion.encoders import Encoder
from fusion.errors import UserError
from fusion.rebuilding import Rebuildable


@dataclass
class Reading:
    """A manifest that is being read: its file; the row of each sample; spellings of a missing cell. What is found goes into bad (reasons by
    position) and notes (sentences)."""

    path: str
    rows: Sequence[int]
    nulls: Collection[str] = ()
    bad: dict[int, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass
class Checking:
    """How inputs are checked and kept. shared: other processes of this machine do the same. leftovers: files that are to be removed when
    the run ends."""

    memory_gib: float
    cache: Path
    shared: bool = False
    leftovers: list[Path] = field(default_factory=list)


class Defaults(Protocol):
    """Settings of the data that an input may leave to it: see FusionData."""

    resize: Any
    augment: Any
    max_megapixels: float
    max_length: int


class Store(Protocol):
    """The inputs of one split, ready to be made into batches.

    in_memory: whether a batch needs no file. random: whether it depends on the seed. notes: what is special about them, in words.
    """

    in_memory: bool
    random: bool
    notes: list[str]

    def batch(self, samples: np.ndarray, seed: int) -> Any:
        """The encoder's input for these samples."""

    def plain(self) -> "Store":
        """The same without augmentation."""

    def sizes(self) -> np.ndarray | None:
        """(n,) how long each is, for a curriculum by length; None where that has no meaning."""

    def distinct(self) -> np.ndarray | None:
        """(n,) a number for each sample, alike where the input is, -1 where there is none; None where sharing saves nothing."""


class Kind(Rebuildable, ABC):
    """One named input of a sample: which columns of the manifest it is, and how it becomes what an encoder takes.

    A cell is what one sample has, as `read` gives it: hashable, None for none.

    noun: what it is, in messages. column_option: the constructor's argument that names its columns. takes: the input of encoders that it
    makes. option: what sets its columns on the command line.
    """

    noun: ClassVar[str]
    column_option: ClassVar[str] = "column"
    takes: ClassVar[type]
    option: str = ""

    def complete(self, defaults: "Defaults") -> None:
        """Take the settings of the data for those that this input doesn't give."""

    # From the manifest.

    @property
    @abstractmethod
    def columns(self) -> list[str]:
        """The columns that it reads."""

    @property
    def rich_columns(self) -> list[str]:
        """Those of them whose cells may be lists, bytes, or structs of both."""
        return []

    @abstractmethod
    def read(self, columns: Mapping[str, RawColumn], reading: Reading) -> Sequence[Any]:
        """The cells, one a sample, from the columns as the file has them."""

    def check(self, cells: Sequence[Any], encoder: Encoder, checking: Checking) -> dict[int, str]:
        """Look at what the cells name, for an encoder; gives by position why one can't be used."""
        return {}

    @abstractmethod
    def learn(self, cells: Sequence[Any], encoder: Encoder) -> None:
        """Learn from the training split's cells, and tell the encoder what it needs to know. Raises UserError where they don't fit."""

    @abstractmethod
    def store(self, cells: Sequence[Any], *, training: bool) -> Store:
        """The samples of a split; of the training split augmented."""

    # For the run's record and its evidence.

    def local(self, cell: Any, folder: str) -> str | None:
        """A cell as text, which names no place outside the manifest's folder that could be moved with it."""
        return cell

    def digest(self, cell: Any) -> str:
        """Of the files that a cell names, as they were checked; "" where there is none."""
        return ""

    def digests_now(self, cells: Iterable[Any]) -> dict[Any, str]:
        """Of the files that these cells name, as they are now, without those that can't be read."""
        return {}

    def identity(self, cell: Any) -> Hashable:
        """Equal where two samples have the same input."""
        return cell

    # From raw values.

    @abstractmethod
    def raw(self, values: Any, name: str) -> list[Any]:
        """Cells from what a Python program holds: a list, an array, a column. Raises UserError for what is none."""

    @abstractmethod
    def batch(self, cells: Sequence[Any], unreadable: dict[int, UserError]) -> Any:
        """The encoder's input of these cells; those that can't be read go to `unreadable`, and their rows then mean nothing."""

    # State, as plain data.

    @abstractmethod
    def learnt(self) -> dict[str, Any]:
        """What `check` and `learn` settled, as plain data."""

    @abstractmethod
    def set_learnt(self, learnt: dict[str, Any]) -> None:
        """Take what `learnt` gave."""

    def differences(self, then: dict[str, Any]) -> Iterator[str]:
        """What is settled otherwise than in `then`, in words."""
        if then != self.learnt():
            yield f"its {self.noun}s are read otherwise"
