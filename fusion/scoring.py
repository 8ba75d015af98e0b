"""Rows of a manifest through a trained model, and a run's scores on them; what can't be read is listed, not guessed."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusion.console import SignOfLife, print_rank_zero
from fusion.data import FusionData
from fusion.data.format import Format
from fusion.data.images import ImageError
from fusion.data.kinds import Kind
from fusion.data.kinds.image import image_issue
from fusion.data.ledger import Ledger
from fusion.data.record import CELL, DIGEST, FILE, Record
from fusion.data.table import Columns, Table, read_table
from fusion.errors import UserError, nearest
from fusion.evaluation import scores_by_group
from fusion.predictor import Predictor, model_of
from fusion.settings.reading import data_of, inputs_for, reading_of
from fusion.tasks import Task

Outputs = list[tuple[Tensor, dict[str, Tensor]]]


class Evaluation(NamedTuple):
    """scores: by "all" and group, of the task. unseen: samples with a class that never occurred in training. ledger: what was left out."""

    scores: dict[str, dict[str, float]]
    task: Task
    samples: int
    unseen: int
    ledger: Ledger


def evaluate_run(
    run: Path,
    *,
    split: str = "test",
    manifest: str | None = None,
    by: str = "",
    checkpoint: str = "best",
    batch_size: int = 256,
    reading: Sequence[str] = (),
) -> Evaluation:
    """Score a run on one of its splits, or on another manifest with labels.

    by: a column to score by. reading: options of fit that say how the manifest is written. Raises UserError for what isn't there.
    """
    data = data_of(run)
    data.ledger = ledger = Ledger("drop")  # told at the end; the run's on_bad_sample was for training, and is no option here
    predictor = load_for(run, checkpoint, ledger)
    task = predictor.processor.task
    data.columns, data.format = reading_of(run, reading)
    inputs = inputs_for(predictor, data.columns, run)
    of_run = manifest is None
    table = split_of(run, data, inputs, task, split) if of_run else rows_of(str(manifest), data.columns, data.format, inputs, ledger, task)
    if by:
        column(table, data.columns, by)  # refused now rather than after the predictions
    table, outputs = predict_rows(predictor, table, ledger, batch_size)
    groups = column(table, data.columns, by) if by else None
    scores = scores_by_group(task, torch.cat([values for values, _ in outputs]), table.labels, groups)
    return Evaluation(scores, task, len(table), task.unseen(table.labels), ledger)


def load_for(run: Path, checkpoint: str, ledger: Ledger) -> Predictor:
    """The model of a run; a note in the ledger where its last checkpoint stands in for a best one."""
    path, note = model_of(run, checkpoint)
    if note:
        ledger.note(note)
    return Predictor.from_file(path)


def rows_of(manifest: str, columns: Columns, format: Format, inputs: Mapping[str, Kind], ledger: Ledger, task: Task | None) -> Table:
    """The rows of a manifest to be predicted, or scored by a task. It need not have the columns of all modalities, and is of no split."""
    columns = replace(columns, split=None)
    return read_table(manifest, columns, inputs, task=task, ledger=ledger, format=format, need_all_inputs=False)


def predict_rows(predictor: Predictor, table: Table, ledger: Ledger, batch_size: int) -> tuple[Table, Outputs]:
    """The rows whose image could be read, and what the model gives for them: by batch values (B, K), and presence by modality."""
    outputs: Outputs = []
    kept: list[int] = []
    sign = SignOfLife()
    for start in range(0, len(table), batch_size):
        if sign.due():
            print_rank_zero(f"{start:,} of {len(table):,} samples predicted")
        rows = range(start, min(start + batch_size, len(table)))
        unreadable: dict[int, tuple[str, UserError]] = {}
        columns = {name: [cells[i] for i in rows] for name, cells in table.inputs.items()}
        values, present = predictor.ask(columns, unreadable)
        for place, (name, error) in unreadable.items():
            i = rows[place]
            reason = image_issue(str(error), table.inputs[name][i]) if isinstance(error, ImageError) else str(error)
            ledger.add(table.files[i], table.rows[i], table.ids[i], reason)
        readable = [place for place in range(len(rows)) if place not in unreadable]
        outputs.append((values[readable], {name: there[readable] for name, there in present.items()}))
        kept += [rows[place] for place in readable]
    if not kept:
        raise UserError(
            f"none of the {len(table)} samples can be read; the first: {ledger.issues[0].reason if ledger.issues else 'no rows'}"
        )
    return table.take(kept), outputs


def print_issues(ledger: Ledger, path: Path) -> None:
    """What was left out, listed in a file, and what was noted."""
    if ledger.issues:
        ledger.write(path)
        print(f"warning: {ledger.summary().replace('data_issues.csv', str(path))}")
    else:
        path.unlink(missing_ok=True)  # of the last time
    for note in ledger.notes:
        print(f"note: {note}")


def split_of(run: Path, data: FusionData, inputs: Mapping[str, Kind], task: Task, split: str) -> Table:
    """The samples that the run had in this split, found again in its manifest of today; what has changed is noted."""
    record = Record.read(run)
    if record is None:
        data.ledger.note(f"{run} has no {FILE}: which sample was in which split is found anew, as its recipe says")
        table = data.split_table(inputs, task)
    else:
        table = data.table(inputs, task)
        now = Record.of(table, {})
        found = record.match(now)
        moved = {name: unlike for name in table.kinds if (unlike := moved_files(record, now, found, table, name))}
        if moved:  # files may have been moved or renamed
            now = Record.of(table, {name: table.kinds[name].digests_now(cells) for name, cells in moved.items()})
            found = record.match(now)
        changes = record.difference(now, found, images=False).sentences  # files are compared of those samples alone that are scored
        if changes:
            kept = "Rows keep the split that they had; new ones have none"
            data.ledger.note(f"the table has changed since the run was trained: {'; '.join(changes)}. {kept}")
        table.splits = [None if row is None else record.columns["split"][row] for row in found]
        had = record.columns["split"].count(split)
        if had and split not in table.splits:
            raise UserError(f"none of the {had:,} rows of the run's split '{split}' is in its table any more: {'; '.join(changes)}")
    there = sorted({str(s) for s in table.splits if s})
    if split not in there:
        raise UserError(f"the run's data has no split '{split}'. {nearest(split, there)}")
    chosen = [i for i, s in enumerate(table.splits) if s == split]
    if record is not None:
        note_changed_files(record, table, [(i, found[i]) for i in chosen], data.ledger)
    return table.take(chosen)


def moved_files(record: Record, now: Record, found: Sequence[int | None], table: Table, name: str) -> list[Any]:
    """The cells of an input with files that are not where the record has them, unless all that it has are there."""
    then, since = record.columns.get(f"{CELL}{name}", []), now.columns[f"{CELL}{name}"]
    cells = table.inputs[name]
    unlike = [cell for i, cell in enumerate(cells) if cell and (found[i] is None or then[found[i]] != since[i])]  # type: ignore[index]
    return unlike if set(then) - set(since) else []


def note_changed_files(record: Record, table: Table, pairs: list[tuple[int, int | None]], ledger: Ledger) -> None:
    for name, kind in table.kinds.items():
        digests, cells = record.columns.get(f"{DIGEST}{name}", []), table.inputs[name]
        then = {cells[i]: digests[here] for i, here in pairs if here is not None and cells[i] is not None and digests}
        now = kind.digests_now(cell for cell, digest in then.items() if digest)
        changed = [cell for cell, digest in now.items() if digest != then[cell]]
        if changed:
            ledger.note(f"{len(changed):,} {name} files have changed since the run was trained (the first: {changed[0]})")


def column(table: Table, columns: Columns, name: str) -> list[str]:
    """A column of the manifest by its name there, or by its role."""
    known: dict[str, Sequence[Any]] = {"label": table.labels, "group": table.groups, "split": table.splits, "id": table.ids}
    known |= table.by_name(columns)
    if name not in known:
        raise UserError(f"--by: the manifest has no column '{name}'. {nearest(name, known)}")
    return ["" if cell is None else str(cell) for cell in known[name]]
