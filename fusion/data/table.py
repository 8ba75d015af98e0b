"""A manifest, read into columns: for each sample its image, text, label and whatever else the file says of it.

One bad row does not cost the file: it goes to the ledger with its line and reason. What concerns the whole file is a UserError.
"""

import json
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from fusion.data.cell_text import canonical, cell_texts, each
from fusion.data.cells import Cells
from fusion.data.format import Format
from fusion.data.image_paths import Located, locate, odd_paths
from fusion.data.ledger import Ledger
from fusion.data.readers import read_cells
from fusion.data.separated import SEPARATORS
from fusion.errors import UserError, nearest
from fusion.tasks import Task

SPLIT_NAMES = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test", "eval": "test",
}  # fmt: skip
NULLS = frozenset({"nan", "NaN", "NA", "N/A", "#N/A", "<NA>", "NaT", "None", "null", "NULL"})  # how programs write a missing value as text
MOST_SHOWN = 5


@dataclass(frozen=True)
class Columns:
    """Names of the manifest's columns, where they differ from the default.

    Args:
        image: paths of image files, absolute or from the manifest's folder; an empty cell means no image.
        text: texts; an empty cell means no text.
        label: classes, as text.
        split: train, val or test; optional; null: a column of this name is not meant as such.
        id: a name for each sample, used once; optional, row numbers without it; null: likewise.
        group: samples with the same value stay in one split; optional; null: likewise.
    """

    image: str = "image"
    text: str = "text"
    label: str = "label"
    split: str | None = "split"
    id: str | None = "id"
    group: str | None = "group"


@dataclass
class Table:
    """Samples in columns, all of one length.

    images: absolute paths, None for a sample without image. texts, labels, groups: None where there is none. splits: "train", "val",
    "test", or None where the manifest does not say. files and rows: where each sample stands: the line of a text file, whose header
    is line 1, or the row of a Parquet file, counted from 1. extra: every other column by its name, as text, "" where empty; also that of
    an image or a text which isn't read.
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

    def by_name(self, columns: Columns) -> dict[str, Sequence[str | None]]:
        """Every column by its name in the manifest; images by their paths from its folder."""
        roles = {"image": list(self.local_paths()), "text": self.texts, "label": self.labels}
        roles |= {"split": self.splits, "id": list[str | None](self.ids), "group": self.groups}
        named = {getattr(columns, role): cells for role, cells in roles.items()}
        return {**{name: cells for name, cells in named.items() if name is not None}, **self.extra}

    def local_paths(self) -> Iterator[str | None]:
        """The images' paths from the folders of their manifests."""
        folders = {file: os.path.dirname(os.path.abspath(file)) + os.sep for file in set(self.files)}
        for path, file in zip(self.images, self.files, strict=True):
            yield path and os.path.abspath(path).removeprefix(folders[file])

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
    task: Task | None,
    ledger: Ledger,
    split: str | None = None,
    format: Format = Format(),  # noqa: B008 (frozen)
    need_all_inputs: bool = True,
) -> Table:
    """The usable samples of a manifest: .csv, .tsv, .jsonl, .ndjson (these also as .gz) or .parquet.

    modalities: of "image" and "text", those that are read; a sample that lacks all of them goes to the ledger, and the column of the other
    need not exist. task: a sample whose label it can't use goes to the ledger; None where no label is needed. split: all samples belong to
    it, for which the file was given. need_all_inputs: the columns of all `modalities` must be there; else of one, and samples lack what has
    no column, which is noted.

    Raises UserError for a file that cannot be read, lacks a column, uses an id twice, names an unknown split (another one where
    `split` is given), or has no usable row.
    """
    path = os.fspath(path)
    path = path if os.path.exists(path) else os.path.expanduser(path)
    cells = read_cells(path, format, [columns.label] if task is not None and task.takes_lists else [])
    needed = modalities if need_all_inputs else note_missing_inputs(path, cells, columns, modalities, ledger)
    refuse_missing_columns(path, cells, columns, needed, need_label=task is not None, need_split=split is None, trains=need_all_inputs)
    table, bad, notes = interpret(path, cells, columns, modalities, format.missing, task)
    for note in [*cells.notes, *notes, *notes_of_case(path, cells, columns, split)]:
        ledger.note(note)
    problems = [(row, "", reason) for row, reason in cells.malformed]
    problems += [(table.rows[i], table.ids[i], reason) for i, reason in bad.items()]
    for row, id, reason in sorted(problems):
        ledger.add(path, row, id, reason)
    if bad:
        given = {cell for cell in table.splits if cell}
        table = table.take([i for i in range(len(table)) if i not in bad])
        for lost in sorted(given - set(table.splits)) if len(table) else ():
            ledger.note(
                f"{path}: no row of the split '{lost}' that column '{columns.split}' gives is usable; it may be carved out of train"
            )
    if not len(table):
        first = "; ".join(f"row {row}: {reason}" for row, _, reason in sorted(problems)[:3])
        raise UserError(f"{path}: {len(problems):,} rows were read and none is usable. The first: {first}")
    if columns.id in cells.columns:
        refuse_repeated_ids(path, columns.id, table)
    if split is None:
        table.splits = known_splits(path, str(columns.split), table.splits)
    else:
        refuse_other_splits(path, str(columns.split), table, split)
        table.splits = [split] * len(table)
    return table


# What the cells mean.


def interpret(
    path: str, cells: Cells, columns: Columns, modalities: Sequence[str], missing: Sequence[str], task: Task | None
) -> tuple[Table, dict[int, str], list[str]]:
    """A table of all rows that have cells; what is wrong with some of them, by position; and notes on how they were read."""
    count, bad, notes = len(cells.rows), dict(cells.flawed), []
    nulls = {canonical(spelling.strip()) for spelling in missing}

    lists_in = "label" if task is not None and task.takes_lists else ""

    def column(role: str) -> list[str | None]:
        name = getattr(columns, role)
        unread = name not in cells.columns or (role in ("image", "text") and role not in modalities)
        return (
            [None] * count if unread else as_texts(name, cells.columns[name], nulls, bad, is_path=role == "image", lists=role == lists_in)
        )

    paths, folder = column("image"), os.path.dirname(os.path.abspath(path))
    located = {cell: locate(cell, folder) for cell in odd_paths(paths)}
    images = each(lambda cell: located[cell].path if cell in located else os.path.join(folder, cell) if cell.strip() else None, paths)
    texts = [cell if cell and not cell.isspace() else None for cell in column("text")]
    labels, splits, groups = (stripped(column(role)) for role in ("label", "split", "group"))
    ids = [(name or "").strip() or str(row) for name, row in zip(column("id"), cells.rows, strict=True)]
    of_a_role = {getattr(columns, f.name) for f in fields(columns) if f.name in modalities or f.name not in ("image", "text")}
    extra = {
        name: [cell or "" for cell in as_texts(name, found, nulls, {})] for name, found in cells.columns.items() if name not in of_a_role
    }
    notes += notes_of_nulls(path, {columns.text: texts, columns.label: labels})
    if located:
        notes += notes_of_paths(path, cells.rows, [located.get(cell or "") for cell in paths])
        for i, cell in enumerate(paths):
            if cell in located and located[cell].missing:
                bad.setdefault(i, f"image missing: {located[cell].missing}")

    lacking = " and ".join(f"no {name}" for name in modalities)
    for i, inputs in enumerate(zip(images, texts, strict=True)):
        if inputs == (None, None):
            bad.setdefault(i, lacking)
    if task is not None:
        verdicts = {label: task.check(label) for label in set(labels)}
        for i, label in enumerate(labels):
            if (reason := verdicts[label]) is not None:
                bad.setdefault(i, reason)
    return Table(images, texts, labels, splits, ids, groups, cells.rows, [path] * count, extra), bad, notes


def as_texts(
    name: str, cells: list[Any], nulls: set[str], bad: dict[int, str], *, is_path: bool = False, lists: bool = False
) -> list[str | None]:
    """Cells as text, None where there is none. A row whose cell is an object, or a list (where no `lists` are expected, which become JSON),
    goes to `bad`. The text of a path is left alone."""
    if lists:
        cells = [json.dumps(list(cell), default=str, ensure_ascii=False) if isinstance(cell, list | tuple) else cell for cell in cells]
    kinds = set(map(type, cells))
    if kinds & {list, dict}:
        for i, cell in enumerate(cells):
            if isinstance(cell, list | dict):
                bad.setdefault(i, f"column {name} holds {'a list' if isinstance(cell, list) else 'an object'}, expected text")
        cells = [str(cell) if isinstance(cell, list | dict) else cell for cell in cells]
    texts = cells if is_path and kinds <= {str, type(None)} else cell_texts(cells)
    return [None if cell is not None and cell.strip() in nulls else cell for cell in texts] if nulls else texts


def stripped(cells: list[str | None]) -> list[str | None]:
    """Cells without blanks around, None where nothing is left."""
    return each(lambda cell: canonical(cell.strip()) or None, cells)


# What is noted, though it costs no sample.


def notes_of_paths(path: str, rows: list[int], located: list[Located | None]) -> list[str]:
    corrected: dict[str, list[int]] = defaultdict(list)
    for row, image in zip(rows, located, strict=True):
        if image is not None and image.corrected:
            corrected[image.corrected].append(row)
    return [
        f"{path}: {len(found):,} paths of images are written with {what}, which was corrected (rows {listed([str(row) for row in found])})"
        for what, found in corrected.items()
    ]


def notes_of_case(path: str, cells: Cells, columns: Columns, split: str | None) -> list[str]:
    """Columns that differ from an optional one in nothing but capitals: they are read as any other."""
    notes = []
    for role in ("id", "group", *(["split"] if split is None else [])):
        name = getattr(columns, role)
        alike = [column for column in cells.columns if name and name not in cells.columns and column.casefold() == name.casefold()]
        notes += [
            f"{path}: column '{column}' is not taken for '{name}'; if it is meant: --data.columns.{role}={column}" for column in alike
        ]
    return notes


def notes_of_nulls(path: str, columns: dict[str, list[str | None]]) -> list[str]:
    """Cells that look like what a program writes for a missing value. They are read as text, for they may be meant: a class, a word."""
    notes = []
    for name, cells in columns.items():
        found = [cell for cell in cells if cell in NULLS]
        if found:
            option = ",".join(f'"{spelling}"' for spelling in sorted(set(found)))
            notes.append(
                f"{path}: {len(found):,} cells of column '{name}' are {option}, read as text; else: --data.format.missing='[{option}]'"
            )
    return notes


def note_missing_inputs(path: str, cells: Cells, columns: Columns, modalities: Sequence[str], ledger: Ledger) -> list[str]:
    """The modalities that have a column, or all where none has; the others are noted."""
    there = [name for name in modalities if getattr(columns, name) in cells.columns]
    for name in modalities:
        column = getattr(columns, name)
        if there and name not in there and column not in cells.opaque:
            hint = nearest(column, cells.columns)
            close = f" {hint} Then: --data.columns.{name}=NAME" if hint.startswith("Did") else ""
            ledger.note(f"{path} has no column '{column}': all its samples are taken as without {name}.{close}")
    return [name for name in modalities if name in there or getattr(columns, name) in cells.opaque] if there else list(modalities)


# What is refused.


def known_splits(path: str, column: str, cells: list[str | None]) -> list[str | None]:
    meaning = {cell: SPLIT_NAMES.get(cell.casefold()) for cell in set(cells) if cell is not None}
    unknown = sorted(cell for cell, split in meaning.items() if split is None)
    if unknown:
        shown = listed([f"'{cell}'" for cell in unknown])
        raise UserError(
            f"{path}: column '{column}' has unknown splits: {shown}. Known: {', '.join(SPLIT_NAMES)}. "
            "If it is not meant as splits: --data.columns.split=null"
        )
    return [None if cell is None else meaning[cell] for cell in cells]


def refuse_other_splits(path: str, column: str, table: Table, split: str) -> None:
    """A file that was given for a split has no rows of another."""
    given = zip(table.rows, table.splits, strict=True)
    others = [(row, cell) for row, cell in given if SPLIT_NAMES.get(str(cell).casefold(), split) != split]
    if others:
        row, cell = others[0]
        raise UserError(
            f"{path} is given for {split}, but {len(others):,} of its rows name another split (the first: row {row}, '{cell}' in column "
            f"'{column}'). Take them out, or ignore the column in all files: --data.columns.split=null"
        )


def refuse_repeated_ids(path: str, column: str | None, table: Table) -> None:
    if len(set(table.ids)) == len(table):
        return
    rows = defaultdict(list)
    for id, row in zip(table.ids, table.rows, strict=True):
        rows[id].append(row)
    repeated = [f"'{id}' in rows {listed([str(row) for row in found])}" for id, found in rows.items() if len(found) > 1]
    raise UserError(
        f"{path}: {len(repeated):,} ids are used more than once, but an id names one sample: {listed(repeated, '; ')}. "
        f"If column '{column}' is not meant as ids: --data.columns.id=null, or another: --data.columns.id=NAME"
    )


def refuse_missing_columns(
    path: str, cells: Cells, columns: Columns, modalities: Sequence[str], *, need_label: bool, need_split: bool, trains: bool
) -> None:
    """All columns that are wanted and absent, in one message. trains: a model is to be trained, which could do without a modality."""
    wanted = list(modalities)
    if need_label:
        # A column that was renamed was asked for: it can't be optional. (To predict, though, nothing but the inputs is needed.)
        optional = ["id", "group", *(["split"] if need_split else [])]
        wanted += ["label", *(role for role in optional if getattr(columns, role) not in (None, getattr(Columns, role)))]
    absent = [role for role in wanted if getattr(columns, role) not in cells.columns]
    told = [lacks_column(cells, role, getattr(columns, role), modalities if trains else ()) for role in absent]
    if told:
        names = [f"'{name}'" for name in cells.columns]
        raise UserError(f"{path} {'; it '.join(told)}. Its columns: {listed(names, most=20)}{hint_of_separator(cells)}")


def lacks_column(cells: Cells, role: str, name: str, modalities: Sequence[str]) -> str:
    if name in cells.opaque:
        return f"has {cells.opaque[name]} in column '{name}', expected text{' (paths)' if role == 'image' else ''}"
    hint = nearest(name, cells.columns)
    close = f" {hint}" if hint.startswith("Did") else ""
    others = [other for other in modalities if other != role]
    without = f", or train without: fit --model.modalities=[{','.join(others)}]" if role in modalities and others else ""
    return f"has no column '{name}' for the {role}s.{close} Another name: --data.columns.{role}=NAME{without}"


def hint_of_separator(cells: Cells) -> str:
    """The option that separates the columns otherwise, if a name of one holds what may be a separator."""
    held = [separator for separator in SEPARATORS if any(separator in name for name in cells.columns)]
    options = " or ".join("--data.format.separator='{}'".format("\\t" if separator == "\t" else separator) for separator in held)
    return f". If a name there is several: {options}" if held else ""


def listed(items: Sequence[str], separator: str = ", ", most: int = MOST_SHOWN) -> str:
    return separator.join(items[:most]) + (f"{separator}... ({len(items) - most:,} more)" if len(items) > most else "")
