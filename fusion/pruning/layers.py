"""Channels of single layers: selected in place, and removed ones replaced by their mean."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def keep_outputs(layer: Any, channels: Tensor) -> None:
    """Keeps these outputs of a linear layer or convolution."""
    layer.weight = selected(layer.weight, 0, channels)
    if layer.bias is not None:
        layer.bias = selected(layer.bias, 0, channels)
    if isinstance(layer, nn.Linear):
        layer.out_features = len(channels)
    else:
        layer.out_channels = len(channels)


def keep_inputs(layer: Any, channels: Tensor) -> None:
    """Keeps these inputs of a linear layer or convolution."""
    layer.weight = selected(layer.weight, 1, channels)
    if isinstance(layer, nn.Linear):
        layer.in_features = len(channels)
    else:
        layer.in_channels = len(channels)


def keep_channels(layer: Any, channels: Tensor) -> None:
    """Keeps these channels of a layer that treats each by itself: batch normalisation, or a depthwise convolution."""
    if isinstance(layer, nn.Conv2d):
        keep_outputs(layer, channels)
        layer.in_channels = layer.groups = len(channels)
        return
    assert isinstance(layer, _BatchNorm)
    for name in ("weight", "bias"):
        if getattr(layer, name) is not None:
            setattr(layer, name, selected(getattr(layer, name), 0, channels))
    for name in ("running_mean", "running_var"):
        buffer = getattr(layer, name)
        setattr(layer, name, buffer.index_select(0, channels.to(buffer.device)))
    layer.num_features = len(channels)


def selected(weight: Tensor, dim: int, channels: Tensor) -> nn.Parameter:
    """A parameter of these channels, in the memory format of the whole one."""
    kept = weight.detach().index_select(dim, channels.to(weight.device))
    if weight.dim() == 4:
        last = weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
        kept = kept.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    return nn.Parameter(kept, requires_grad=weight.requires_grad)


@torch.no_grad()
def add_constant(layer: Any, norm: Any, channels: Tensor, values: Tensor) -> None:
    """Adds to a layer's outputs what these input channels contribute where they are constant.

    Exact for linear layers and 1 x 1 convolutions; for others except at the border, where a convolution reads zeros.

    channels, values: (K,) the inputs, and their constants. norm: batch normalisation of the outputs, which takes the constant from its
    running mean where the layer has no bias.
    """
    weight = layer.weight.flatten(2).sum(2) if layer.weight.dim() > 2 else layer.weight
    columns = weight.index_select(1, channels.to(weight.device)).double()
    constant = columns @ values.to(columns)
    bias = layer.bias
    if isinstance(bias, Tensor):
        bias.copy_(bias.double() + constant)
    else:
        assert isinstance(norm, _BatchNorm)
        assert norm.running_mean is not None
        norm.running_mean.copy_(norm.running_mean.double() - constant)
