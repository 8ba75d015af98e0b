"""The raw cells of a manifest's file, and their conversion to text."""

import json
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from fusion.cell_text import canonical, cell_text
from fusion.data.column import Column

RawColumn = Column[str | None] | list[Any]  # texts, or values of any type
NUMERIC = "^[-0-9]"  # the beginning of a number or a time


@dataclass
class Cells:
    """A file's raw columns. malformed: (row, reason) of rows that could not be divided into cells; they are not in the columns. flawed:
    reasons, by position, for rows that are in the columns but have invalid text. opaque: columns that can't be converted to text, and
    their types. notes: sentences about cells that may have been read differently from what was meant."""

    columns: dict[str, RawColumn] = field(default_factory=dict)
    rows: Sequence[int] = ()
    malformed: list[tuple[int, str]] = field(default_factory=list)
    flawed: dict[int, str] = field(default_factory=dict)
    opaque: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def as_texts(
    name: str, cells: RawColumn, nulls: Collection[str], bad: dict[int, str], *, is_path: bool = False, lists: bool = False
) -> Column[str | None]:
    """Cells as text, None for a missing one. Positions whose cell is an object, or a list (unless `lists` are expected, which become JSON),
    go to `bad`. The text of a path is unchanged."""
    if isinstance(cells, Column):
        texts = cells if is_path else cells.map(canonical, touches=NUMERIC)
    else:
        texts = Column.of(texts_of_values(name, cells, bad, is_path=is_path, lists=lists))
    if not nulls:
        return texts
    return texts.map(lambda text: None if text.strip() in nulls else text, touches="|".join(map(re.escape, nulls)))


def texts_of_values(name: str, cells: list[Any], bad: dict[int, str], *, is_path: bool, lists: bool) -> list[str | None]:
    """Values of any type as text."""
    if lists:
        cells = [listed_texts(cell) if isinstance(cell, list | tuple) else cell for cell in cells]
    kinds = set(map(type, cells))
    if bytes in kinds:
        for i, cell in enumerate(cells):
            if isinstance(cell, bytes):
                bad.setdefault(i, f"column {name} holds bytes, expected text")
    if kinds & {list, dict}:
        for i, cell in enumerate(cells):
            if isinstance(cell, list | dict):
                bad.setdefault(i, f"column {name} holds {'a list' if isinstance(cell, list) else 'an object'}, expected text")
        cells = [str(cell) if isinstance(cell, list | dict) else cell for cell in cells]
    return cells if is_path and kinds <= {str, type(None)} else cell_texts(cells)


def cell_texts(cells: list[Any]) -> list[str | None]:
    """`cell_text` of each cell, computed once for each distinct value."""
    if set(map(type, cells)) <= {str, int, type(None)}:
        return each(cell_text, cells)
    # 1 == 1.0 == True, but they are different values.
    return each(lambda typed: cell_text(typed[1]), list(zip(map(type, cells), cells, strict=True)))


def listed_texts(cells: Sequence[Any]) -> Any:
    """A list of values as a JSON list of texts; unchanged where a value can't be text."""
    if any(isinstance(cell, list | dict | bytes) for cell in cells):
        return list(cells)
    return json.dumps([text for cell in cells if (text := cell_text(cell)) is not None], ensure_ascii=False)


def each(function: Callable[[Any], str | None], cells: list[Any]) -> list[str | None]:
    """`function` of each cell, called once for each distinct one."""
    known = {cell: function(cell) for cell in set(cells)}
    return [known[cell] for cell in cells]
