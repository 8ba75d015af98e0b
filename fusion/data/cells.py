"""What a manifest's file holds, before it means anything: the cells of CSV, JSON Lines and Parquet, and the rows that can't be read."""

import codecs
import csv
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fusion.errors import UserError, nearest


@dataclass
class Cells:
    """A file's columns before they mean anything. Rows that have no cells to speak of are in `malformed` (row, reason) and nowhere else;
    those whose cells can't be trusted are in the columns too, with the reason under their position in `flawed`. opaque: columns that
    can't be text, and what they hold."""

    columns: dict[str, list[Any]] = field(default_factory=dict)
    rows: list[int] = field(default_factory=list)
    malformed: list[tuple[int, str]] = field(default_factory=list)
    flawed: dict[int, str] = field(default_factory=dict)
    opaque: dict[str, str] = field(default_factory=dict)


def read_cells(path: str) -> Cells:
    folder, name = os.path.split(os.path.abspath(path))
    known = f"expected {', '.join(READERS)}"
    if not os.path.exists(path):
        if not os.path.isdir(folder):
            raise UserError(f"there is no manifest {path}: there is no folder {folder}")
        raise UserError(f"there is no manifest {path}. In its folder: {nearest(name, os.listdir(folder))}")
    if os.path.isdir(path):
        raise UserError(f"the manifest {path} is a folder, {known} file")
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in READERS:
        raise UserError(f"the manifest {path} is a {suffix or 'nameless'} file, {known}")
    try:
        cells = READERS[suffix](path)
    except OSError as error:
        raise UserError(f"can't read the manifest {path}: {error.strerror or ' '.join(str(error).split())}") from error
    if not cells.rows and not cells.malformed:
        raise UserError(f"the manifest {path} has no rows")
    return cells


def read_separated(path: str, delimiter: str) -> Cells:
    """CSV with quotes as RFC 4180 has them: cells may hold line breaks, and a quote inside a quoted cell is doubled."""
    csv.field_size_limit(2**31 - 1)  # a setting of the process; it is not put back, lest another thread's reading stops at the old one
    decodes = is_utf8(path)
    cells = Cells()
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        numbered = records(file, delimiter)
        names = header(path, numbered)
        columns: list[list[str]] = [[] for _ in names]
        batch: list[list[str]] = []
        for line, row in numbered:
            if isinstance(row, list) and len(row) == len(names):
                if not decodes and (flaw := undecodable(zip(names, row, strict=True))):
                    cells.flawed[len(cells.rows)] = flaw
                cells.rows.append(line)
                batch.append(row)
                # Rows that live long are what the garbage collector walks over again and again: 64 at a time doubles the speed.
                if len(batch) == 64:
                    extend(columns, batch)
            elif isinstance(row, str):
                cells.malformed.append((line, row))
            elif any(cell.strip() for cell in row) or len(row) > 1:
                cells.malformed.append((line, f"wrong number of cells ({len(row)} cells, expected {len(names)})"))
    extend(columns, batch)
    cells.columns = {name: column for name, column in zip(names, columns, strict=True) if name}
    return cells


def extend(columns: list[list[str]], batch: list[list[str]]) -> None:
    for column, cells in zip(columns, zip(*batch, strict=True), strict=False):
        column.extend(cells)
    batch.clear()


def records(file: Iterator[str], delimiter: str) -> Iterator[tuple[int, list[str] | str]]:
    """Each record's first line and its cells, or the reason why it has none.

    A quote that is never closed would swallow all that follows; only the line where it stands is given up, and the rest is read anew.
    """
    taken: list[str] = []
    again: list[str] = []

    def lines() -> Iterator[str]:
        while line := again.pop() if again else next(file, ""):
            taken.append(line)
            yield line

    at = 1
    while True:
        try:
            for cells in csv.reader(lines(), delimiter=delimiter, strict=True):
                yield at, cells
                at += len(taken)
                taken.clear()
            return
        except csv.Error as error:
            yield at, f"quotes are not closed or not doubled ({error})"
            again.extend(reversed(taken[1:]))
            at += 1
            taken.clear()


def header(path: str, numbered: Iterator[tuple[int, list[str] | str]]) -> list[str]:
    """Names of the columns, from the first line that isn't blank; a nameless column (pandas' index) stays nameless."""
    cells = next((cells for _, cells in numbered if cells), [])
    if isinstance(cells, str):
        raise UserError(f"{path}: can't read its header: {cells}")
    names = [cell.strip() for cell in cells]
    if undecodable(zip(names, names, strict=True)):
        raise UserError(f"{path}: its header is not UTF-8; save the file as UTF-8 (not as 'Unicode text', which is UTF-16)")
    repeated = sorted({name for name in names if name and names.count(name) > 1})
    if repeated:
        raise UserError(f"{path}: its header has more than one column '{repeated[0]}'")
    return names


def read_jsonl(path: str) -> Cells:
    """One JSON object a line; a key that a line lacks is null there."""
    cells = Cells()
    with open(path, "rb") as file:
        for line, raw in enumerate(file, 1):
            # Bytes that don't decode become lone surrogates, which say later in which column they stood.
            text = raw.removeprefix(codecs.BOM_UTF8).decode("utf-8", errors="surrogateescape")
            if not text or text.isspace():
                continue
            try:
                row = json.loads(text)
            except json.JSONDecodeError as error:
                cells.malformed.append((line, f"not JSON ({error.msg} at character {error.colno})"))
                continue
            except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets in brackets in brackets
                cells.malformed.append((line, f"not JSON that can be read ({error})"))
                continue
            if not isinstance(row, dict):
                cells.malformed.append((line, "not a JSON object"))
                continue
            if not text.isascii() or "\\u" in text:
                flaw = undecodable((name, cell) for name, cell in row.items() if isinstance(cell, str))
                if flaw:
                    cells.flawed[len(cells.rows)] = flaw
            for name in row.keys() - cells.columns.keys():
                cells.columns[name] = [None] * len(cells.rows)
            for name, column in cells.columns.items():
                column.append(row.get(name))
            cells.rows.append(line)
    return cells


def read_parquet(path: str) -> Cells:
    """Columns of text, numbers, truth values, times and categories; lists, structs and bytes stay unread."""
    try:
        # Not pq.read_table, which would make columns of the folders' names (label=3/part.parquet).
        with pq.ParquetFile(path) as file:
            kinds = dict(zip(file.schema_arrow.names, file.schema_arrow.types, strict=True))
            opaque = {name: str(kind) for name, kind in kinds.items() if pa.types.is_nested(kind) or "binary" in str(kind)}
            table = file.read(columns=[name for name in kinds if name not in opaque])
    except pa.ArrowException as error:
        raise UserError(f"{path} is not a Parquet file that can be read: {str(error).splitlines()[0]}") from error
    cells = Cells(rows=list(range(1, len(table) + 1)), opaque=opaque)
    for name, column in zip(table.column_names, table.columns, strict=True):
        if pa.types.is_temporal(column.type):
            column = column.cast(pa.string())  # Python's own times lack the nanoseconds
        cells.columns[name] = decoded(name, column, cells.flawed)
    return cells


def decoded(name: str, column: pa.ChunkedArray, flawed: dict[int, str]) -> list[Any]:
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        raw = column.cast(pa.large_binary()).to_pylist()
    texts = [cell and cell.decode("utf-8", errors="surrogateescape") for cell in raw]
    for i, cell in enumerate(texts):
        if cell and (flaw := undecodable([(name, cell)])):
            flawed.setdefault(i, flaw)
    return texts


def is_utf8(path: str) -> bool:
    """Whether the whole file decodes: then no cell need be looked at."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with open(path, "rb") as file:
        try:
            while block := file.read(2**20):
                decoder.decode(block)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return False
    return True


def undecodable(cells: Iterable[tuple[str, str]]) -> str | None:
    """What is wrong with the first cell that is no valid text. Lone surrogates stand for bytes, as Python's surrogateescape has it."""
    for name, cell in cells:
        try:
            cell.encode()
        except UnicodeEncodeError as error:
            code = ord(cell[error.start])
            what = f"byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"lone surrogate U+{code:04X}"
            return f"not UTF-8 ({what} in column {name})"
    return None


READERS: Mapping[str, Callable[[str], Cells]] = {
    ".csv": partial(read_separated, delimiter=","),
    ".tsv": partial(read_separated, delimiter="\t"),
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".parquet": read_parquet,
}
