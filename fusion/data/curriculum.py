"""Curriculum learning: admits training samples by difficulty, the easy ones first."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fusion.data.samples import Samples
from fusion.data.table import Columns, Table
from fusion.errors import UserError, nearest

TEXT_LENGTH, LOSS = "text_length", "loss"


@dataclass
class Curriculum:
    """Train on the easiest share of the samples, which grows until it is all of them.

        linear: c(t) = start + (1 - start) t / full_at        root: c(t) = sqrt(start^2 + (1 - start^2) t / full_at)        at most 1

    t is the share of the training's updates that are done. Each update draws its samples uniformly from the admitted ones; an epoch that
    begins with all samples admitted visits each once, as without a curriculum.

    Source: Platanios et al. (2019), "Competence-based Curriculum Learning for Neural Machine Translation".

    Args:
        by: measure of difficulty: "text_length" (tokens), a column of the manifest with numbers, or "loss", the model's own.
        start: share of the samples that are admitted at first; above 0, up to 1.
        full_at: share of the training's updates after which all samples are admitted; above 0, up to 1.
        pacing: growth of the share in between, "linear" or "root" (see above).
        first_pass: for "loss", number of epochs on all samples after which it is measured, at least 1.
    """

    by: str
    start: float = 0.2
    full_at: float = 0.5
    pacing: Literal["linear", "root"] = "root"
    first_pass: int = 1

    def check(self) -> None:
        """Raises UserError for values out of range."""
        if not 0 < self.start <= 1 or not 0 < self.full_at <= 1:
            raise UserError(f"data.curriculum: start is {self.start}, full_at {self.full_at}; expected shares above 0, up to 1")
        if self.first_pass < 1:
            raise UserError(f"data.curriculum: first_pass is {self.first_pass}; expected at least one epoch")

    def share(self, progress: float) -> float:
        """The share of the samples that are admitted when this share of the updates is done.

        >>> [round(Curriculum("loss", start=0.2, full_at=0.5).share(t), 3) for t in (0.0, 0.25, 0.5, 1.0)]
        [0.2, 0.721, 1.0, 1.0]
        """
        t = min(1.0, progress / self.full_at)
        if self.pacing == "linear":
            return self.start + (1 - self.start) * t
        return math.sqrt(self.start**2 + (1 - self.start**2) * t)


def difficulty(curriculum: Curriculum, table: Table, samples: Samples) -> np.ndarray:
    """(len,) difficulty of each sample, by its text length or a column. Raises UserError where that is missing."""
    if curriculum.by == TEXT_LENGTH:
        lengths = [sizes for store in samples.stores.values() if (sizes := store.sizes()) is not None]
        if not lengths:
            raise UserError("data.curriculum.by is text_length, but the model reads no texts")
        return np.sum(lengths, axis=0)
    known = table.by_name(Columns())
    if curriculum.by not in known:
        raise UserError(
            f"data.curriculum.by: the manifest has no column '{curriculum.by}'. {nearest(curriculum.by, [TEXT_LENGTH, LOSS, *known])}"
        )
    values = np.empty(len(table))
    for i, cell in enumerate(known[curriculum.by]):
        try:
            values[i] = float(cell or "")
        except ValueError:
            values[i] = math.nan
        if math.isnan(values[i]):
            raise UserError(
                f"data.curriculum: {table.files[i]}, row {table.rows[i]}: column '{curriculum.by}' has '{cell}', expected a number"
            )
    return values


class Admission:
    """The schedule of admitted samples: the easiest first, in the same order on every rank.

    horizon: updates in the whole training. updates: updates in an epoch.
    """

    def __init__(self, curriculum: Curriculum, difficulty: np.ndarray | None, *, updates: int, horizon: int, batch_size: int) -> None:
        self.curriculum, self.updates, self.horizon, self.batch_size = curriculum, updates, horizon, batch_size
        self.set_difficulty(difficulty)

    def set_difficulty(self, values: np.ndarray | None) -> None:
        self.easiest = None if values is None else np.argsort(values, kind="stable")

    def samples(self, epoch: int, update: int) -> np.ndarray | None:
        """The samples that are admitted at an update of an epoch, easiest first; None for all."""
        if self.easiest is None:
            return None
        share = self.curriculum.share((epoch * self.updates + update) / self.horizon)
        count = max(self.batch_size, math.ceil(share * len(self.easiest)))
        return None if count >= len(self.easiest) else self.easiest[:count]
