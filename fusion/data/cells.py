"""What a manifest's file holds, before it means anything."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Cells:
    """A file's columns before they mean anything. Rows that have no cells to speak of are in `malformed` (row, reason) and nowhere else;
    those whose cells can't be trusted are in the columns too, with the reason under their position in `flawed`. opaque: columns that
    can't be text, and what they hold. notes: sentences about cells that were read, but perhaps not as they were meant."""

    columns: dict[str, list[Any]] = field(default_factory=dict)
    rows: list[int] = field(default_factory=list)
    malformed: list[tuple[int, str]] = field(default_factory=list)
    flawed: dict[int, str] = field(default_factory=dict)
    opaque: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
