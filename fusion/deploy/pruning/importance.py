"""Which units of a group are kept, and how many."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fusion.deploy.pruning.refit import refit
from fusion.deploy.pruning.statistics import Moments
from fusion.errors import UserError
from fusion.model import FusionModel
from fusion.pruning.groups import Group

Importance = Literal["variance", "magnitude"]
STEP = 8  # of the numbers of units that are kept: what vector instructions take at a time


def importance_of(group: Group, moments: Moments, by: Importance) -> Tensor:
    """The importance (U,) of each unit of a group.

    by: "magnitude": the norms of the weights that make it times those of the weights that read it, with the scales of batch normalisation
    in between. "variance": the squared norm of the weights that read it times the variance of what they read, the squared error of the
    block's output where the unit is replaced by its mean.

    moments: of the inputs of the group's first consumer.
    """
    out = group.consumers[0].layer.weight.detach().transpose(0, 1).flatten(1).double().square().sum(1).cpu()
    if by == "variance":
        return (out * moments.covariance.diagonal().cpu()).view(-1, group.size).sum(1)
    made = rows(group.producers[0].layer)[-len(out) :]
    for layer in group.between:
        made = made * (scales(layer) if isinstance(layer, _BatchNorm) else rows(layer))
    # Frobenius norms, of the several channels of an attention head.
    return (made.view(-1, group.size).sum(1) * out.view(-1, group.size).sum(1)).sqrt()


def rows(layer: Any) -> Tensor:
    """The squared norm of the weights of each output."""
    return layer.weight.detach().flatten(1).double().square().sum(1).cpu()


def scales(norm: _BatchNorm) -> Tensor:
    """The squared factor by which a batch normalisation multiplies each channel."""
    assert norm.running_var is not None
    weight = torch.ones_like(norm.running_var) if norm.weight is None else norm.weight.detach()
    return (weight.double().square() / (norm.running_var.double() + norm.eps)).cpu()


def kept_count(units: int, keep: float) -> int:
    """How many of a group's units are kept: a multiple of 8 where there are at least 16, at least one.

    >>> kept_count(1536, 0.5), kept_count(144, 0.6), kept_count(12, 0.6), kept_count(1, 0.1)
    (768, 88, 7, 1)
    """
    step = STEP if units >= 2 * STEP else 1
    return min(units, max(step, round(keep * units / step) * step))


def ratio_for(model: FusionModel, groups: Mapping[str, Group], most: int) -> float:
    """The largest ratio of kept units, in steps of 0.01, with which a model has at most so many parameters.

    Raises UserError if there is none.
    """
    smaller, own = copy.deepcopy((model, list(groups.values())))
    smaller.to("meta")  # shapes without values
    for percent in range(100, 0, -1):
        for group, units in zip(own, [group.units for group in groups.values()], strict=True):
            group.keep(torch.arange(min(group.units, kept_count(units, percent / 100))))
        if parameters(smaller) <= most:
            return percent / 100
    raise UserError(
        f"--times: with the fewest units that can be kept, the model still has {parameters(smaller):,} parameters, more than {most:,}; "
        "expected a smaller number"
    )


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def cut(groups: Mapping[str, Group], moments: Sequence[Moments], keep: float, by: Importance) -> dict[str, int]:
    """Removes the least important units of each group, with what they contributed refitted; returns the numbers of those left.

    moments: of the inputs of each consumer of each group, in order.
    """
    widths: dict[str, int] = {}
    remaining = list(moments)
    for name, group in groups.items():
        own = [remaining.pop(0) for _ in group.consumers]
        order = importance_of(group, own[0], by).argsort(descending=True, stable=True)
        count = kept_count(group.units, keep)
        if count < group.units:
            kept, removed = order[:count].sort().values, order[count:].sort().values
            refit(group, kept, removed, own)
            group.keep(kept)
            widths[name] = count
    return widths
