"""Channels of single layers, selected in place."""

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
