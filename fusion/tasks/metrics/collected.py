"""Outputs and targets kept until the end of an evaluation, for scores that need them all."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.utilities.data import dim_zero_cat


class Collected(Metric):
    """All values (n, K) and targets (n, ...) of an evaluation, on every rank.

    Args:
        width: K.
        target: a target without samples, (0, ...), of the type of the others.

    >>> collected = Collected(3, torch.zeros(0, dtype=torch.int64))
    >>> collected.update(torch.zeros(2, 3), torch.tensor([1, 0]))
    >>> found = collected.compute()
    >>> found.values.shape, found.target.shape
    (torch.Size([2, 3]), torch.Size([2]))
    """

    values: list[Tensor] | Tensor
    targets: list[Tensor] | Tensor

    def __init__(self, width: int, target: Tensor) -> None:
        super().__init__()
        self.empty = torch.zeros(0, width), target
        self.add_state("values", [], dist_reduce_fx="cat")
        self.add_state("targets", [], dist_reduce_fx="cat")

    def update(self, values: Tensor, target: Tensor) -> None:
        for batches, batch in ((self.values, values), (self.targets, target)):
            assert isinstance(batches, list)
            batches.append(batch.detach())

    def sync(self, *args: Any, **options: Any) -> None:
        """Gather over the ranks; one that saw no sample contributes none, of the shape and type of the others'."""
        if isinstance(self.values, list) and not self.values:
            self.values, self.targets = ([one.to(self.device)] for one in self.empty)
        super().sync(*args, **options)

    def all(self) -> tuple[Tensor, Tensor]:
        """Values and targets, in the order of ranks and batches."""
        if isinstance(self.values, list) and not self.values:
            return self.empty
        return dim_zero_cat(self.values), dim_zero_cat(self.targets)

    def compute(self) -> Any:
        return Everything(*self.all())


class Everything:
    """values (n, K) and targets (n, ...). (Not a tuple: torchmetrics would take away the dimensions of tensors of one element.)"""

    def __init__(self, values: Tensor, target: Tensor) -> None:
        self.values, self.target = values, target


def collecting(width: int, target: Tensor) -> MetricCollection:
    """A collection of nothing but `Collected`."""
    return MetricCollection({"everything": Collected(width, target)})


def collected(metrics: MetricCollection) -> tuple[Tensor, Tensor]:
    """What a collection of `collecting` has: values (n, K) and targets (n, ...), over all ranks; on the CPU, since scores are computed in
    float64, which Apple's GPUs lack."""
    found = metrics["everything"].compute()
    return found.values.cpu(), found.target.cpu()
