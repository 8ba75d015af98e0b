"""Table rows of samples as arrays: scaled numbers and dates, numbered categories."""

import math
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from statistics import NormalDist
from typing import Any, Literal, Self, TypeAlias

import numpy as np

from fusion.cell_text import NUMBER
from fusion.errors import UserError
from fusion.processing.preprocessor import Preprocessor, TableArrays
from fusion.processing.raw_columns import text_column

LEVELS = 1000  # maximum number of quantiles
EXTREME = 1e-3  # quantiles are clipped to [1e-3, 1 - 1e-3]: scaled numbers end at about 3.1 standard deviations
DAY_S = 86_400
UNKNOWN = 0  # id of categories that do not occur in train

ColumnKind: TypeAlias = Literal["number", "date", "category"]
Coded: TypeAlias = tuple[Sequence[Any], np.ndarray]  # the distinct cells of a column, and the index (n,) of each cell, -1 if missing


class TablePreprocessor(Preprocessor):
    """Scales numbers and dates by the statistics of train, and numbers categories.

    Args:
        names: of the columns, in order.
        kinds: of each column.
        scaling: "quantile" or "standard".
        scales: the statistics of the numeric columns (see `scale_of`), in the order of their tokens.
        known: the categories of the categorical columns, in the order of their ids from 1 on.
    """

    form = "table"

    def __init__(
        self,
        names: Sequence[str],
        kinds: Mapping[str, ColumnKind],
        scaling: str,
        scales: Mapping[str, Sequence[float]],
        known: Mapping[str, Sequence[str]],
    ) -> None:
        self.names, self.kinds, self.scaling, self.scales = list(names), dict(kinds), scaling, dict(scales)
        self.known = {name: {one: i for i, one in enumerate(categories, UNKNOWN + 1)} for name, categories in known.items()}

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
            if flaw := self.flaw(sample):
                raise UserError(f"sample {i}: {flaw}")
        return [sample if any(cell is not None for cell in sample) else None for sample in samples]

    def flaw(self, sample: Sequence[str | None] | None) -> str | None:
        """Why a row can't be used, None if it can."""
        for column, cell in zip(self.names, sample or (), strict=False):
            if cell is not None and self.kinds[column] != "category" and math.isnan(number_of(cell, self.kinds[column])):
                return f"column {column} has {cell[:40]!r}, expected a {self.kinds[column]}"
        return None

    def batch(self, cells: Sequence[Any], unreadable: dict[int, UserError]) -> TableArrays:
        readable: list[Any] = list(cells)
        for i, sample in enumerate(cells):
            if flaw := self.flaw(sample):
                unreadable.setdefault(i, UserError(flaw))
                readable[i] = None
        columns = {name: coded([None if row is None else row[place] for row in readable]) for place, name in enumerate(self.names)}
        return filled(*self.arrays(columns, len(cells)))

    def arrays(self, columns: Mapping[str, Coded], count: int) -> tuple[np.ndarray, np.ndarray]:
        """Scaled numbers (n, F) float32, NaN for missing ones, and categories (n, G) int64, -1 for missing ones."""
        numbers = np.full((count, len(self.scales)), np.nan, dtype=np.float64)
        categories = np.full((count, len(self.known)), -1, dtype=np.int64)
        for f, (name, scale) in enumerate(self.scales.items()):
            unscaled = numbers_of(columns[name], self.kinds[name])
            present = ~np.isnan(unscaled)
            numbers[present, f] = scaled(unscaled[present], scale, self.scaling)
        for g, (name, known) in enumerate(self.known.items()):
            distinct, codes = columns[name]
            categories[:, g] = np.array([*(known.get(str(category), UNKNOWN) for category in distinct), -1])[codes]
        return numbers.astype(np.float32), categories

    def concat(self, parts: Sequence[TableArrays]) -> TableArrays:
        return TableArrays(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))

    def state(self) -> dict[str, Any]:
        return {
            "names": self.names,
            "kinds": self.kinds,
            "scaling": self.scaling,
            "scales": {name: list(scale) for name, scale in self.scales.items()},
            "known": {name: list(categories) for name, categories in self.known.items()},
        }

    @classmethod
    def of_state(cls, state: dict[str, Any]) -> Self:
        return cls(**state)


def filled(numbers: np.ndarray, categories: np.ndarray) -> TableArrays:
    """A batch from scaled numbers, NaN for missing ones, and categories, -1 for missing ones."""
    mask = np.concatenate([~np.isnan(numbers), categories >= 0], axis=1)
    return TableArrays(np.nan_to_num(numbers), categories.clip(min=UNKNOWN), mask)


def coded(cells: Sequence[str | None]) -> Coded:
    """
    >>> distinct, codes = coded(["red", None, "blue", "red"])
    >>> distinct, codes.tolist()
    (['red', 'blue'], [0, -1, 1, 0])
    """
    numbers: dict[str, int] = {}
    codes = [-1 if cell is None else numbers.setdefault(cell, len(numbers)) for cell in cells]
    return list(numbers), np.array(codes, dtype=np.int64)


def numbers_of(column: Coded, kind: ColumnKind) -> np.ndarray:
    """(n,) float64: the numbers (or dates in days) of a column, NaN where there is none."""
    distinct, codes = column
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
    return np.fromiter(map(NormalDist().inv_cdf, share.clip(EXTREME, 1 - EXTREME).tolist()), np.float64, len(share))
