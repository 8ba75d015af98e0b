"""Reads the manifests of a run: one for all splits, or separate files for validation and test. Given splits are preserved."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from fusion.data.format import Format
from fusion.data.issues import DataIssues
from fusion.data.kinds import Kind
from fusion.data.table import Columns, Table, read_table
from fusion.errors import UserError
from fusion.tasks import Task


def read_manifests(
    main: str, own: dict[str, str | None], columns: Columns, inputs: Mapping[str, Kind], task: Task, *, format: Format, issues: DataIssues
) -> Table:
    """All usable samples of all files, each with the split given by its file or its cell, None where neither gives one.

    inputs: the inputs to read. task: decides which targets are usable. own: "val" and "test" -> a separate file for that split, or None.
    The same file may be given for several splits; that is noted in the issues.

    Raises UserError where a file and its cells contradict each other, and where `main` gives rows to a split that has a separate file.
    """
    files = [(None, main), *((split, file) for split, file in own.items() if file)]
    tables: list[Table] = []
    for i, (split, file) in enumerate(files):
        seen = any(same_file(file, earlier) for _, earlier in files[:i])
        own_issues = DataIssues("drop") if seen else issues  # each bad row is listed once
        tables.append(read_table(file, columns, inputs, task=task, issues=own_issues, split=split, format=format))
    reject_two_sources(tables[0], main, own)
    note_files_of_several_splits(files, issues)
    if len(tables) > 1:
        # Set to train, since a sample without split would otherwise follow its group into another file's split.
        tables[0].splits = [split or "train" for split in tables[0].splits]
        # Ids need only be unique within each file.
        stems = [Path(file).stem for _, file in files]
        names = stems if len(set(stems)) == len(stems) else [split or "train" for split, _ in files]
        for name, table in zip(names, tables, strict=True):
            table.ids = [f"{name}-{id}" for id in table.ids]
    return Table.concat(tables)


def same_file(one: str, other: str) -> bool:
    return Path(one).resolve() == Path(other).resolve()


def reject_two_sources(table: Table, main: str, own: dict[str, str | None]) -> None:
    for split, file in own.items():
        rows = [row for row, given in zip(table.rows, table.splits, strict=True) if given == split]
        if file and rows:
            raise UserError(
                f"{main} gives {len(rows):,} rows to {split} (the first: row {rows[0]}), and --data.{split}_manifest={file} is a "
                f"separate file for {split}. Leave out one of the two: the option, or the column (--data.columns.split=null)"
            )


def note_files_of_several_splits(files: Sequence[tuple[str | None, str]], issues: DataIssues) -> None:
    consequences = {
        ("train", "val"): "validation samples are trained on: their scores, by which the best checkpoint is chosen, say nothing about new "
        "samples; and a test split carved out of the same file is validated on",
        ("train", "test"): "test samples are trained on, or validated on where that split is carved out of the same file: their scores say "
        "nothing about new samples",
        ("val", "test"): "the best checkpoint is chosen on the samples that it is tested on: test scores are too high",
    }
    for i, (split, file) in enumerate(files):
        for other, earlier in files[:i]:
            if same_file(file, earlier):
                issues.note(f"{file} is given for {other or 'train'} and for {split}; {consequences[other or 'train', str(split)]}")
