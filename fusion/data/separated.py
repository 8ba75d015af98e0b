"""CSV and TSV: cells between separators, enclosed in quotes or not."""

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TextIO

from fusion.data.cells import Cells
from fusion.data.format import Format
from fusion.data.text_file import BYTE_ORDER_MARK, open_text, scan, undecodable
from fusion.errors import UserError

SEPARATORS = {",": "','", ";": "';'", "\t": "tabs", "|": "'|'"}
ENCLOSED = re.compile(r'"(?:[^"]|"")*"')
LINE_BREAK = re.compile(r"\r\n|\r|\n")
QUOTED = "--data.format.quotes=true"
MOST_ROWS = 5


@dataclass(frozen=True)
class Dialect:
    """separator: between cells. quotes: whether double quotes enclose cells, as in RFC 4180: an enclosed cell may hold separators and line
    breaks, and a quote in it is doubled. Otherwise quotes are characters like any other, and a line is a row."""

    separator: str
    quotes: bool


def read_separated(path: str, format: Format, separator: str) -> Cells:
    """The cells of a file whose name stands for this separator. Raises UserError for a header that can't be read."""
    csv.field_size_limit(2**31 - 1)  # a setting of the process; it is not put back, lest another thread's reading stops at the old one
    cells = Cells()
    dialect = choose_dialect(path, format, separator, cells.notes)
    decodes, has_quotes = scan(path, format)
    swallowed: list[int] = []
    with open_text(path, format) as file:
        numbered = records(file, dialect)
        names = header(path, numbered, format)
        columns: list[list[str]] = [[] for _ in names]
        batch: list[list[str]] = []
        for line, row, lines in numbered:
            if isinstance(row, list) and len(row) == len(names):
                if not decodes and (flaw := undecodable(zip(names, row, strict=True), format)):
                    cells.flawed[len(cells.rows)] = flaw
                if lines > 1 and any(holds_rows(cell, i, len(names), dialect.separator) for i, cell in enumerate(row)):
                    swallowed.append(line)
                cells.rows.append(line)
                batch.append(row)
                # Rows that live long are what the garbage collector walks over again and again: 64 at a time doubles the speed.
                if len(batch) == 64:
                    extend(columns, batch)
            elif isinstance(row, str):
                cells.malformed.append((line, row))
            elif any(cell.strip() for cell in row) or len(row) > 1:
                hint = f"; quotes seem to enclose cells: {QUOTED}" if not dialect.quotes and any(map(seems_enclosed, row)) else ""
                cells.malformed.append((line, f"wrong number of cells ({len(row)} cells, expected {len(names)}{hint})"))
    extend(columns, batch)
    cells.columns = {name: column for name, column in zip(names, columns, strict=True) if name}
    if swallowed:
        cells.notes.append(
            f"{path}: {rows_named(swallowed)} a cell that holds a line break and the cells of a whole row, as if two stray quotes had "
            "enclosed it. If quotes don't enclose cells there: --data.format.quotes=false"
        )
    if has_quotes and not dialect.quotes:
        cells.notes += note_of_quotes(path, columns, cells.rows)
    return cells


def extend(columns: list[list[str]], batch: list[list[str]]) -> None:
    for column, cells in zip(columns, zip(*batch, strict=True), strict=False):
        column.extend(cells)
    batch.clear()


# Dialect


def choose_dialect(path: str, format: Format, usual: str, notes: list[str]) -> Dialect:
    """As the format says; else by the header, where it leaves no doubt, which is noted; else as is usual for the file's name."""
    with open_text(path, format) as file:
        line = next((line for line in file if line.strip()), "")
    separator = format.separator or recognised_separator(line, usual)
    if separator != (format.separator or usual):
        notes.append(f"{path}: its cells are separated by {SEPARATORS[separator]}, as its header shows, rather than {SEPARATORS[usual]}")
    if format.quotes is not None:
        return Dialect(separator, format.quotes)
    if separator != "\t":
        return Dialect(separator, True)
    names = [name for name in line.strip().split("\t") if name]
    quotes = bool(names) and all(map(ENCLOSED.fullmatch, names))
    if quotes:
        notes.append(
            f"{path}: quotes enclose the names in its header and are read as enclosing its cells too; if not: --data.format.quotes=false"
        )
    return Dialect(separator, quotes)


def recognised_separator(header: str, usual: str) -> str:
    """The only separator that the header holds outside quotes, if it lacks the usual one.

    >>> [recognised_separator(header, ",") for header in ("image;text", "image,text;label", "a;b|c", '"a;b"', "text")]
    [';', ',', ',', ',', ',']
    """
    bare = ENCLOSED.sub("", header)
    held = [separator for separator in SEPARATORS if separator in bare]
    return held[0] if usual not in held and len(held) == 1 else usual


# Rows


def records(file: TextIO, dialect: Dialect) -> Iterator[tuple[int, list[str] | str, int]]:
    """Each record's first line, its cells or the reason why it has none, and its number of lines."""
    return quoted_records(file, dialect.separator) if dialect.quotes else plain_records(file, dialect.separator)


def plain_records(file: Iterator[str], separator: str) -> Iterator[tuple[int, list[str] | str, int]]:
    for line, cells in enumerate(csv.reader(file, delimiter=separator, quoting=csv.QUOTE_NONE), 1):
        yield line, cells, 1


def quoted_records(file: Iterator[str], separator: str) -> Iterator[tuple[int, list[str] | str, int]]:
    """A quote that is never closed would swallow all that follows; only the line where it stands is given up, and the rest is read anew."""
    taken: list[str] = []
    again: list[str] = []

    def lines() -> Iterator[str]:
        while line := again.pop() if again else next(file, ""):
            taken.append(line)
            yield line

    at = 1
    while True:
        try:
            for cells in csv.reader(lines(), delimiter=separator, strict=True):
                yield at, cells, len(taken)
                at += len(taken)
                taken.clear()
            return
        except csv.Error as error:
            yield at, f"quotes are not closed or not doubled ({error})", 1
            again.extend(reversed(taken[1:]))
            at += 1
            taken.clear()


def header(path: str, numbered: Iterator[tuple[int, list[str] | str, int]], format: Format) -> list[str]:
    """Names of the columns, from the first line that isn't blank; a nameless column (pandas' index) stays nameless."""
    cells = next((cells for _, cells, _ in numbered if isinstance(cells, str) or any(cell.strip() for cell in cells)), [])
    if isinstance(cells, str):
        raise UserError(f"{path}: can't read its header: {cells}")
    names = [cell.removeprefix(BYTE_ORDER_MARK).strip() for cell in cells]
    if flaw := undecodable(((name.encode(errors="backslashreplace").decode(), name) for name in names), format):
        raise UserError(f"{path}: its header is {flaw}, or save the file as UTF-8")
    repeated = sorted({name for name in names if name and names.count(name) > 1})
    if repeated:
        raise UserError(f"{path}: its header has more than one column '{repeated[0]}'")
    return names


# Quotes that may be meant otherwise than they were read


def holds_rows(cell: str, position: int, count: int, separator: str) -> bool:
    """Whether a cell at this position, of so many, holds the end of one row, the beginning of another and whole rows between.

    >>> holds_rows("5 inch,x\\nb.png,pipe", 1, 3, ","), holds_rows("one, two\\nthree", 1, 3, ",")
    (True, False)
    """
    held = [part.count(separator) for part in LINE_BREAK.split(cell)]
    return count > 1 and len(held) > 1 and held == [count - 1 - position, *[count - 1] * (len(held) - 2), position]


def seems_enclosed(cell: str) -> bool:
    """Whether it begins with a quote, and ends with one or lacks its end, all others in it doubled."""
    return cell[:1] == '"' and (ENCLOSED.fullmatch(cell) is not None or cell.count('"') % 2 == 1)


def note_of_quotes(path: str, columns: list[list[str]], rows: list[int]) -> list[str]:
    found = sorted({rows[i] for column in columns for i, cell in enumerate(column) if cell[:1] == '"' and seems_enclosed(cell)})
    if not found:
        return []
    return [f"{path}: {rows_named(found)} cells in quotes, which were read as characters. If quotes enclose cells there: {QUOTED}"]


def rows_named(rows: list[int]) -> str:
    """
    >>> rows_named([7]), rows_named([2, 3])
    ('row 7 has', '2 rows (2, 3) have')
    """
    shown = ", ".join(map(str, rows[:MOST_ROWS])) + (", ..." if len(rows) > MOST_ROWS else "")
    return f"row {rows[0]} has" if len(rows) == 1 else f"{len(rows):,} rows ({shown}) have"
