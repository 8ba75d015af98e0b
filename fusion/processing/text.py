"""Texts of samples as arrays."""

from collections.abc import Sequence
from typing import Any, Self

import numpy as np

from fusion.errors import UserError
from fusion.processing.preprocessor import Preprocessor, TextArrays
from fusion.processing.raw_columns import text_column
from fusion.processing.tokenizer import Tokenizer


class TextPreprocessor(Preprocessor):
    """Tokenizes texts.

    Args:
        tokenizer: that of the model.
    """

    form = "text"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def raw(self, values: Any, name: str) -> list[Any]:
        return text_column(values, name)

    def batch(self, cells: Sequence[Any], unreadable: dict[int, UserError]) -> TextArrays:
        return self.tokenizer.encode(cells).batch(np.arange(len(cells)), self.tokenizer.pad_id)

    def concat(self, parts: Sequence[TextArrays]) -> TextArrays:
        count, longest = sum(len(part.ids) for part in parts), max(part.ids.shape[1] for part in parts)
        ids, mask = np.full((count, longest), self.tokenizer.pad_id, dtype=np.int64), np.zeros((count, longest), dtype=bool)
        row = 0
        for part in parts:
            rows, length = slice(row, row + len(part.ids)), part.ids.shape[1]
            ids[rows, :length], mask[rows, :length] = part.ids, part.mask
            row += len(part.ids)
        return TextArrays(ids, mask)

    def state(self) -> dict[str, Any]:
        return {"tokenizer": self.tokenizer.state()}

    @classmethod
    def of_state(cls, state: dict[str, Any]) -> Self:
        return cls(Tokenizer.from_state(state["tokenizer"]))
