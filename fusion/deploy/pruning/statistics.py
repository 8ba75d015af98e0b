"""Means and covariances of the inputs of layers, over samples of a run."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fusion.model import FusionModel


class Moments:
    """Mean (C,) and covariance (C, C) of the input channels of a layer, over all positions of all batches, in float64."""

    def __init__(self) -> None:
        self.count, self.total, self.products = 0, torch.zeros(()), torch.zeros(())
        self.origin: Tensor | None = None  # the first batch's mean: sums of differences from it lose no digits to a large mean

    def add(self, x: Tensor) -> None:
        """x: (..., C)."""
        flat = x.flatten(0, -2).float()
        if self.origin is None:
            self.origin = flat.mean(0)
        centred = flat - self.origin
        self.count += len(flat)
        self.total, self.products = self.total + centred.double().sum(0), self.products + (centred.T @ centred).double()

    @property
    def mean(self) -> Tensor:
        return self.total / max(self.count, 1) + (0 if self.origin is None else self.origin)

    @property
    def covariance(self) -> Tensor:
        """Not below zero on its diagonal, whatever the rounding."""
        mean = self.total / max(self.count, 1)
        covariance = self.products / max(self.count, 1) - torch.outer(mean, mean)
        covariance.diagonal().clamp_(min=0)
        return covariance


@torch.inference_mode()
def input_moments(model: FusionModel, layers: Sequence[nn.Module], batches: Iterable[dict[str, Any]]) -> list[Moments]:
    """The moments of each layer's inputs, in evaluation mode. batches: without padding, which would count as well."""
    moments = [Moments() for _ in layers]

    def add(own: Moments, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        own.add(inputs[0].movedim(1, -1) if isinstance(layer, nn.Conv2d) else inputs[0])

    hooks = [layer.register_forward_pre_hook(partial(add, own)) for layer, own in zip(layers, moments, strict=True)]
    model.eval()
    try:
        for inputs in batches:
            model(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return moments
