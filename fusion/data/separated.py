"""Reader of CSV and TSV: cells between separators, enclosed in quotes or not."""

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
from fusion.data.text_file import BYTE_ORDER_MARK, Lines, undecodable
from fusion.errors import UserError

SEPARATORS = {",": "','", ";": "';'", "\t": "tabs", "|": "'|'"}
ENCLOSED = re.compile(r'"(?:[^"]|"")*"')
LINE_BREAK = re.compile(r"\r\n|\r|\n")
QUOTED = "--data.format.quotes=true"
MAX_SHOWN = 5
MAX_REPEATED = 1000  # limit of RE2 on {n}
MAX_BLOCK = 2**29  # bytes


@dataclass(frozen=True)
class Dialect:
    """separator: between cells. quotes: whether double quotes enclose cells, as in RFC 4180: an enclosed cell may hold separators and line
    breaks, and a quote in it is doubled. Otherwise quotes are ordinary characters, and each line is a row."""

    separator: str
    quotes: bool


def read_separated(path: str, format: Format, separator: str) -> Cells:
    """The cells of a file; separator: the usual one for its name. Raises UserError for a header that can't be read."""
    csv.field_size_limit(2**31 - 1)  # global to the process; not restored, since another thread may be reading
    cells = Cells()
    lines = Lines(path, format)
    dialect = choose_dialect(path, lines, format, separator, cells.notes)
    start, names = header(path, lines, dialect, format)
    # Arrow splits lines that are a whole row; all others go to Python's reader, which is slower but reports errors exactly.
    whole = lines.decodable & whole_rows(lines, dialect, len(names))
    whole[:start] = False
    other_columns: list[list[str]] = [[] for _ in names]
    other_rows: list[int] = []
    batch: list[list[str]] = []
    suspicious: list[int] = []  # rows with a cell that seems to contain other rows
    flaws: dict[int, str] = {}
    end = start
    for i in (np.flatnonzero(~whole[start:]) + start).tolist():
        if i < end:
            continue
        row, taken = record(lines, i, dialect)
        end = i + taken
        whole[i:end] = False  # a line within an enclosed cell may look like a whole row
        if isinstance(row, str):
            cells.malformed.append((i + 1, row))
        elif len(row) == len(names):
            if not lines.decodable[i:end].all() and (flaw := undecodable(zip(names, row, strict=True), format)):
                flaws[i + 1] = flaw
            if taken > 1 and any(holds_rows(cell, position, len(names), dialect.separator) for position, cell in enumerate(row)):
                suspicious.append(i + 1)
            other_rows.append(i + 1)
            batch.append(row)
            # The garbage collector traverses long-lived lists repeatedly: transposing 64 rows at a time doubles the speed.
            if len(batch) == 64:
                extend(other_columns, batch)
        elif any(cell.strip() for cell in row) or len(row) > 1:
            hint = f"; quotes seem to enclose cells: {QUOTED}" if not dialect.quotes and any(map(seems_enclosed, row)) else ""
            cells.malformed.append((i + 1, f"wrong number of cells ({len(row)} cells, expected {len(names)}{hint})"))
    extend(other_columns, batch)
    regular = lines.array[start:] if whole[start:].all() else lines.array.filter(pa.array(whole))
    del lines  # as large as the columns made from it
    columns = split_rows(regular, dialect, len(names))
    rows = np.concatenate([np.flatnonzero(whole) + 1, np.array(other_rows, dtype=np.int64)])
    if other_rows:
        order = np.argsort(rows)
        rows = rows[order]
        columns = [
            Column(pa.concat_arrays([column.array, Column.of(cells).array])).take(order)
            for column, cells in zip(columns, other_columns, strict=True)
        ]
    cells.rows = Column.numbers(rows)
    cells.flawed = {int(np.searchsorted(rows, line)): flaw for line, flaw in flaws.items()}
    cells.columns = {name: column for name, column in zip(names, columns, strict=True) if name}
    if suspicious:
        cells.notes.append(
            f"{path}: {rows_named(suspicious)} a cell that contains a line break and the cells of a whole row, as if two stray quotes "
            "enclosed it. If quotes don't enclose cells there: --data.format.quotes=false"
        )
    if not dialect.quotes:
        cells.notes += note_of_quotes(path, columns, rows)
    return cells


def extend(columns: list[list[str]], batch: list[list[str]]) -> None:
    """Append a batch of rows to the columns, and empty it."""
    for column, cells in zip(columns, zip(*batch, strict=True), strict=False):
        column.extend(cells)
    batch.clear()


# Dialect


def choose_dialect(path: str, lines: Lines, format: Format, usual: str, notes: list[str]) -> Dialect:
    """The dialect given by the format; else by the header if it is unambiguous, which is noted; else the usual one for the file's name."""
    line = next((line for line in lines.texts(0) if line.strip()), "")
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
    """The only separator in the header outside quotes, if the usual one is not there.

    >>> [recognised_separator(header, ",") for header in ("image;text", "image,text;label", "a;b|c", '"a;b"', "text")]
    [';', ',', ',', ',', ',']
    """
    bare = ENCLOSED.sub("", header)
    present = [separator for separator in SEPARATORS if separator in bare]
    return present[0] if usual not in present and len(present) == 1 else usual


# Rows


def whole_rows(lines: Lines, dialect: Dialect, count: int) -> np.ndarray:
    """(n,) bool: whether each line is a complete row of `count` cells."""
    if count > MAX_REPEATED or not dialect.separator.isascii():
        return np.zeros(len(lines), dtype=bool)
    mark = re.escape(dialect.separator)
    cell = rf"[^{mark}\r\n]*"
    if dialect.quotes:
        cell = rf'(?:"(?:[^"]|"")*"|[^"{mark}\r\n]{cell}|)'
    # A blank line matches as a row of one cell, but is not a row.
    whole = lines.matching(rf"^{cell}(?:{mark}{cell}){{{count - 1}}}(?:\r\n|\r|\n)?$")
    return whole & ~lines.matching(r"^[\r\n]*$") if count == 1 else whole


def split_rows(lines: pa.Array, dialect: Dialect, count: int) -> list[Column[str | None]]:
    """The columns of lines that are complete rows of `count` cells."""
    if not len(lines):
        return [Column.of([]) for _ in range(count)]
    offsets = np.frombuffer(lines.buffers()[1], dtype=np.int64)[lines.offset : lines.offset + len(lines) + 1]
    text = lines.buffers()[2].slice(offsets[0], offsets[-1] - offsets[0])
    names = [str(position) for position in range(count)]
    # Arrow reads in blocks, into which a row must fit; with a single block it need not concatenate the columns.
    block = max(min(len(text), MAX_BLOCK), 2 * int(np.diff(offsets).max()))
    del lines, offsets
    table = pa.csv.read_csv(
        pa.BufferReader(text),
        pa.csv.ReadOptions(column_names=names, block_size=block),
        pa.csv.ParseOptions(delimiter=dialect.separator, quote_char='"' if dialect.quotes else False, ignore_empty_lines=False),
        pa.csv.ConvertOptions(column_types=dict.fromkeys(names, TEXT), check_utf8=False, strings_can_be_null=False),
    )
    return [Column(table.column(name).combine_chunks()) for name in names]


def record(lines: Lines, start: int, dialect: Dialect) -> tuple[list[str] | str, int]:
    """The cells of the row that begins with this line, or the reason why it can't be split, and its number of lines.

    An unclosed quote would extend to the end of the file; only the line that contains it is rejected.
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
    """The number of lines before the first row, and the names of the columns, from the first line that isn't blank; a column without name
    (pandas' index) has the name ""."""
    end, cells = 0, list[str]()
    while end < len(lines) and not any(cell.strip() for cell in cells):
        row, taken = record(lines, end, dialect)
        if isinstance(row, str):
            raise UserError(f"{path}: can't read its header: {row}")
        end, cells = end + taken, row
    names = [cell.removeprefix(BYTE_ORDER_MARK).strip() for cell in cells]
    if flaw := undecodable(((name.encode(errors="backslashreplace").decode(), name) for name in names), format):
        raise UserError(f"{path}: its header is {flaw}, or save the file as UTF-8")
    repeated = sorted({name for name in names if name and names.count(name) > 1})
    if repeated:
        raise UserError(f"{path}: its header has more than one column '{repeated[0]}'")
    return end, names


# Quotes that may be misread


def holds_rows(cell: str, position: int, count: int, separator: str) -> bool:
    """Whether a cell at this position, of `count`, contains the end of one row, the beginning of another and whole rows in between.

    >>> holds_rows("5 inch,x\\nb.png,pipe", 1, 3, ","), holds_rows("one, two\\nthree", 1, 3, ",")
    (True, False)
    """
    counts = [part.count(separator) for part in LINE_BREAK.split(cell)]
    return count > 1 and len(counts) > 1 and counts == [count - 1 - position, *[count - 1] * (len(counts) - 2), position]


def seems_enclosed(cell: str) -> bool:
    """Whether a cell begins with a quote and either ends with one, all others in it doubled, or is unclosed."""
    return cell[:1] == '"' and (ENCLOSED.fullmatch(cell) is not None or cell.count('"') % 2 == 1)


def note_of_quotes(path: str, columns: Sequence[Column[str | None]], rows: np.ndarray) -> list[str]:
    """A note on cells in quotes that were read as ordinary characters."""
    quoted: set[int] = set()
    for column in columns:
        begin = np.flatnonzero(column.touched('^"'))
        quoted.update(int(rows[i]) for i, cell in zip(begin.tolist(), column.take(begin), strict=True) if seems_enclosed(str(cell)))
    if not quoted:
        return []
    return [f"{path}: {rows_named(sorted(quoted))} cells in quotes, which were read as characters. If quotes enclose cells there: {QUOTED}"]


def rows_named(rows: list[int]) -> str:
    """The subject and verb of a sentence about these rows.

    >>> rows_named([7]), rows_named([2, 3])
    ('row 7 has', '2 rows (2, 3) have')
    """
    shown = ", ".join(map(str, rows[:MAX_SHOWN])) + (", ..." if len(rows) > MAX_SHOWN else "")
    return f"row {rows[0]} has" if len(rows) == 1 else f"{len(rows):,} rows ({shown}) have"
