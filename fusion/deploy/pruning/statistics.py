"""Means and variances of the inputs of layers, over samples of a run."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fusion.model import FusionModel


class Moments:
    """Mean and variance (C,) of each input channel of a layer, over all positions of all batches."""

    def __init__(self) -> None:
        self.count, self.total, self.squares = 0, torch.zeros(()), torch.zeros(())

    def add(self, x: Tensor) -> None:
        """x: (..., C)."""
        flat = x.flatten(0, -2).double()
        self.count += len(flat)
        self.total, self.squares = self.total + flat.sum(0), self.squares + flat.square().sum(0)

    @property
    def mean(self) -> Tensor:
        return self.total / max(self.count, 1)

    @property
    def variance(self) -> Tensor:
        return (self.squares / max(self.count, 1) - self.mean**2).clamp(min=0)


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
