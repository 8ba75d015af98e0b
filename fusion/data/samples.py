"""Samples in memory or on disk, and the batches made of them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fusion.data.kinds.base import Store
from fusion.data.sampler import PLACEHOLDER, Draw


class Batch(NamedTuple):
    """What a step gets: inputs by name; target (B, ...), as the task encodes it; row (B,) int64 in the split, -1 where not to be counted.

    update_target (G, ...): the targets of all samples of the update, of which a training batch holds this rank's share of one accumulation
    step. Every rank knows them, since batches are drawn alike everywhere: a weighted mean needs no exchange.
    """

    inputs: dict[str, Any]
    target: Tensor
    row: Tensor
    update_target: Tensor | None = None


class Samples(Dataset[Batch]):
    """One split, ready to be cut into batches; a Draw of indices gives a whole Batch at once.

    target: (n, ...) as the task encodes it. stores: the inputs, by name.
    """

    def __init__(self, target: np.ndarray, stores: Mapping[str, Store]) -> None:
        self.target, self.stores = target, dict(stores)

    def __len__(self) -> int:
        return len(self.target)

    def as_they_are(self) -> "Samples":
        """The same without augmentation."""
        return Samples(self.target, {name: store.plain() for name, store in self.stores.items()})

    def blocks(self) -> np.ndarray:
        """(len,) a number for each sample, alike for samples that share an input of which sharing saves work (the same image); those that
        share none stand alone."""
        shared = (found for store in self.stores.values() if (found := store.distinct()) is not None)
        rows = next(shared, np.full(len(self), -1))
        alone = np.where(rows < 0, np.arange(len(self)) + rows.max(initial=-1) + 1, rows)
        return np.unique(alone, return_inverse=True)[1]

    def __getitem__(self, index: int) -> Batch:
        return self.__getitems__(Draw([index], 0))

    def __getitems__(self, draw: Draw) -> Batch:
        index = np.asarray(draw.indices)
        rows = np.where(index == PLACEHOLDER, 0, index)
        inputs = {name: store.batch(rows, draw.seed) for name, store in self.stores.items()}
        of_update = torch.from_numpy(self.target[np.asarray(draw.update)]) if len(draw.update) else None
        return Batch(inputs, torch.from_numpy(self.target[rows]), torch.from_numpy(index), of_update)


def as_is(batch: Any) -> Any:
    """Samples give whole batches; there is nothing left to collate."""
    return batch
