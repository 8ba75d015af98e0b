"""Rows of a manifest through a trained model; those whose image can't be read are told, not guessed."""

from typing import Any

from fusion.data.images import ImageError, decode
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
        pictures: list[Any] = []
        rows: list[int] = []
        for i in range(start, min(start + batch_size, len(table))):
            try:
                pictures.append(picture_of(predictor, table.images[i]))
            except ImageError as error:
                ledger.add(table.files[i], table.rows[i], table.ids[i], image_issue(str(error), str(table.images[i])))
            else:
                rows.append(i)
        if rows:
            outputs.append(predictor.ask({"image": pictures, "text": [table.texts[i] for i in rows]}))
        kept += rows
    if not kept:
        raise UserError(
            f"none of the {len(table)} samples can be read; the first: {ledger.issues[0].reason if ledger.issues else 'no rows'}"
        )
    return table.take(kept), predictor.gather(outputs)


def picture_of(predictor: Predictor, path: str | None) -> Any:
    """The decoded picture of a row, None where it has none or the model doesn't look. Raises ImageError."""
    if path is None or predictor.processor.image is None:
        return None
    return decode(path, max_megapixels=predictor.processor.image.max_megapixels, at_least=predictor.processor.image.size)
