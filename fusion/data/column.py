"""Columns of a table stored in Arrow: a fraction of the memory of lists of Python strings, and of the time to scan them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, TypeAlias, TypeVar, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

BLOCK = 2**16  # cells converted to Python at a time while iterating over a column
TEXT = pa.large_string()
# For `touches`: texts that are empty or begin (PADDED: or end) with what may be whitespace. (RE2 knows only ASCII whitespace.)
BLANK = r"^$|^[^\x21-\x7e]"
PADDED = rf"{BLANK}|[^\x21-\x7e]$"

T = TypeVar("T")
Positions: TypeAlias = Sequence[int] | np.ndarray


class SequenceOfCells(Sequence[T]):
    """Equal to any sequence of the same cells, such as a list."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(one == another for one, another in zip(self, other, strict=True))


class Column(SequenceOfCells[T], Generic[T]):
    """One column's cells, None for missing ones.

    >>> column = Column.of(["3.0", "red", None])
    >>> column.map(str.upper, touches="^[a-z]") == ["3.0", "RED", None], column[1], column.take([2, 0])
    (True, 'red', Column([None, '3.0']))
    """

    def __init__(self, array: pa.Array) -> None:
        self.array = array

    @staticmethod
    def of(texts: Iterable[str | None]) -> "Column[str | None]":
        """A column of Python strings; lone surrogates, which stand for undecodable bytes, are escaped."""
        if isinstance(texts, Column):
            return texts
        texts = texts if isinstance(texts, list) else list(texts)
        try:
            return Column(pa.array(texts, TEXT))
        except UnicodeEncodeError:
            return Column(pa.array([text and text.encode(errors="backslashreplace").decode() for text in texts], TEXT))

    @staticmethod
    def numbers(numbers: Iterable[int]) -> "Column[int]":
        """A column of integers."""
        return Column(pa.array(numbers, pa.int64()))

    @staticmethod
    def repeat(text: str, count: int) -> "Column[str]":
        """A column of `count` times the same text, stored once."""
        return Column(pa.DictionaryArray.from_arrays(np.zeros(count, dtype=np.int32), pa.array([text], TEXT)))

    def __len__(self) -> int:
        return len(self.array)

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> "Column[T]": ...

    def __getitem__(self, index: Any) -> Any:
        return Column(self.array[index]) if isinstance(index, slice) else self.array[int(index)].as_py()

    def __iter__(self) -> Iterator[T]:
        for start in range(0, len(self), BLOCK):
            yield from self.array.slice(start, BLOCK).to_pylist()

    def __repr__(self) -> str:
        return f"Column({list(self)})"

    def __arrow_array__(self, type: pa.DataType | None = None) -> pa.Array:
        return self.array if type in (None, self.array.type) else self.array.cast(type)

    def take(self, indices: Positions) -> "Column[T]":
        """The cells at these positions, in this order."""
        return Column(self.array.take(pa.array(indices, pa.int64())))

    def missing(self) -> np.ndarray:
        """(n,) bool: where the cell is missing."""
        return self.array.is_null().to_numpy(zero_copy_only=False)

    def coded(self) -> tuple[list[T], np.ndarray]:
        """The distinct cells, in order of first appearance, and the index (n,) of each cell among them, -1 for missing ones."""
        coded = self.array.dictionary_encode()
        return coded.dictionary.to_pylist(), coded.indices.fill_null(-1).to_numpy(zero_copy_only=False)

    def map(self, function: Callable[[Any], str | None], touches: str | np.ndarray = "") -> "Column[str | None]":
        """`function` of every text, called once for each distinct one.

        touches: a regular expression (RE2) that matches every text that `function` changes, or (n,) bool that marks them; other texts are
        not converted to Python.
        """
        if isinstance(touches, str) and not touches:
            distinct, codes = self.coded()
            return Column(pa.array([*map(function, distinct), None], TEXT).take(pa.array(codes % (len(distinct) + 1))))
        touched = self.touched(touches) if isinstance(touches, str) else touches
        if not touched.any():
            return Column(self.array)
        texts = self.array.filter(pa.array(touched)).to_pylist()
        made = {text: function(text) for text in set(texts)}
        return Column(pc.replace_with_mask(self.array, pa.array(touched), pa.array([made[text] for text in texts], TEXT)))

    def touched(self, pattern: str) -> np.ndarray:
        """(n,) bool: the texts in which a regular expression (RE2) has a match."""
        return pc.match_substring_regex(self.array, pattern).fill_null(False).to_numpy(zero_copy_only=False)

    def prefixed(self, prefix: str, where: np.ndarray) -> "Column[str | None]":
        """With a prefix before the texts that are marked in `where` (n,)."""
        prefixed = pc.binary_join_element_wise(pa.scalar(prefix, TEXT), self.array, pa.scalar("", TEXT))
        return Column(pc.if_else(pa.array(where), prefixed, self.array))

    def filled(self, by: "str | Column[int]") -> "Column[str]":
        """With missing texts replaced by a text, or by the numbers at the same positions."""
        return Column(self.array.fill_null(by) if isinstance(by, str) else pc.coalesce(self.array, by.array.cast(TEXT)))


class Rows(SequenceOfCells[tuple[str | None, ...] | None]):
    """Several columns of texts side by side: a cell is the tuple of their cells, None where all of them are missing.

    >>> rows = Rows([Column.of(["1", None]), Column.of([None, None])])
    >>> list(rows), rows[0], rows[-1]
    ([('1', None), None], ('1', None), None)
    """

    def __init__(self, columns: Sequence[Column[str | None]]) -> None:
        self.columns = list(columns)

    @classmethod
    def of(cls, cells: Sequence[tuple[str | None, ...] | None], width: int) -> "Rows":
        """From Python tuples, each of `width` texts."""
        if isinstance(cells, Rows):
            return cells
        return cls([Column.of(None if row is None else row[place] for row in cells) for place in range(width)])

    def __len__(self) -> int:
        return len(self.columns[0])

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Rows([column[index] for column in self.columns])
        return row_of(column[index] for column in self.columns)

    def __iter__(self) -> Iterator[tuple[str | None, ...] | None]:
        return map(row_of, zip(*self.columns, strict=True))

    def take(self, indices: Positions) -> "Rows":
        return Rows([column.take(indices) for column in self.columns])

    def missing(self) -> np.ndarray:
        """(n,) bool: where the cells of all columns are missing."""
        return np.logical_and.reduce([column.missing() for column in self.columns])


def row_of(cells: Iterable[str | None]) -> tuple[str | None, ...] | None:
    row = tuple(cells)
    return row if any(cell is not None for cell in row) else None


# Columns that may also be lists: images, tuples of images


def take(cells: Sequence[T], indices: Positions) -> Sequence[T]:
    """The cells at these positions, in this order."""
    return cells.take(indices) if isinstance(cells, Column | Rows) else [cells[i] for i in indices]


def absent(cells: Sequence[Any]) -> np.ndarray:
    """(n,) bool: where the cell is missing."""
    return cells.missing() if isinstance(cells, Column | Rows) else np.array([cell is None for cell in cells], dtype=bool)


def concat(parts: Sequence[Sequence[Any]]) -> Sequence[Any]:
    """The cells of all parts, concatenated."""
    if len(parts) == 1:
        return parts[0]
    columns = [part for part in parts if isinstance(part, Column)]
    if len(columns) == len(parts) and len({column.array.type for column in columns}) == 1:
        return Column(pa.concat_arrays([column.array for column in columns]))
    tuples = [part for part in parts if isinstance(part, Rows)]
    if len(tuples) == len(parts):
        return Rows([concat(columns) for columns in zip(*(one.columns for one in tuples), strict=True)])  # type: ignore[misc]
    return [cell for part in parts for cell in part]
