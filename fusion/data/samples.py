"""The samples of a split, and batches of them."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fusion.data.kinds.base import Store
from fusion.data.sampler import PLACEHOLDER, Draw
from fusion.inputs import Mixture


class Batch(NamedTuple):
    """One batch. inputs: by name. target (B, ...): as the task encodes it. sample (B,) int64: number of the sample in its split, -1 if not
    to be counted.

    update_target (G, ...): the targets of all samples of the update, of which a training batch is this rank's share of one accumulation
    step. Every rank draws the same global batches and so knows them: a weighted mean needs no communication.

    ahead: with the first accumulated batch of an update, the others of this rank, where the loader looks ahead.

    teacher: of a training batch, what the teacher gives for each sample (B, ...), by name; None without a teacher.

    mixture: how the inputs are mixed with one another; the targets are those before. None: they aren't.
    """

    inputs: dict[str, Any]
    target: Tensor
    sample: Tensor
    update_target: Tensor | None = None
    ahead: "Ahead | None" = None
    mixture: Mixture | None = None
    teacher: dict[str, Tensor] | None = None


class Ahead:
    """Batches that are still on the CPU, to be iterated over once. (Not a tuple, whose tensors Lightning would move to the device.)"""

    def __init__(self, batches: "Iterable[Batch]") -> None:
        self.batches = batches


class Samples(Dataset[Batch]):
    """The samples of one split; indexing with a Draw gives a whole Batch at once.

    target: (n, ...) as the task encodes it. stores: the inputs, by name. teacher: what a teacher gives for each sample (n, ...), by name.
    """

    teacher: Mapping[str, np.ndarray] | None = None

    def __init__(self, target: np.ndarray, stores: Mapping[str, Store]) -> None:
        self.target, self.stores = target, dict(stores)

    def __len__(self) -> int:
        return len(self.target)

    def unaugmented(self) -> "Samples":
        """The same for evaluation: without augmentation and teacher."""
        return Samples(self.target, {name: store.unaugmented() for name, store in self.stores.items()})

    def blocks(self) -> np.ndarray:
        """(len,) block number of each sample, equal for samples that share an input of which sharing saves work (the same image); samples
        without such an input are blocks of their own."""
        shared = (index for store in self.stores.values() if (index := store.distinct()) is not None)
        index = next(shared, np.full(len(self), -1))
        separate = np.where(index < 0, np.arange(len(self)) + index.max(initial=-1) + 1, index)
        return np.unique(separate, return_inverse=True)[1]

    def __getitem__(self, index: int) -> Batch:
        return self.__getitems__(Draw([index], 0))

    def __getitems__(self, draw: Draw) -> Batch:
        sample = np.asarray(draw.indices)
        filled = np.where(sample == PLACEHOLDER, 0, sample)
        inputs = {name: store.batch(filled, draw.seed) for name, store in self.stores.items()}
        of_update = torch.from_numpy(self.target[np.asarray(draw.update)]) if len(draw.update) else None
        teacher = None if self.teacher is None else {name: torch.from_numpy(rows[filled]) for name, rows in self.teacher.items()}
        return Batch(inputs, torch.from_numpy(self.target[filled]), torch.from_numpy(sample), of_update, teacher=teacher)


class Updates(DataLoader[Batch]):
    """A loader of accumulated batches that gives the first one of each update together with the others.

    accumulate: the number of accumulated batches of an update.
    """

    accumulate: int

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        if self.num_workers or self.pin_memory:
            batches = super().__iter__()
            while update := list(islice(batches, self.accumulate)):
                yield update[0]._replace(ahead=Ahead(update[1:]))
                yield from update[1:]
            return
        samples: Any = self.dataset  # in memory: batches are made twice, instead of being held for the whole update
        draws = iter(self.batch_sampler or ())
        while of_update := list(islice(draws, self.accumulate)):
            others = map(samples.__getitems__, of_update[1:])
            yield samples.__getitems__(of_update[0])._replace(ahead=Ahead(others))
            yield from map(samples.__getitems__, of_update[1:])


def as_is(batch: Any) -> Any:
    """The collate function: `Samples` returns whole batches, so there is nothing to collate."""
    return batch
