"""CSV and TSV: cells between separators, enclosed in quotes or not."""

import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.csv

from fusion.data.cells import Cells
from fusion.data.column import TEXT, Column
from fusion.data.format import Format
from fusion.data.text_file import BYTE_ORDER_MARK, Lines, open_text, undecodable
from fusion.errors import UserError

SEPARATORS = {",": "','", ";": "';'", "\t": "tabs", "|": "'|'"}
ENCLOSED = re.compile(r'"(?:[^"]|"")*"')
LINE_BREAK = re.compile(r"\r\n|\r|\n")
QUOTED = "--data.format.quotes=true"
MOST_ROWS = 5
MOST_REPEATED = 1000  # by RE2
MOST_AT_ONCE = 2**29  # bytes


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
    lines = Lines(path, format)
    start, names = header(path, lines, dialect, format)
    # Arrow splits the lines that are a row each; Python's reader, slower but exact about what is wrong, takes all others.
    whole = lines.decodable & whole_rows(lines, dialect, len(names))
    whole[:start] = False
    others: list[list[str]] = [[] for _ in names]
    rows_of_others: list[int] = []
    batch: list[list[str]] = []
    swallowed: list[int] = []
    flaws: dict[int, str] = {}
    end = start
    for i in (np.flatnonzero(~whole[start:]) + start).tolist():
        if i < end:
            continue
        row, taken = record(lines, i, dialect)
        end = i + taken
        whole[i:end] = False  # a line within an enclosed cell may look like a row
        if isinstance(row, str):
            cells.malformed.append((i + 1, row))
        elif len(row) == len(names):
            if not lines.decodable[i:end].all() and (flaw := undecodable(zip(names, row, strict=True), format)):
                flaws[i + 1] = flaw
            if taken > 1 and any(holds_rows(cell, place, len(names), dialect.separator) for place, cell in enumerate(row)):
                swallowed.append(i + 1)
            rows_of_others.append(i + 1)
            batch.append(row)
            # Rows that live long are what the garbage collector walks over again and again: 64 at a time doubles the speed.
            if len(batch) == 64:
                extend(others, batch)
        elif any(cell.strip() for cell in row) or len(row) > 1:
            hint = f"; quotes seem to enclose cells: {QUOTED}" if not dialect.quotes and any(map(seems_enclosed, row)) else ""
            cells.malformed.append((i + 1, f"wrong number of cells ({len(row)} cells, expected {len(names)}{hint})"))
    extend(others, batch)
    regular = lines.array[start:] if whole[start:].all() else lines.array.filter(pa.array(whole))
    del lines  # as large as the columns that are made of it
    columns = split_rows(regular, dialect, len(names))
    rows = np.concatenate([np.flatnonzero(whole) + 1, np.array(rows_of_others, dtype=np.int64)])
    if rows_of_others:
        order = np.argsort(rows)
        rows = rows[order]
        columns = [
            Column(pa.concat_arrays([column.array, Column.of(cells).array])).take(order)
            for column, cells in zip(columns, others, strict=True)
        ]
    cells.rows = Column.numbers(rows)
    cells.flawed = {int(np.searchsorted(rows, line)): flaw for line, flaw in flaws.items()}
    cells.columns = {name: column for name, column in zip(names, columns, strict=True) if name}
    if swallowed:
        cells.notes.append(
            f"{path}: {rows_named(swallowed)} a cell that holds a line break and the cells of a whole row, as if two stray quotes had "
            "enclosed it. If quotes don't enclose cells there: --data.format.quotes=false"
        )
    if not dialect.quotes:
        cells.notes += note_of_quotes(path, columns, rows)
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


def whole_rows(lines: Lines, dialect: Dialect, count: int) -> np.ndarray:
    """(n,) bool: whether the row that begins with a line also ends there, and has so many cells."""
    if count > MOST_REPEATED or not dialect.separator.isascii():
        return np.zeros(len(lines), dtype=bool)
    mark = re.escape(dialect.separator)
    cell = rf"[^{mark}\r\n]*"
    if dialect.quotes:
        cell = rf'(?:"(?:[^"]|"")*"|[^"{mark}\r\n]{cell}|)'
    # A blank line is no row, though it looks like one of one cell.
    found = lines.matching(rf"^{cell}(?:{mark}{cell}){{{count - 1}}}(?:\r\n|\r|\n)?$")
    return found & ~lines.matching(r"^[\r\n]*$") if count == 1 else found


def split_rows(lines: pa.Array, dialect: Dialect, count: int) -> list[Column[str | None]]:
    """The cells of lines that are a row of so many each, by column."""
    if not len(lines):
        return [Column.of([]) for _ in range(count)]
    offsets = np.frombuffer(lines.buffers()[1], dtype=np.int64)[lines.offset : lines.offset + len(lines) + 1]
    text = lines.buffers()[2].slice(offsets[0], offsets[-1] - offsets[0])
    names = [str(place) for place in range(count)]
    # Arrow reads by blocks, in which a row must have room; of one block it need not put the columns together.
    block = max(min(len(text), MOST_AT_ONCE), 2 * int(np.diff(offsets).max()))
    del lines, offsets
    table = pa.csv.read_csv(
        pa.BufferReader(text),
        pa.csv.ReadOptions(column_names=names, block_size=block),
        pa.csv.ParseOptions(delimiter=dialect.separator, quote_char='"' if dialect.quotes else False, ignore_empty_lines=False),
        pa.csv.ConvertOptions(column_types=dict.fromkeys(names, TEXT), check_utf8=False, strings_can_be_null=False),
    )
    return [Column(table.column(name).combine_chunks()) for name in names]


def record(lines: Lines, start: int, dialect: Dialect) -> tuple[list[str] | str, int]:
    """The cells of the row that begins with this line, or the reason why it has none, and its number of lines.

    A quote that is never closed would swallow all that follows; only the line where it stands is given up.
    """
    taken = 0

    def following() -> Iterator[str]:
        nonlocal taken
        for line in lines.texts(start):
            taken += 1
            yield line

    lines_from = following()
    try:
        if not dialect.quotes:
            return next(csv.reader(lines_from, delimiter=dialect.separator, quoting=csv.QUOTE_NONE)), taken
        return next(csv.reader(lines_from, delimiter=dialect.separator, strict=True)), taken
    except csv.Error as error:
        return f"quotes are not closed or not doubled ({error})", 1


def header(path: str, lines: Lines, dialect: Dialect, format: Format) -> tuple[int, list[str]]:
    """The lines up to the first row, and the names of the columns, from the first line that isn't blank; a nameless column (pandas' index)
    stays nameless."""
    end, cells = 0, list[str]()
    while end < len(lines) and not any(cell.strip() for cell in cells):
        found, taken = record(lines, end, dialect)
        if isinstance(found, str):
            raise UserError(f"{path}: can't read its header: {found}")
        end, cells = end + taken, found
    names = [cell.removeprefix(BYTE_ORDER_MARK).strip() for cell in cells]
    if flaw := undecodable(((name.encode(errors="backslashreplace").decode(), name) for name in names), format):
        raise UserError(f"{path}: its header is {flaw}, or save the file as UTF-8")
    repeated = sorted({name for name in names if name and names.count(name) > 1})
    if repeated:
        raise UserError(f"{path}: its header has more than one column '{repeated[0]}'")
    return end, names


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


def note_of_quotes(path: str, columns: Sequence[Column[str | None]], rows: np.ndarray) -> list[str]:
    found: set[int] = set()
    for column in columns:
        begin = np.flatnonzero(column.touched('^"'))
        found.update(int(rows[i]) for i, cell in zip(begin.tolist(), column.take(begin), strict=True) if seems_enclosed(str(cell)))
    if not found:
        return []
    return [f"{path}: {rows_named(sorted(found))} cells in quotes, which were read as characters. If quotes enclose cells there: {QUOTED}"]


def rows_named(rows: list[int]) -> str:
    """
    >>> rows_named([7]), rows_named([2, 3])
    ('row 7 has', '2 rows (2, 3) have')
    """
    shown = ", ".join(map(str, rows[:MOST_ROWS])) + (", ..." if len(rows) > MOST_ROWS else "")
    return f"row {rows[0]} has" if len(rows) == 1 else f"{len(rows):,} rows ({shown}) have"
