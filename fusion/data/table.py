"""Reads a manifest into columns: for each sample its inputs, its label and all other columns of the file.

A bad row goes to the issues with its line and reason, the rest of the file is read. Mistakes that concern the whole file raise UserError.
"""

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from fusion.cell_text import canonical
from fusion.data.cells import Cells, as_texts
from fusion.data.column import PADDED, Column, Positions, absent, concat, take
from fusion.data.format import Format
from fusion.data.issues import DataIssues
from fusion.data.kinds import Kind
from fusion.data.kinds.base import Reading
from fusion.data.kinds.text import notes_of_nulls
from fusion.data.readers import read_cells
from fusion.data.separated import SEPARATORS
from fusion.errors import UserError, nearest
from fusion.tasks import Task

SPLIT_NAMES = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test", "eval": "test",
}  # fmt: skip
MAX_SHOWN = 5


@dataclass(frozen=True)
class Columns:
    """Names of the manifest's columns, where they differ from the default.

    Args:
        image: paths of image files, absolute or relative to the manifest's folder, or lists of them; an empty cell means no image.
        text: texts; an empty cell means no text.
        label: targets: classes, sets of labels, or numbers; or several columns as [red, round]: one of 0 and 1 for each label of
            MultiLabel, one of numbers for each target of Regression.
        split: train, val or test; optional; null: ignore a column of this name.
        id: a unique name for each sample; optional, row numbers without it; null: likewise.
        group: samples with the same value stay in one split; optional; null: likewise.
    """

    image: str = "image"
    text: str = "text"
    label: str | list[str] = "label"
    split: str | None = "split"
    id: str | None = "id"
    group: str | None = "group"

    @property
    def targets(self) -> list[str]:
        """The columns of the label."""
        return [self.label] if isinstance(self.label, str) else list(self.label)


@dataclass
class Table:
    """Samples in columns, all of one length.

    kinds: the inputs by name. inputs: their cells, None where missing. labels, groups: None where missing. splits: "train", "val", "test",
    or None where the manifest gives none. files and rows: the location of each sample: the line of a text file, whose header is line 1, or
    the row of a Parquet file, counted from 1. extra: every other column by its name, as text, "" where empty, including columns of inputs
    that aren't read.
    """

    kinds: Mapping[str, Kind]
    inputs: dict[str, Sequence[Any]]
    labels: Sequence[str | None]
    splits: Sequence[str | None]
    ids: Sequence[str]
    groups: Sequence[str | None]
    rows: Sequence[int]
    files: Sequence[str]
    extra: dict[str, Sequence[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, indices: Positions) -> "Table":
        """The samples at these positions, in this order."""
        columns = {name: take(getattr(self, name), indices) for name in PLAIN}
        inputs, extra = ({name: take(cells, indices) for name, cells in named.items()} for named in (self.inputs, self.extra))
        return Table(self.kinds, inputs, **columns, extra=extra)

    def by_name(self, columns: Columns) -> dict[str, Sequence[str | None]]:
        """Every column by its name in the manifest; images by their paths relative to its folder."""
        named: dict[str, Sequence[str | None]] = {}
        for name, kind in self.kinds.items():
            for position, column in enumerate(kind.columns):
                several = len(kind.columns) > 1
                named[column] = [cell and cell[position] for cell in self.inputs[name]] if several else list(self.local_cells(name))
        roles: dict[str, Sequence[str | None]] = {"label": self.labels, "split": self.splits, "id": self.ids, "group": self.groups}
        names = {"label": ",".join(columns.targets) or None, "split": columns.split, "id": columns.id, "group": columns.group}
        named |= {name: roles[role] for role, name in names.items() if name is not None}
        return {**named, **self.extra}

    def local_cells(self, name: str) -> Iterator[str | None]:
        """An input's cells as text; paths relative to the folders of their manifests."""
        folders = {file: os.path.dirname(os.path.abspath(file)) + os.sep for file in set(self.files)}
        kind = self.kinds[name]
        for cell, file in zip(self.inputs[name], self.files, strict=True):
            yield kind.local(cell, folders[file])

    @staticmethod
    def concat(tables: Sequence["Table"]) -> "Table":
        """All samples of all tables; an extra column that is missing in one of them is "" there."""
        columns = {name: concat([getattr(table, name) for table in tables]) for name in PLAIN}
        inputs = {name: concat([table.inputs[name] for table in tables]) for name in tables[0].inputs}
        names = dict.fromkeys(name for table in tables for name in table.extra)
        extra = {name: concat([table.extra.get(name, [""] * len(table)) for table in tables]) for name in names}
        return Table(tables[0].kinds, inputs, **columns, extra=extra)


PLAIN = tuple(f.name for f in fields(Table) if f.name not in ("kinds", "inputs", "extra"))


def read_table(
    path: str | Path,
    columns: Columns,
    inputs: Mapping[str, Kind],
    *,
    task: Task | None,
    issues: DataIssues,
    split: str | None = None,
    format: Format = Format(),  # noqa: B008 (frozen)
    need_all_inputs: bool = True,
) -> Table:
    """The usable samples of a manifest: .csv, .tsv, .jsonl, .ndjson (these also as .gz) or .parquet.

    inputs: the inputs to read, by name; a sample without any of them goes to the issues. task: a sample whose label it can't use goes there
    too; None where no label is needed. split: the split for which the file was given; all samples belong to it. need_all_inputs: the
    columns of all inputs are required; else of at least one, and inputs without column are missing, which is noted.

    Raises UserError for a file that can't be read, has no usable row, misses a column, uses an id twice, or names an unknown split (a
    different one where `split` is given).
    """
    path = os.fspath(path)
    path = path if os.path.exists(path) else os.path.expanduser(path)
    rich = [column for kind in inputs.values() for column in kind.rich_columns]
    if task is not None and task.target_columns is not None:
        columns = replace(columns, label=task.target_columns)
    cells = read_cells(path, format, [*rich, *(columns.targets if task is not None and task.takes_lists else [])])
    needed = inputs if need_all_inputs else note_missing_inputs(path, cells, inputs, issues)
    reject_missing_columns(path, cells, columns, needed, need_label=task is not None, need_split=split is None, trains=need_all_inputs)
    table, bad, notes = interpret(path, cells, columns, inputs, format.missing, task)
    for note in [*cells.notes, *notes, *notes_of_case(path, cells, columns, split)]:
        issues.note(note)
    problems = [(row, "", reason) for row, reason in cells.malformed]
    problems += [(table.rows[i], table.ids[i], reason) for i, reason in bad.items()]
    for row, id, reason in sorted(problems):
        issues.add(path, row, id, reason)
    if bad:
        given = {cell for cell in table.splits if cell}
        table = table.take(np.delete(np.arange(len(table)), list(bad)))
        for lost in sorted(given - set(table.splits)) if len(table) else ():
            issues.note(
                f"{path}: no row of the split '{lost}' in column '{columns.split}' is usable; that split may be carved out of train"
            )
    if not len(table):
        first = "; ".join(f"row {row}: {reason}" for row, _, reason in sorted(problems)[:3])
        raise UserError(f"{path}: {len(problems):,} rows were read and none is usable. The first: {first}")
    if columns.id in cells.columns:
        reject_repeated_ids(path, columns.id, table)
    if split is None:
        table.splits = known_splits(path, str(columns.split), table.splits)
    else:
        reject_other_splits(path, str(columns.split), table, split)
        table.splits = [split] * len(table)
    return table


# Interpretation of the cells


def interpret(
    path: str, cells: Cells, columns: Columns, inputs: Mapping[str, Kind], spellings: Sequence[str], task: Task | None
) -> tuple[Table, dict[int, str], list[str]]:
    """A table of all rows with cells, including bad ones; the reasons for bad ones, by position; and notes on how cells were read."""
    count = len(cells.rows)
    reading = Reading(path, cells.rows, {canonical(spelling.strip()) for spelling in spellings}, dict(cells.flawed))
    empty = Column.of([None]).take([0] * count)
    takes_lists = task is not None and task.takes_lists

    def texts_in(name: str | None, lists: bool = False) -> Column[str | None]:
        if name not in cells.columns:
            return empty
        return as_texts(str(name), cells.columns[str(name)], reading.nulls, reading.bad, lists=lists)

    def targets() -> Column[str | None]:
        if isinstance(columns.label, str):
            return texts_in(columns.label, takes_lists).map(stripped)
        if task is None:
            return empty
        lists = takes_lists and task.target_columns is not None
        identities = {name: map(inputs[name].identity, cells) for name, cells in read.items()}
        return Column.of(task.joined({name: texts_in(name, lists) for name in columns.label}, reading.bad, identities))

    def cells_of(kind: Kind) -> Sequence[Any]:
        present = {one: cells.columns[one] for one in kind.columns if one in cells.columns}
        return kind.read({one: present.get(one, empty) for one in kind.columns}, reading) if present else empty

    read = {name: cells_of(kind) for name, kind in inputs.items()}
    labels = targets()
    splits, groups = (texts_in(name).map(stripped) for name in (columns.split, columns.group))
    rows = Column.numbers(cells.rows)
    ids = texts_in(columns.id).map(lambda cell: cell.strip() or None, touches=PADDED).filled(rows)
    with_role = {*columns.targets, columns.split, columns.id, columns.group} | {name for kind in inputs.values() for name in kind.columns}
    others = {name: other for name, other in cells.columns.items() if name not in with_role}
    extra: dict[str, Sequence[str]] = {name: as_texts(name, other, reading.nulls, {}).filled("") for name, other in others.items()}
    notes = [*reading.notes, *notes_of_nulls(path, ",".join(columns.targets), labels)]

    bad = reading.bad
    missing = " and ".join(f"no {name}" for name in inputs)
    for i in np.flatnonzero(np.logical_and.reduce([absent(cells) for cells in read.values()])).tolist():
        bad.setdefault(i, missing)
    if task is not None:
        distinct, codes = labels.coded()
        reasons = [*map(task.check, distinct), task.check(None)]  # the last for code -1
        for i in np.flatnonzero(np.array([reason is not None for reason in reasons])[codes]).tolist():
            bad.setdefault(i, str(reasons[codes[i]]))
    return Table(inputs, read, labels, splits, ids, groups, rows, Column.repeat(path, count), extra), bad, notes


def stripped(cell: str) -> str | None:
    """A cell without whitespace around it, None where nothing is left."""
    return canonical(cell.strip()) or None


# Notes


def notes_of_case(path: str, cells: Cells, columns: Columns, split: str | None) -> list[str]:
    """Notes on columns that differ from an optional one only in capitals: they are not used for it."""
    notes = []
    for role in ("id", "group", *(["split"] if split is None else [])):
        name = getattr(columns, role)
        same_letters = [column for column in cells.columns if name and name not in cells.columns and column.casefold() == name.casefold()]
        notes += [
            f"{path}: column '{column}' is not used as '{name}'; to use it: --data.columns.{role}={column}" for column in same_letters
        ]
    return notes


def note_missing_inputs(path: str, cells: Cells, inputs: Mapping[str, Kind], issues: DataIssues) -> dict[str, Kind]:
    """The inputs with columns in the file, or all inputs if none has any; missing columns are noted."""
    present = {name: kind for name, kind in inputs.items() if any(column in cells.columns for column in kind.columns)}
    opaque = {name: kind for name, kind in inputs.items() if any(column in cells.opaque for column in kind.columns)}
    for name, kind in inputs.items():
        for column in kind.columns if present and name not in opaque else ():
            if column in cells.columns:
                continue
            hint = nearest(column, cells.columns)
            option = f" Then: --{kind.option}=NAME" if kind.option else ""
            close = f" {hint}{option}" if hint.startswith("Did") else ""
            what = f"its samples are treated as having no {name}" if name not in present else "its cells are treated as missing"
            issues.note(f"{path} has no column '{column}': {what}.{close}")
    complete = {name: kind for name, kind in present.items() if all(column in cells.columns for column in kind.columns)}
    return {**complete, **opaque} if present else dict(inputs)


# Errors that concern the whole file


def known_splits(path: str, column: str, splits: Sequence[str | None]) -> Column[str | None]:
    cells = Column.of(splits)
    unknown = sorted(cell for cell in cells.coded()[0] if cell and cell.casefold() not in SPLIT_NAMES)
    if unknown:
        shown = listed([f"'{cell}'" for cell in unknown])
        raise UserError(
            f"{path}: column '{column}' has unknown splits: {shown}. Known: {', '.join(SPLIT_NAMES)}. "
            "To ignore the column: --data.columns.split=null"
        )
    return cells.map(lambda cell: SPLIT_NAMES[cell.casefold()])


def reject_other_splits(path: str, column: str, table: Table, split: str) -> None:
    """Raises UserError where a file that was given for a split has rows of another."""
    given = zip(table.rows, table.splits, strict=True)
    others = [(row, cell) for row, cell in given if SPLIT_NAMES.get(str(cell).casefold(), split) != split]
    if others:
        row, cell = others[0]
        raise UserError(
            f"{path} is given for {split}, but {len(others):,} of its rows name another split (the first: row {row}, '{cell}' in column "
            f"'{column}'). Remove them, or ignore the column in all files: --data.columns.split=null"
        )


def reject_repeated_ids(path: str, column: str | None, table: Table) -> None:
    if len(set(table.ids)) == len(table):
        return
    rows = defaultdict(list)
    for id, row in zip(table.ids, table.rows, strict=True):
        rows[id].append(row)
    repeated = [f"'{id}' in rows {listed([str(row) for row in same])}" for id, same in rows.items() if len(same) > 1]
    raise UserError(
        f"{path}: {len(repeated):,} ids are used more than once, but an id names one sample: {listed(repeated, '; ')}. "
        f"If column '{column}' is not meant as ids: --data.columns.id=null, or another: --data.columns.id=NAME"
    )


def reject_missing_columns(
    path: str, cells: Cells, columns: Columns, inputs: Mapping[str, Kind], *, need_label: bool, need_split: bool, trains: bool
) -> None:
    """Raises UserError for all required columns that are missing, in one message. trains: for training, where an input can be omitted."""
    flaws = []
    for name, kind in inputs.items():
        others = [other for other in inputs if other != name]
        without = f", or train without it: fit --model.modalities=[{','.join(others)}]" if trains and others else ""
        for column in kind.columns:
            if column in cells.columns:
                continue
            if column in cells.opaque:
                flaws.append(f"has {cells.opaque[column]} in column '{column}', expected text{' (paths)' if kind.noun == 'image' else ''}")
            else:
                what = f"{name}s" if kind.option.startswith("data.columns") else name
                several = f"[{','.join(kind.columns)}]" if kind.column_option == "columns" else "NAME"
                flaws.append(f"{no_column(cells, column, what, kind.option and f'--{kind.option}={several}')}{without}")
    required = []
    if need_label:
        # A column that the user has named is not optional. (Prediction, though, needs only the inputs.)
        optional = ["id", "group", *(["split"] if need_split else [])]
        required = ["label", *(role for role in optional if getattr(columns, role) not in (None, getattr(Columns, role)))]
    for role in required:
        for column in columns.targets if role == "label" else [getattr(columns, role)]:
            if column in cells.opaque:
                flaws.append(f"has {cells.opaque[column]} in column '{column}', expected text")
            elif column not in cells.columns:
                flaws.append(no_column(cells, column, f"{role}s", f"--data.columns.{role}=NAME"))
    if flaws:
        names = [f"'{name}'" for name in cells.columns]
        raise UserError(f"{path} {'; it '.join(flaws)}. Its columns: {listed(names, most=20)}{hint_of_separator(cells)}")


def no_column(cells: Cells, column: str, what: str, option: str) -> str:
    hint = nearest(column, cells.columns)
    close = f" {hint}" if hint.startswith("Did") else ""
    other = f" Another name: {option}" if option else ""
    return f"has no column '{column}' for the {what}.{close}{other}"


def hint_of_separator(cells: Cells) -> str:
    """The option for another separator, if the name of a column contains one."""
    present = [separator for separator in SEPARATORS if any(separator in name for name in cells.columns)]
    options = " or ".join("--data.format.separator='{}'".format("\\t" if separator == "\t" else separator) for separator in present)
    return f". If a name there is several: {options}" if present else ""


def listed(items: Sequence[str], separator: str = ", ", most: int = MAX_SHOWN) -> str:
    return separator.join(items[:most]) + (f"{separator}... ({len(items) - most:,} more)" if len(items) > most else "")
