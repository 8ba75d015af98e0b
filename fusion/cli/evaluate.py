"""fusion evaluate: score a run on any split or manifest, also by group."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fusion.cli.options import Options, above_zero
from fusion.cli.reading import HELP, data_of, inputs_for, reading_of, reading_options
from fusion.cli.rows import load_for, predict_rows, print_issues, rows_of
from fusion.console import aligned
from fusion.data import FusionData
from fusion.data.kinds import Kind
from fusion.data.ledger import Ledger
from fusion.data.record import CELL, DIGEST, FILE, Record
from fusion.data.table import Columns, Table
from fusion.errors import UserError, nearest
from fusion.evaluation import scores_by_group
from fusion.tasks import Task

UNFIT = r'[/\\:*?"<>|\0]'  # for the name of a file


def evaluate(arguments: Sequence[str]) -> int:
    """Run the command; gives the exit status."""
    options = Options("fusion evaluate", f"Score a run on one of its splits, or on another manifest. {HELP}")
    options.add_argument("--run", required=True, help="run folder that fit printed")
    options.add_argument("--split", help="train, val or test, of the run's own data; test if neither is given")
    options.add_argument("--manifest", help="another manifest with labels, instead of a split")
    options.add_argument("--by", help="column of the manifest to score by")
    options.add_argument("--checkpoint", default="best", help="best or last")
    options.add_argument("--batch_size", type=above_zero, default=256)
    own, reading = reading_options(arguments)
    asked = options.parse_args(own)
    if asked.manifest and asked.split:
        raise UserError("give --split, of the run's own data, or --manifest, of which every row is scored; not both")
    asked.split = asked.split or "test"
    run = Path(asked.run).expanduser()
    data = data_of(run)
    data.ledger = ledger = Ledger("drop")  # told at the end; the run's on_bad_sample was for training, and is no option here
    predictor = load_for(run, asked.checkpoint, ledger)
    task = predictor.processor.task
    data.columns, data.format = reading_of(run, reading)
    inputs = inputs_for(predictor, data.columns, run)
    if asked.manifest:
        table = rows_of(asked.manifest, data.columns, data.format, inputs, ledger, task)
    else:
        table = split_of(run, data, inputs, task, asked.split)
    if asked.by:
        column(table, data.columns, asked.by)  # refused now rather than after the predictions
    table, outputs = predict_rows(predictor, table, ledger, asked.batch_size)
    groups = column(table, data.columns, asked.by) if asked.by else None
    scores = scores_by_group(task, torch.cat([values for values, _ in outputs]), table.labels, groups)
    title = asked.manifest or asked.split
    rows = [[f"{asked.by or ''}", *task.headline, task.baseline, "samples"]]
    for name, found in scores.items():
        shown = [f"{found[key]:.4f}" if key in found else "" for key in (*task.headline.values(), task.baseline)]
        rows.append([name, *shown, f"{found['samples']:,}"])
    print(f"{title} of {asked.run}\n\n{aligned(rows)}")
    print(f"\n{task.baseline}: the {task.bounded} of the best single answer for all samples of the row")
    unseen = task.unseen(table.labels)
    if unseen:
        print(f"{unseen:,} samples ({unseen / len(table):.1%}) have a label that never occurred in training: always misses")
    print_issues(ledger, run / "evaluation_issues.csv")
    if not asked.manifest:
        by = f"-by-{re.sub(UNFIT, '_', asked.by)[:100]}" if asked.by else ""
        kept = run / f"evaluation-{asked.split}{by}.json"
        kept.write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
    return 0


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
