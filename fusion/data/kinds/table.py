"""Table inputs: columns of numbers, dates and categories."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch

from fusion.data.cells import RawColumn, as_texts
from fusion.data.column import PADDED, Column, Rows
from fusion.data.kinds.base import Checking, Kind, Reading, Store
from fusion.encoders import Columns, Encoder, TableColumns
from fusion.errors import UserError
from fusion.processing.preprocessor import TableArrays
from fusion.processing.table import UNKNOWN, ColumnKind, TablePreprocessor, filled, numbers_of, scale_of

MOSTLY = 0.9  # minimum share of numbers (or dates) in a column of that kind; its other cells are reported as mistakes


class TableInput(Kind):
    """Columns of the manifest, each of which becomes one token: numbers, dates (as numbers) or categories. An empty cell is missing.

    A column is numeric (or of dates, as 2024-01-31 with or without a time) if at least nine in ten of its cells are, and its other cells
    are reported; any other column is categorical. Categories that do not occur in train share one unknown category.

    Args:
        columns: names of the manifest's columns, in the order of their tokens.
        categories: columns to treat as categorical although they hold numbers (a postal code).
        scaling: "quantile" maps train's quantiles to a normal distribution, robust to outliers; "standard" subtracts train's mean and
            divides by its standard deviation.
    """

    noun = "table"
    column_option = "columns"
    takes = Columns

    def __init__(
        self, columns: Sequence[str], categories: Sequence[str] = (), scaling: Literal["quantile", "standard"] = "quantile"
    ) -> None:
        names = [columns] if isinstance(columns, str) else list(columns)
        if not names or len(set(names)) < len(names):
            raise UserError(f"a table's columns are {names}; expected at least one, each once")
        unknown = [name for name in categories if name not in names]
        if unknown:
            raise UserError(f"a table's categories name '{unknown[0]}', which is not among its columns: {', '.join(names)}")
        if scaling not in ("quantile", "standard"):
            raise UserError(f"a table's scaling is '{scaling}'; expected quantile or standard")
        self.names, self.categories, self.scaling = names, list(categories), scaling
        self.kinds: dict[str, ColumnKind] = {}
        self.scales: dict[str, list[float]] = {}  # of numbers: quantiles, or mean and standard deviation
        self.known: dict[str, dict[str, int]] = {}  # of categories: their ids, from 1 on

    @property
    def columns(self) -> list[str]:
        return list(self.names)

    def read(self, columns: Mapping[str, RawColumn], reading: Reading) -> Sequence[Any]:
        texts = [as_texts(name, columns[name], reading.nulls, reading.bad) for name in self.names]
        return Rows([column.map(lambda cell: cell.strip() or None, touches=PADDED) for column in texts])

    def check(self, cells: Sequence[Any], encoder: Encoder, checking: Checking) -> dict[int, str]:
        bad: dict[int, str] = {}
        for name, column in zip(self.names, Rows.of(cells, len(self.names)).columns, strict=True):
            self.kinds[name] = "category" if name in self.categories else kind_of(column)
            if self.kinds[name] != "category":
                numbers = numbers_of(column.coded(), self.kinds[name])
                for i in np.flatnonzero(np.isnan(numbers) & ~column.missing()).tolist():
                    bad.setdefault(i, f"column {name} has {str(column[i])[:40]!r}, expected a {self.kinds[name]}")
        return bad

    def learn(self, cells: Sequence[Any], encoder: Encoder) -> None:
        if not isinstance(encoder, TableColumns):
            raise TypeError(f"expected a TableColumns for the table, got {type(encoder).__name__}")
        for name, column in zip(self.names, Rows.of(cells, len(self.names)).columns, strict=True):
            if self.kinds[name] == "category":
                distinct, _ = column.coded()
                self.known[name] = {category: i for i, category in enumerate(sorted(map(str, distinct)), UNKNOWN + 1)}
            else:
                numbers = numbers_of(column.coded(), self.kinds[name])
                self.scales[name] = scale_of(numbers[~np.isnan(numbers)], self.scaling)
        encoder.fit_columns(len(self.scales), [len(known) + 1 for known in self.known.values()])

    def arrays(self, cells: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
        """Scaled numbers (n, F) float32, NaN for missing ones, and categories (n, G) int64, -1 for missing ones."""
        columns = zip(self.names, Rows.of(cells, len(self.names)).columns, strict=True)
        return self.preprocessor().arrays({name: column.coded() for name, column in columns}, len(cells))

    def store(self, cells: Sequence[Any], *, training: bool) -> Store:
        numbers, categories = self.arrays(cells)
        unknown = (categories == UNKNOWN).any(axis=1).sum()
        return TableStore(numbers, categories, [f"{unknown:,} have a category that does not occur in train"] if unknown else [])

    def local(self, cell: Any, folder: str) -> str | None:
        return None if cell is None else "\x1f".join("" if one is None else one for one in cell)

    def raw(self, values: Any, name: str) -> list[Any]:
        return self.preprocessor().raw(values, name)

    def batch(self, cells: Sequence[Any], unreadable: dict[int, UserError]) -> Columns:
        return columns_of(self.preprocessor().batch(cells, unreadable))

    def preprocessor(self) -> TablePreprocessor:
        known = {name: list(categories) for name, categories in self.known.items()}
        return TablePreprocessor(self.names, self.kinds, self.scaling, self.scales, known)

    def learnt(self) -> dict[str, Any]:
        known = {name: list(categories) for name, categories in self.known.items()}
        return {"kinds": dict(self.kinds), "scales": dict(self.scales), "known": known}

    def set_learnt(self, learnt: dict[str, Any]) -> None:
        self.kinds, self.scales = dict(learnt["kinds"]), dict(learnt["scales"])
        self.known = {name: {one: i for i, one in enumerate(names, UNKNOWN + 1)} for name, names in learnt["known"].items()}

    def differences(self, then: dict[str, Any]) -> Iterator[str]:
        now = self.learnt()
        for name in self.names:
            if any(then[part].get(name) != now[part].get(name) for part in now):
                yield f"column '{name}' has other values in train"


class TableStore:
    """The table inputs of one split: numbers (n, F), NaN for missing ones; categories (n, G), -1 for missing ones."""

    in_memory, random = True, False

    def __init__(self, numbers: np.ndarray, categories: np.ndarray, notes: list[str]) -> None:
        self.numbers, self.categories, self.notes = numbers, categories, notes

    def batch(self, samples: np.ndarray, seed: int) -> Columns:
        return columns_of(filled(self.numbers[samples], self.categories[samples]))

    def unaugmented(self) -> "TableStore":
        return self

    def sizes(self) -> np.ndarray | None:
        return None

    def distinct(self) -> np.ndarray | None:
        return None


def columns_of(arrays: TableArrays) -> Columns:
    """The encoder's input from arrays."""
    numbers, categories, mask = map(torch.from_numpy, arrays)
    return Columns(numbers, categories, mask, bool(arrays.mask.all()))


def kind_of(cells: Sequence[str | None]) -> ColumnKind:
    """The kind of a column, by most of its cells.

    >>> kind_of(["1", "2.5", None, "-3e4"]), kind_of(["2024-01-31", "2024-02-01 10:00:00"]), kind_of(["red", "1"]), kind_of([None])
    ('number', 'date', 'category', 'category')
    """
    column = Column.of(cells)
    present = len(column) - int(column.missing().sum())
    kinds: tuple[ColumnKind, ...] = ("number", "date")
    for kind in kinds:
        if present and np.count_nonzero(~np.isnan(numbers_of(column.coded(), kind))) >= MOSTLY * present:
            return kind
    return "category"
