"""Rows of a manifest through a trained model; those whose image can't be read are told, not guessed."""

from typing import Any

from fusion.data.images import ImageError
from fusion.data.ledger import Ledger
from fusion.data.module import image_issue
from fusion.data.table import Table
from fusion.errors import UserError
from fusion.predictor import Predictions, Predictor


def predict_rows(predictor: Predictor, table: Table, ledger: Ledger, batch_size: int) -> tuple[Table, Predictions]:
    """The rows whose image could be read, and their predictions."""
    outputs: list[Any] = []
    kept: list[int] = []
    for start in range(0, len(table), batch_size):
        rows = range(start, min(start + batch_size, len(table)))
        unreadable: dict[int, ImageError] = {}
        columns = {"image": [table.images[i] for i in rows], "text": [table.texts[i] for i in rows]}
        probabilities, present = predictor.ask(columns, unreadable)
        for place, error in unreadable.items():
            i = rows[place]
            ledger.add(table.files[i], table.rows[i], table.ids[i], image_issue(str(error), str(table.images[i])))
        readable = [place for place in range(len(rows)) if place not in unreadable]
        outputs.append((probabilities[readable], {name: there[readable] for name, there in present.items()}))
        kept += [rows[place] for place in readable]
    if not kept:
        raise UserError(
            f"none of the {len(table)} samples can be read; the first: {ledger.issues[0].reason if ledger.issues else 'no rows'}"
        )
    return table.take(kept), predictor.gather(outputs)
