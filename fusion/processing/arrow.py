"""Columns of Arrow as lists of Python values."""

import re
from typing import Any

import pyarrow as pa

from fusion.cell_text import duration_text
from fusion.processing.undecodable import flaw_of_text


def column_values(name: str, column: pa.ChunkedArray, flawed: dict[int, str]) -> list[Any]:
    """A column as a list of Python values; positions whose text can't be decoded go to `flawed`."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_temporal(column.type):
        return times(column)
    if column.type in (pa.float16(), pa.float32()):
        return list(column.to_numpy())  # Python floats would show more digits than these have
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        raw = column.cast(pa.large_binary()).to_pylist()
    texts = [cell and cell.decode("utf-8", errors="surrogateescape") for cell in raw]
    for i, cell in enumerate(texts):
        if cell and (flaw := flaw_of_text([(name, cell)])):
            flawed.setdefault(i, flaw)
    return texts


def times(column: pa.ChunkedArray) -> list[str | None]:
    """Times as text, since Python's have no nanoseconds; time zones as +01:00."""
    if pa.types.is_duration(column.type):
        unit = {"s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}[column.type.unit]
        return [None if count is None else duration_text(count * unit) for count in column.cast(pa.int64()).to_pylist()]
    texts = column.cast(pa.string()).to_pylist()
    if pa.types.is_timestamp(column.type) and column.type.tz is not None:
        return [text and re.sub(r"([+-]\d\d)(\d\d)$", r"\1:\2", text.replace("Z", "+00:00")) for text in texts]
    return texts
