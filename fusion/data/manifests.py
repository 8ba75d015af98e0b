"""The manifests of a run: one for all, or files of their own for validation and test. Every row keeps the split that it was given."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from fusion.data.format import Format
from fusion.data.kinds import Kind
from fusion.data.ledger import Ledger
from fusion.data.table import Columns, Table, read_table
from fusion.errors import UserError
from fusion.tasks import Task


def read_manifests(
    main: str, own: dict[str, str | None], columns: Columns, inputs: Mapping[str, Kind], task: Task, *, format: Format, ledger: Ledger
) -> Table:
    """All readable rows of all files, each with the split that its file or its cell gives it, None where neither does.

    inputs: those that are read. task: which targets can be used. own: "val" and "test" -> a file of its own for that split, or None. A file
    may stand for more than one; that is noted in the ledger.

    Raises UserError where a file and its cells contradict each other, and where `main` gives rows to a split that has a file of its own.
    """
    files = [(None, main), *((split, file) for split, file in own.items() if file)]
    tables: list[Table] = []
    for i, (split, file) in enumerate(files):
        seen = any(same_file(file, earlier) for _, earlier in files[:i])
        issues = Ledger("drop") if seen else ledger  # each bad row is listed once
        tables.append(read_table(file, columns, inputs, task=task, ledger=issues, split=split, format=format))
    refuse_two_sources(tables[0], main, own)
    note_shared_files(files, ledger)
    if len(tables) > 1:
        # Not left open: a row that shares its group with a row of another file would follow it there.
        tables[0].splits = [split or "train" for split in tables[0].splits]
        # Ids need only be unique in each file.
        stems = [Path(file).stem for _, file in files]
        names = stems if len(set(stems)) == len(stems) else [split or "train" for split, _ in files]
        for name, table in zip(names, tables, strict=True):
            table.ids = [f"{name}-{id}" for id in table.ids]
    return Table.concat(tables)


def same_file(one: str, other: str) -> bool:
    return Path(one).resolve() == Path(other).resolve()


def refuse_two_sources(table: Table, main: str, own: dict[str, str | None]) -> None:
    for split, file in own.items():
        rows = [row for row, given in zip(table.rows, table.splits, strict=True) if given == split]
        if file and rows:
            raise UserError(
                f"{main} gives {len(rows):,} rows to {split} (the first: row {rows[0]}), and --data.{split}_manifest={file} is a file of "
                f"its own for {split}. Leave out one of the two: the option, or the column (--data.columns.split=null)"
            )


def note_shared_files(files: Sequence[tuple[str | None, str]], ledger: Ledger) -> None:
    shares = {
        ("train", "val"): "validation samples are trained on: their scores, by which the best checkpoint is chosen, say nothing of new "
        "samples; and a test split carved out of the same file is validated on",
        ("train", "test"): "test samples are trained on, or validated on where that split is carved out of the same file: their scores say "
        "nothing of new samples",
        ("val", "test"): "the best checkpoint is chosen on the samples that it is tested on: test scores are too high",
    }
    for i, (split, file) in enumerate(files):
        for other, earlier in files[:i]:
            if same_file(file, earlier):
                ledger.note(f"{file} is given for {other or 'train'} and for {split}; {shares[other or 'train', str(split)]}")
