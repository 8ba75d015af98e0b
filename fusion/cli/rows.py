"""Rows of a manifest through a trained model; those whose image can't be read are listed, not guessed."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from fusion.console import SignOfLife, print_rank_zero
from fusion.data.format import Format
from fusion.data.images import ImageError
from fusion.data.kinds import Kind
from fusion.data.kinds.image import image_issue
from fusion.data.ledger import Ledger
from fusion.data.table import Columns, Table, read_table
from fusion.errors import UserError
from fusion.predictor import Predictor, checkpoint_of
from fusion.tasks import Task

Outputs = list[tuple[Tensor, dict[str, Tensor]]]


def load_for(run: Path, checkpoint: str, ledger: Ledger) -> Predictor:
    """The model of a run; a note in the ledger where its last checkpoint stands in for a best one."""
    path, note = checkpoint_of(run, checkpoint)
    if note:
        ledger.note(note)
    return Predictor.load(path)


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
