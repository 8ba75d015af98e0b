"""Predictions and scores of a trained model for the rows of a manifest; unreadable samples are skipped and listed."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fusion.console import Heartbeat, print_rank_zero
from fusion.data import FusionData
from fusion.data.format import Format
from fusion.data.issues import DataIssues
from fusion.data.kinds import Kind
from fusion.data.kinds.image import image_issue
from fusion.data.record import CELL, DIGEST, FILE, Record
from fusion.data.table import Columns, Table, read_table
from fusion.errors import UserError, nearest
from fusion.evaluation import scores_by_group
from fusion.predictions import Output
from fusion.predictor import Predictor, model_of
from fusion.processing.images import ImageError
from fusion.settings.reading import data_of, inputs_for, reading_of
from fusion.tasks import Task
from fusion.tasks.metrics import Pairs, retrieval_ranks, retrieval_scores

Outputs = list[Output]


class Evaluation(NamedTuple):
    """scores: the task's scores of all samples ("all") and by group. classes: scores of each class or label by itself, where requested.
    unseen: number of samples with a class that never occurred in training. issues: the skipped samples.
    """

    scores: dict[str, dict[str, float]]
    task: Task
    classes: dict[str, dict[str, float]]
    samples: int
    unseen: int
    issues: DataIssues


def evaluate_run(
    run: Path,
    *,
    split: str = "test",
    manifest: str | None = None,
    by: str = "",
    checkpoint: str = "best",
    batch_size: int = 256,
    reading: Sequence[str] = (),
    by_class: bool = False,
    rerank: int = 0,
) -> Evaluation:
    """Score a run on one of its splits, or on another manifest with labels.

    by: column by which samples are grouped. reading: options of fit that describe the manifest. by_class: whether each class is scored by
    itself, too. rerank: number of first candidates that the matcher of a retrieval run orders anew, the scores of which are added as a
    group, 0 for none. Raises UserError if split, column or checkpoint doesn't exist, or the task has no classes, or no matcher.
    """
    data = data_of(run)
    data.issues = issues = DataIssues("drop")  # printed at the end; the run's on_bad_sample concerns training only
    predictor = load_for(run, checkpoint, issues)
    task = predictor.processor.task
    if by_class and type(task).class_scores is Task.class_scores:
        raise UserError(f"{type(task).__name__} has no classes to be scored by themselves; leave out --classes")
    if rerank:
        reject_unmatched(predictor)
    data.columns, data.format = reading_of(run, reading)
    inputs = inputs_for(predictor, data.columns, run)
    of_run = manifest is None
    table = split_of(run, data, inputs, task, split) if of_run else rows_of(str(manifest), data.columns, data.format, inputs, issues, task)
    if by:
        column(table, data.columns, by)  # rejects an unknown column before predicting
    table, outputs = predict_rows(predictor, table, issues, batch_size)
    groups = column(table, data.columns, by) if by else None
    values = torch.from_numpy(np.concatenate([values for values, _ in outputs]))
    scores = scores_by_group(task, values, table.labels, groups)
    if rerank:
        scores[f"first {rerank} re-ranked"] = reranked_scores(predictor, table, values, rerank) | {"samples": len(table)}
    classes = task.class_scores(values, torch.from_numpy(task.encode(table.labels))) if by_class else {}
    return Evaluation(scores, task, classes, len(table), task.unseen(table.labels), issues)


def load_for(run: Path, checkpoint: str, issues: DataIssues, trusted: Sequence[str] | None = None) -> Predictor:
    """The model of a run. Adds a note to the issues if the last checkpoint is used for want of a best one. trusted: as for
    Predictor.load."""
    path, note = model_of(run, checkpoint)
    if note:
        issues.note(note)
    return Predictor.from_file(path, trusted=trusted)


def run_rows(run: Path, predictor: Predictor, split: str, issues: DataIssues) -> Table:
    """The samples of a run's split. Raises UserError for a run whose folder has no data, and a split that isn't there."""
    data = data_of(run)
    data.issues = issues
    data.columns, data.format = reading_of(run, [])
    return split_of(run, data, inputs_for(predictor, data.columns, run), predictor.processor.task, split)


def rows_of(manifest: str, columns: Columns, format: Format, inputs: Mapping[str, Kind], issues: DataIssues, task: Task | None) -> Table:
    """Read a manifest for prediction or, with a task, for scoring. Columns of modalities may be missing; a split column is ignored."""
    columns = replace(columns, split=None)
    return read_table(manifest, columns, inputs, task=task, issues=issues, format=format, need_all_inputs=False)


def predict_rows(predictor: Predictor, table: Table, issues: DataIssues, batch_size: int) -> tuple[Table, Outputs]:
    """The readable rows of the table, and the model's outputs for them: for each batch values (B, K) and the presence of each modality."""
    outputs: Outputs = []
    readable_rows: list[int] = []
    sign = Heartbeat()
    for start in range(0, len(table), batch_size):
        if sign.due():
            print_rank_zero(f"{start:,} of {len(table):,} samples predicted")
        rows = range(start, min(start + batch_size, len(table)))
        unreadable: dict[int, tuple[str, UserError]] = {}
        columns = {name: list(cells[start : start + batch_size]) for name, cells in table.inputs.items()}
        values, present = predictor.predict_batch(columns, unreadable)
        for position, (name, error) in unreadable.items():
            i = rows[position]
            reason = image_issue(str(error), table.inputs[name][i]) if isinstance(error, ImageError) else str(error)
            issues.add(table.files[i], table.rows[i], table.ids[i], reason)
        readable = [position for position in range(len(rows)) if position not in unreadable]
        outputs.append((values[readable], {name: mask[readable] for name, mask in present.items()}))
        readable_rows += [rows[position] for position in readable]
    if not readable_rows:
        raise UserError(
            f"none of the {len(table)} samples can be read; the first: {issues.dropped[0].reason if issues.dropped else 'no rows'}"
        )
    return table.take(readable_rows), outputs


def reject_unmatched(predictor: Predictor) -> None:
    """Raises UserError for a model without a matcher."""
    if getattr(predictor.model.head, "matcher", None) is None:
        raise UserError("this run has no matcher to re-rank with; train one by --model.head.matcher=CrossAttention")


def reranked_scores(predictor: Predictor, table: Table, values: Tensor, first: int) -> dict[str, float]:
    """The scores of a retrieval run after its matcher has ordered the first candidates of every query anew."""
    task: Any = predictor.processor.task
    target = torch.from_numpy(task.encode(table.labels))
    left, right = values.chunk(2, dim=1)
    pairs = Pairs.of(left, right, target)
    head: Any = predictor.model.head
    sides = list(head.sides.values())
    ranks = []
    for query, rank in enumerate(retrieval_ranks(pairs)):
        (own, others), (of_own, of_others) = (
            (one, other) if query == 0 else (other, one) for one, other in ((pairs.lefts, pairs.rights), (pairs.left, pairs.right))
        )
        rows = [first_of_each(target[:, side]) for side in (query, 1 - query)]
        right_ones: dict[int, set[int]] = {}
        for one, other in zip(of_own.tolist(), of_others.tolist(), strict=True):
            right_ones.setdefault(one, set()).add(other)
        found = rank.clone()
        for q in range(len(own)):
            best = (own[q] @ others.T).topk(min(first, len(others))).indices.tolist()
            if not right_ones[q] & set(best):
                continue
            columns = {name: [table.inputs[name][rows[0][q]]] * len(best) for name in sides[query]}
            columns |= {name: [table.inputs[name][rows[1][other]] for other in best] for name in sides[1 - query]}
            logits = predictor.match(columns)
            is_right = torch.tensor([other in right_ones[q] for other in best])
            found[q] = 1 + int((logits[~is_right] >= logits[is_right].max()).sum())
        ranks.append(found)
    return {name: float(score) for name, score in retrieval_scores((ranks[0], ranks[1]), task.sides).items()}


def first_of_each(items: Tensor) -> list[int]:
    """The first row of each distinct item, in the order of the items."""
    first: dict[int, int] = {}
    for row, item in enumerate(items.tolist()):
        first.setdefault(item, row)
    return [first[item] for item in sorted(first)]


def print_issues(issues: DataIssues, path: Path) -> None:
    """Write the skipped samples to a file, and print their summary and the notes."""
    if issues.dropped:
        issues.write(path)
        print(f"warning: {issues.summary().replace('data_issues.csv', str(path))}")
    else:
        path.unlink(missing_ok=True)  # from an earlier call
    for note in issues.notes:
        print(f"note: {note}")


def split_of(run: Path, data: FusionData, inputs: Mapping[str, Kind], task: Task, split: str) -> Table:
    """The samples that the run had in this split, looked up in the current manifest; changes are noted in the issues."""
    record = Record.read(run)
    if record is None:
        data.issues.note(f"{run} has no {FILE}: samples are assigned to splits again, following its recipe")
        table = data.split_table(inputs, task)
    else:
        table = data.table(inputs, task)
        now = Record.of(table, {})
        matches = record.match(now)
        moved = {name: cells for name in table.kinds if (cells := moved_files(record, now, matches, table, name))}
        if moved:  # files may have been moved or renamed
            now = Record.of(table, {name: table.kinds[name].digests_now(cells) for name, cells in moved.items()})
            matches = record.match(now)
        changes = record.difference(
            now, matches, images=False, carved=True
        ).sentences  # files are compared below, for the scored samples only
        if changes:
            rule = "Rows keep their earlier split; new rows have none"
            data.issues.note(f"the table has changed since the run was trained: {'; '.join(changes)}. {rule}")
        table.splits = [None if row is None else record.columns["split"][row] for row in matches]
        earlier = record.columns["split"].count(split)
        if earlier and split not in table.splits:
            raise UserError(f"none of the {earlier:,} rows of the run's split '{split}' is in its table any more: {'; '.join(changes)}")
    splits = sorted({str(s) for s in table.splits if s})
    if split not in splits:
        raise UserError(f"the run's data has no split '{split}'. {nearest(split, splits)}")
    chosen = [i for i, s in enumerate(table.splits) if s == split]
    if record is not None:
        note_changed_files(record, table, [(i, matches[i]) for i in chosen], data.issues)
    return table.take(chosen)


def moved_files(record: Record, now: Record, matches: Sequence[int | None], table: Table, name: str) -> list[Any]:
    """The cells of an input whose files are not at the recorded paths; empty if all recorded paths still occur."""
    recorded, current = record.columns.get(f"{CELL}{name}", []), now.columns[f"{CELL}{name}"]
    cells = table.inputs[name]
    moved = [cell for i, cell in enumerate(cells) if cell and (matches[i] is None or recorded[matches[i]] != current[i])]  # type: ignore[index]
    return moved if set(recorded) - set(current) else []


def note_changed_files(record: Record, table: Table, pairs: list[tuple[int, int | None]], issues: DataIssues) -> None:
    """Note files whose contents have changed since the run was trained. pairs: for each sample its row now and its row in the record."""
    for name, kind in table.kinds.items():
        digests, cells = record.columns.get(f"{DIGEST}{name}", []), table.inputs[name]
        then = {cells[i]: digests[row] for i, row in pairs if row is not None and cells[i] is not None and digests}
        now = kind.digests_now(cell for cell, digest in then.items() if digest)
        changed = [cell for cell, digest in now.items() if digest != then[cell]]
        if changed:
            issues.note(f"{len(changed):,} {name} files have changed since the run was trained (the first: {changed[0]})")


def column(table: Table, columns: Columns, name: str) -> list[str]:
    """A column of the manifest, by its name or its role."""
    known: dict[str, Sequence[Any]] = {"label": table.labels, "group": table.groups, "split": table.splits, "id": table.ids}
    known |= table.by_name(columns)
    if name not in known:
        raise UserError(f"--by: the manifest has no column '{name}'. {nearest(name, known)}")
    return ["" if cell is None else str(cell) for cell in known[name]]
