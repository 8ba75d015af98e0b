"""A manifest, read into columns: for each sample its image, text, label and whatever else the file says of it.

One bad row does not cost the file: it goes to the ledger with its line and reason. What concerns the whole file is a UserError.
"""

import codecs
import csv
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fusion.data.ledger import Ledger
from fusion.errors import UserError, nearest

SPLIT_NAMES = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test", "eval": "test",
}  # fmt: skip
MOST_SHOWN = 5


@dataclass(frozen=True)
class Columns:
    """Names of the manifest's columns, where they differ from the default.

    Args:
        image: paths of image files, absolute or from the manifest's folder; an empty cell means no image.
        text: texts; an empty cell means no text.
        label: classes, as text.
        split: train, val or test; optional.
        id: a name for each sample, used once; optional, row numbers without it.
        group: samples with the same value stay in one split; optional.
    """

    image: str = "image"
    text: str = "text"
    label: str = "label"
    split: str = "split"
    id: str = "id"
    group: str = "group"


@dataclass
class Table:
    """Samples in columns, all of one length.

    images: absolute paths, None for a sample without image. texts, labels, groups: None where there is none. splits: "train", "val",
    "test", or None where the manifest does not say. files and rows: where each sample stands: the line of a text file, whose header
    is line 1, or the row of a Parquet file, counted from 1. extra: every other column by its name, as text, "" where empty.
    """

    images: list[str | None]
    texts: list[str | None]
    labels: list[str | None]
    splits: list[str | None]
    ids: list[str]
    groups: list[str | None]
    rows: list[int]
    files: list[str]
    extra: dict[str, list[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, indices: Sequence[int]) -> "Table":
        """The samples at these positions, in this order."""
        columns = {f.name: [getattr(self, f.name)[i] for i in indices] for f in fields(self) if f.name != "extra"}
        return Table(**columns, extra={name: [cells[i] for i in indices] for name, cells in self.extra.items()})

    @staticmethod
    def concat(tables: Sequence["Table"]) -> "Table":
        """All samples of all tables; an extra column that one of them lacks is "" there."""
        columns = {f.name: [cell for table in tables for cell in getattr(table, f.name)] for f in fields(Table) if f.name != "extra"}
        names = dict.fromkeys(name for table in tables for name in table.extra)
        extra = {name: [cell for table in tables for cell in table.extra.get(name, [""] * len(table))] for name in names}
        return Table(**columns, extra=extra)


def read_table(
    path: str | Path,
    columns: Columns,
    modalities: Sequence[str],
    *,
    need_label: bool,
    ledger: Ledger,
    split: str | None = None,
) -> Table:
    """The usable samples of a manifest: .csv, .tsv, .jsonl, .ndjson (all UTF-8) or .parquet.

    modalities: of "image" and "text", those that are read; a sample that lacks all of them goes to the ledger, and the column of the other
    need not exist. need_label: a sample without label goes to the ledger. split: all samples belong to it, whatever the file says.

    Raises UserError for a file that cannot be read, lacks a column, uses an id twice, names an unknown split or has no usable row.
    """
    path = os.fspath(path)
    cells = read_cells(path)
    refuse_missing_columns(path, cells, columns, modalities, need_label=need_label, need_split=split is None)
    table, bad = interpret(path, cells, columns, modalities, need_label=need_label)
    problems = [(row, "", reason) for row, reason in cells.malformed]
    problems += [(table.rows[i], table.ids[i], reason) for i, reason in bad.items()]
    for row, id, reason in sorted(problems):
        ledger.add(path, row, id, reason)
    if bad:
        table = table.take([i for i in range(len(table)) if i not in bad])
    if not len(table):
        first = "; ".join(f"row {row}: {reason}" for row, _, reason in sorted(problems)[:3])
        raise UserError(f"{path}: {len(problems):,} rows were read and none is usable. The first: {first}")
    if columns.id in cells.columns:
        refuse_repeated_ids(path, table)
    table.splits = [split] * len(table) if split else known_splits(path, columns.split, table.splits)
    return table


# What the cells mean.


def interpret(path: str, cells: "Cells", columns: Columns, modalities: Sequence[str], *, need_label: bool) -> tuple[Table, dict[int, str]]:
    """A table of all rows that have cells, and what is wrong with some of them, by position."""
    count, bad = len(cells.rows), dict(cells.flawed)
    folder = os.path.dirname(os.path.abspath(path))

    def column(role: str) -> list[str | None]:
        name = getattr(columns, role)
        unread = name not in cells.columns or (role in ("image", "text") and role not in modalities)
        return [None] * count if unread else as_texts(name, cells.columns[name], bad)

    images = each_value(lambda cell: os.path.join(folder, cell), column("image"))
    texts = [cell if cell and not cell.isspace() else None for cell in column("text")]
    labels = each_value(lambda cell: None if cell.strip().lower() == "nan" else cell.strip(), column("label"))
    splits, groups = each_value(str.strip, column("split")), each_value(str.strip, column("group"))
    ids = [(name or "").strip() or str(row) for name, row in zip(column("id"), cells.rows, strict=True)]
    of_a_role = {getattr(columns, f.name) for f in fields(columns)}
    extra = {name: [cell or "" for cell in as_texts(name, found, {})] for name, found in cells.columns.items() if name not in of_a_role}

    lacking = " and ".join(f"no {name}" for name in modalities)
    for i, inputs in enumerate(zip(images, texts, strict=True)):
        if inputs == (None, None):
            bad.setdefault(i, lacking)
    if need_label:
        for i, label in enumerate(labels):
            if label is None:
                bad.setdefault(i, "label is missing")
    return Table(images, texts, labels, splits, ids, groups, cells.rows, [path] * count, extra), bad


def each_value(meaning: Callable[[str], str | None], cells: list[str | None]) -> list[str | None]:
    """What each cell means, None where it is blank. Worked out once for each distinct value, which equal cells then share in memory."""
    known = {cell: None if cell is None or not cell.strip() else meaning(cell) for cell in set(cells)}
    return [known[cell] for cell in cells]


def as_texts(name: str, cells: list[Any], bad: dict[int, str]) -> list[str | None]:
    """Cells as text, None where there is none. A row whose cell is a list or an object goes to `bad`."""
    if set(map(type, cells)) <= {str, type(None)}:
        return cells
    for i, cell in enumerate(cells):
        if isinstance(cell, list | dict):
            bad.setdefault(i, f"column {name} holds {'a list' if isinstance(cell, list) else 'an object'}, expected text")
    return [as_text(cell) for cell in cells]


def as_text(cell: Any) -> str | None:
    """
    >>> [as_text(cell) for cell in ("3", 3, 3.0, 0.5, True, None, float("nan"))]
    ['3', '3', '3', '0.5', 'true', None, None]
    """
    if cell is None or isinstance(cell, str):
        return cell
    if isinstance(cell, bool):
        return str(cell).lower()
    if isinstance(cell, float):
        return None if cell != cell else str(int(cell)) if cell.is_integer() else repr(cell)
    return str(cell)


def known_splits(path: str, column: str, cells: list[str | None]) -> list[str | None]:
    meaning = {cell: SPLIT_NAMES.get(cell.casefold()) for cell in set(cells) if cell is not None}
    unknown = sorted(cell for cell, split in meaning.items() if split is None)
    if unknown:
        shown = listed([f"'{cell}'" for cell in unknown])
        raise UserError(f"{path}: column '{column}' has unknown splits: {shown}. Known: {', '.join(SPLIT_NAMES)}")
    return [None if cell is None else meaning[cell] for cell in cells]


def refuse_repeated_ids(path: str, table: Table) -> None:
    if len(set(table.ids)) == len(table):
        return
    rows = defaultdict(list)
    for id, row in zip(table.ids, table.rows, strict=True):
        rows[id].append(row)
    repeated = [f"'{id}' in rows {listed([str(row) for row in found])}" for id, found in rows.items() if len(found) > 1]
    raise UserError(f"{path}: {len(repeated):,} ids are used more than once, but an id names one sample: {listed(repeated, '; ')}")


def refuse_missing_columns(
    path: str, cells: "Cells", columns: Columns, modalities: Sequence[str], *, need_label: bool, need_split: bool
) -> None:
    """All columns that are wanted and absent, in one message."""
    wanted = list(modalities)
    if need_label:
        # A column that was renamed was asked for: it can't be optional. (To predict, though, nothing but the inputs is needed.)
        optional = ["id", "group", *(["split"] if need_split else [])]
        wanted += ["label", *(role for role in optional if getattr(columns, role) != getattr(Columns, role))]
    told = [lacks_column(cells, role, getattr(columns, role), modalities) for role in wanted if getattr(columns, role) not in cells.columns]
    if told:
        names = [f"'{name}'" for name in cells.columns]
        only = " (one column: are the cells separated by commas?)" if path.lower().endswith(".csv") and len(names) == 1 else ""
        raise UserError(f"{path} {'; it '.join(told)}. Its columns: {listed(names, most=20)}{only}")


def lacks_column(cells: "Cells", role: str, name: str, modalities: Sequence[str]) -> str:
    if name in cells.opaque:
        return f"has {cells.opaque[name]} in column '{name}', expected text{' (paths)' if role == 'image' else ''}"
    hint = nearest(name, cells.columns)
    close = f" {hint}" if hint.startswith("Did") else ""
    others = [other for other in modalities if other != role]
    without = f", or train without: --model.modalities=[{','.join(others)}]" if role in modalities and others else ""
    return f"has no column '{name}' for the {role}s.{close} Another name: --data.columns.{role}=NAME{without}"


def listed(items: Sequence[str], separator: str = ", ", most: int = MOST_SHOWN) -> str:
    return separator.join(items[:most]) + (f"{separator}... ({len(items) - most:,} more)" if len(items) > most else "")


# What the file holds.


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
