"""Table inputs: columns of numbers, dates and categories."""

import math
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Literal

import numpy as np
import torch

from fusion.cell_text import NUMBER
from fusion.data.cells import RawColumn, as_texts
from fusion.data.column import PADDED, Column, Rows
from fusion.data.kinds.base import Checking, Kind, Reading, Store
from fusion.data.raw_columns import text_column
from fusion.encoders import Columns, Encoder, TableColumns
from fusion.errors import UserError

MOSTLY = 0.9  # minimum share of numbers (or dates) in a column of that kind; its other cells are reported as mistakes
LEVELS = 1000  # maximum number of quantiles
EXTREME = 1e-3  # quantiles are clipped to [1e-3, 1 - 1e-3]: scaled numbers end at about 3.1 standard deviations
DAY_S = 86_400
UNKNOWN = 0  # id of categories that do not occur in train

ColumnKind = Literal["number", "date", "category"]


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
                numbers = numbers_of(column, self.kinds[name])
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
                numbers = numbers_of(column, self.kinds[name])
                self.scales[name] = scale_of(numbers[~np.isnan(numbers)], self.scaling)
        encoder.fit_columns(len(self.scales), [len(known) + 1 for known in self.known.values()])

    def arrays(self, cells: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
        """Scaled numbers (n, F) float32, NaN for missing ones, and categories (n, G) int64, -1 for missing ones."""
        columns = dict(zip(self.names, Rows.of(cells, len(self.names)).columns, strict=True))
        numbers = np.full((len(cells), len(self.scales)), np.nan, dtype=np.float64)
        categories = np.full((len(cells), len(self.known)), -1, dtype=np.int64)
        for f, (name, scale) in enumerate(self.scales.items()):
            unscaled = numbers_of(columns[name], self.kinds[name])
            present = ~np.isnan(unscaled)
            numbers[present, f] = scaled(unscaled[present], scale, self.scaling)
        for g, (name, known) in enumerate(self.known.items()):
            distinct, codes = columns[name].coded()
            categories[:, g] = np.array([*(known.get(str(category), UNKNOWN) for category in distinct), -1])[codes]
        return numbers.astype(np.float32), categories

    def store(self, cells: Sequence[Any], *, training: bool) -> Store:
        numbers, categories = self.arrays(cells)
        unknown = (categories == UNKNOWN).any(axis=1).sum()
        return TableStore(numbers, categories, [f"{unknown:,} have a category that does not occur in train"] if unknown else [])

    def local(self, cell: Any, folder: str) -> str | None:
        return None if cell is None else "\x1f".join("" if one is None else one for one in cell)

    def raw(self, values: Any, name: str) -> list[Any]:
        """From a mapping of columns, a data frame or an Arrow table with this table's columns."""
        available = next((list(getattr(values, by)) for by in ("column_names", "columns") if hasattr(values, by)), None)
        if available is None and not isinstance(values, Mapping):
            raise UserError(f"{name} is a {type(values).__name__}; expected a mapping or a table with columns {', '.join(self.names)}")
        available = list(values) if available is None else available
        missing = [column for column in self.names if column not in available]
        if missing:
            raise UserError(f"{name} has no column '{missing[0]}'; expected a mapping or a table with {', '.join(self.names)}")
        columns = [text_column(values[column], column) for column in self.names]
        if len({len(column) for column in columns}) > 1:
            raise UserError(f"the columns of {name} have different lengths: {', '.join(str(len(column)) for column in columns)}")
        samples = list(zip(*[[cell.strip() or None if cell else None for cell in column] for column in columns], strict=True))
        for i, sample in enumerate(samples):
            for column, cell in zip(self.names, sample, strict=True):
                if cell is not None and self.kinds[column] != "category" and math.isnan(number_of(cell, self.kinds[column])):
                    raise UserError(f"sample {i}: column {column} has {cell[:40]!r}, expected a {self.kinds[column]}")
        return [sample if any(cell is not None for cell in sample) else None for sample in samples]

    def batch(self, cells: Sequence[Any], unreadable: dict[int, UserError]) -> Columns:
        readable: list[Any] = list(cells)
        for i, sample in enumerate(cells):
            for column, cell in zip(self.names, sample or (), strict=False):
                if cell is not None and self.kinds[column] != "category" and math.isnan(number_of(cell, self.kinds[column])):
                    unreadable.setdefault(i, UserError(f"column {column} has {cell[:40]!r}, expected a {self.kinds[column]}"))
                    readable[i] = None
        return TableStore(*self.arrays(readable), []).batch(np.arange(len(cells)), 0)

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
        numbers, categories = self.numbers[samples], self.categories[samples]
        mask = np.concatenate([~np.isnan(numbers), categories >= 0], axis=1)
        return Columns(
            torch.from_numpy(np.nan_to_num(numbers)),
            torch.from_numpy(categories.clip(min=UNKNOWN)),
            torch.from_numpy(mask),
            bool(mask.all()),
        )

    def unaugmented(self) -> "TableStore":
        return self

    def sizes(self) -> np.ndarray | None:
        return None

    def distinct(self) -> np.ndarray | None:
        return None


def kind_of(cells: Sequence[str | None]) -> ColumnKind:
    """The kind of a column, by most of its cells.

    >>> kind_of(["1", "2.5", None, "-3e4"]), kind_of(["2024-01-31", "2024-02-01 10:00:00"]), kind_of(["red", "1"]), kind_of([None])
    ('number', 'date', 'category', 'category')
    """
    column = Column.of(cells)
    present = len(column) - int(column.missing().sum())
    kinds: tuple[ColumnKind, ...] = ("number", "date")
    for kind in kinds:
        if present and np.count_nonzero(~np.isnan(numbers_of(column, kind))) >= MOSTLY * present:
            return kind
    return "category"


def numbers_of(column: Column[str | None], kind: ColumnKind) -> np.ndarray:
    """(n,) float64: the numbers (or dates in days) of a column, NaN where there is none."""
    distinct, codes = column.coded()
    return np.array([*(number_of(str(cell), kind) for cell in distinct), math.nan])[codes]


def number_of(cell: str, kind: ColumnKind) -> float:
    """A number, or a date in days since 1970; NaN for any other text."""
    if kind == "number":
        value = float(cell) if NUMBER.fullmatch(cell) else math.nan
        return value if math.isfinite(value) else math.nan
    try:
        moment = datetime.fromisoformat(cell) if len(cell) >= 8 and cell[:4].isdigit() else None
    except ValueError:
        return math.nan
    if moment is None:
        return math.nan
    try:
        return (moment.replace(tzinfo=None) - (moment.utcoffset() or timedelta(0)) - datetime(1970, 1, 1)).total_seconds() / DAY_S
    except OverflowError:  # before the year 1
        return math.nan


def scale_of(numbers: np.ndarray, scaling: str) -> list[float]:
    """The statistics of the training numbers that `scaled` uses."""
    if not len(numbers):
        return []
    if scaling == "standard":
        return [float(numbers.mean()), float(numbers.std())]
    # Quantiles are numbers that occur: interpolating between two would split ties by rounding.
    return (
        np.sort(numbers).tolist() if len(numbers) <= LEVELS else np.quantile(numbers, np.linspace(0, 1, LEVELS), method="nearest").tolist()
    )


def scaled(numbers: np.ndarray, scale: Sequence[float], scaling: str) -> np.ndarray:
    """Numbers scaled by train's statistics, centred around 0.

    >>> scaled(np.array([1.0, 3.0, 99.0]), scale_of(np.array([1.0, 2.0, 3.0, 4.0, 5.0]), "quantile"), "quantile").round(2).tolist()
    [-3.09, 0.0, 3.09]
    """
    if not scale:
        return np.zeros_like(numbers)
    if scaling == "standard":
        mean, std = scale
        return (numbers - mean) / (std or 1.0)
    quantiles, levels = np.array(scale), np.linspace(0, 1, len(scale))
    if quantiles[0] == quantiles[-1]:
        return np.sign(numbers - quantiles[0])
    # Averaged over both directions, so that a value that spans several levels gets their midpoint.
    share = (np.interp(numbers, quantiles, levels) + 1 - np.interp(-numbers, -quantiles[::-1], levels)) / 2
    return torch.special.ndtri(torch.from_numpy(share.clip(EXTREME, 1 - EXTREME))).numpy()
