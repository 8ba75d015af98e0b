"""Batch samplers: pure functions of seed, epoch, rank and position, so that a run can be resumed exactly."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from torch.utils.data import Sampler

from fusion.data.distinct_batches import distinct_batches
from fusion.errors import UserError

PLACEHOLDER = -1


class Admission(Protocol):
    """The samples that a curriculum admits at each update."""

    def samples(self, epoch: int, update: int) -> np.ndarray | None:
        """The numbers of the admitted samples, None for all."""


class Draw(NamedTuple):
    """The samples of one batch, and the seed of their augmentation. PLACEHOLDER stands for a sample that is not to be counted.

    update: all samples of the update that the batch is a share of, including those of other ranks and other accumulated batches; empty in
    evaluation.
    """

    indices: list[int]
    seed: int
    update: Sequence[int] = ()


class GlobalBatches(Sampler[Draw]):
    """Training batches: one permutation per epoch, cut into global batches, each distributed among ranks and accumulation steps.

    The global batches and their order do not depend on the number of devices. The remainder of an epoch, less than one global batch, is
    left out of that epoch. `batch_size` is the global batch, a multiple of world * accumulate.
    admission: the samples that a curriculum admits at each update; None: all. An epoch that begins before all are admitted draws each of
    its global batches from the admitted ones.
    together (count,): samples with the same number stay next to each other, so that inputs that they share are in one batch; blocks are
    permuted, and the samples within each block.
    apart (count, S): samples with the same number in one of the columns are never in the same global batch; see `distinct_batches`.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
        together: np.ndarray | None = None,
        apart: np.ndarray | None = None,
        admission: Admission | None = None,
    ) -> None:
        shares = world * accumulate
        if batch_size % shares:
            below = batch_size - batch_size % shares
            multiples = f"{below} or {below + shares}" if below else f"{shares}"
            factors = f"{world} devices x {accumulate} accumulated batches"
            raise UserError(f"data.batch_size (the global batch) is {batch_size}, not a multiple of {factors}; nearest: {multiples}")
        if count < batch_size:
            batch_size = count - count % shares
        if not batch_size:
            raise UserError(f"{count} training samples are too few for {world} devices x {accumulate} accumulated batches")
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.rank, self.world, self.accumulate = rank, world, accumulate
        self.together, self.apart, self.admission = together, apart, admission
        self.epoch = 0
        self.start = 0
        # Lightning looks for set_epoch on a loader's sampler, and on its batch sampler's.
        self.sampler = self

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def begin_at(self, epoch: int, batch: int) -> None:
        """Start the next iteration of this epoch at this batch (for resuming)."""
        self.epoch, self.start = epoch, batch

    @property
    def updates(self) -> int:
        """Optimiser updates in an epoch."""
        return self.count // self.batch_size

    def __len__(self) -> int:
        return self.updates * self.accumulate

    def order(self) -> np.ndarray:
        """This epoch's permutation."""
        return self.shuffled(np.random.default_rng([self.seed, self.epoch]), np.arange(self.count))

    def shuffled(self, rng: np.random.Generator, samples: np.ndarray) -> np.ndarray:
        shuffled = rng.permutation(samples)
        if self.apart is not None:
            return distinct_batches(shuffled, self.apart, self.batch_size, rng)
        if self.together is None:
            return shuffled
        place = rng.permutation(int(self.together.max()) + 1)
        return shuffled[np.argsort(place[self.together[shuffled]], kind="stable")]

    def global_batch(self, update: int, order: np.ndarray | None) -> np.ndarray:
        """The samples of one update of this epoch; `order` is the epoch's permutation if all samples are admitted from its start."""
        if order is not None:
            return order[update * self.batch_size : (update + 1) * self.batch_size]
        assert self.admission is not None
        admitted = self.admission.samples(self.epoch, update)
        rng = np.random.default_rng([self.seed, self.epoch, update])
        return self.shuffled(rng, np.arange(self.count) if admitted is None else admitted)[: self.batch_size]

    def __iter__(self) -> Iterator[Draw]:
        all_admitted = self.admission is None or self.admission.samples(self.epoch, 0) is None
        order = self.order() if all_admitted else None
        share = self.batch_size // (self.world * self.accumulate)
        for batch in range(self.start, len(self)):
            update, step = divmod(batch, self.accumulate)
            begin = (step * self.world + self.rank) * share
            samples = self.global_batch(update, order).tolist()
            yield Draw(samples[begin : begin + share], draw_seed(self.seed, self.epoch, batch, self.rank), samples)


def planned_updates(trainer: Any, batches: GlobalBatches) -> tuple[int, int]:
    """Updates in an epoch and in the whole training, as a trainer (or its settings) plans them. Raises UserError if training has no end."""
    count, limit = len(batches), trainer.limit_train_batches
    if limit is not None:
        count = min(count, limit) if isinstance(limit, int) else int(count * limit)
    epoch = -(-count // batches.accumulate)
    ends = [trainer.max_steps] if trainer.max_steps > 0 else []
    if trainer.max_epochs is not None and trainer.max_epochs > 0:
        ends.append(epoch * trainer.max_epochs)
    if not ends:
        raise UserError("the schedule needs an end: give --trainer.max_epochs or --trainer.max_steps")
    return epoch, min(ends)


def accumulation(batch_size: int, devices: int, most: int) -> int:
    """The number of accumulated batches into which a device's share of a global batch is divided, so that each has at most `most` samples.

    Raises UserError where no even division exists.

    >>> accumulation(256, devices=2, most=50)
    4
    """
    for steps in range(1, batch_size + 1):
        if batch_size % (devices * steps) == 0 and batch_size // (devices * steps) <= most:
            return steps
    raise UserError(
        f"data.batch_size (the global batch) is {batch_size}, which can't be divided evenly among {devices} devices in batches of at "
        f"most {most} (data.device_batch_size)"
    )


class EvaluationBatches(Sampler[Draw]):
    """Every sample once, for any number of ranks: rank r takes samples r, r + world, ...

    A rank that has one sample less ends with a placeholder, so that all ranks make the same number of steps (otherwise a collective would
    wait forever) and no sample is counted twice.
    """

    def __init__(self, count: int, batch_size: int, *, rank: int = 0, world: int = 1) -> None:
        self.batch_size = batch_size
        own = list(range(rank, count, world))
        self.indices = own + [PLACEHOLDER] * (-(-count // world) - len(own))

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[Draw]:
        for start in range(0, len(self.indices), self.batch_size):
            yield Draw(self.indices[start : start + self.batch_size], 0)


def draw_seed(*parts: int) -> int:
    """One 63-bit seed from several numbers."""
    return int(np.random.SeedSequence(parts).generate_state(1, dtype=np.uint64)[0] >> 1)
