"""What removed units contributed, passed on to the layers that read them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from fusion.deploy.pruning.statistics import Moments
from fusion.pruning.groups import Group

RIDGE = 0.01  # as a share of the mean variance


def refit(group: Group, kept: Tensor, removed: Tensor, moments: Sequence[Moments]) -> None:
    """Changes the layers that read a group's units for the removal of some of them: these are replaced by their linear regression on the
    units that are kept, whose constant goes into the bias that follows.

        x_r ~ m_r + B (x_k - m_k),   B = C_rk (C_kk + ridge)^-1        W_k <- W_k + W_r B,   b <- b + W_r (m_r - B m_k)

    A constant unit is replaced exactly, by its mean; before a convolution of more than one position, which reads zeros at the border, only
    inside.

    Source: He et al. (2017), "Channel Pruning for Accelerating Very Deep Neural Networks", which reconstructs a layer's output by least
    squares.

    kept, removed: indices of units. moments: of the inputs of each consumer.
    """
    k, r = group.channels(kept), group.channels(removed)
    for (layer, norm), own in zip(group.consumers, moments, strict=True):
        mean, covariance = own.mean.cpu(), own.covariance.cpu()
        ridge = RIDGE * covariance.diagonal().mean() + torch.finfo(torch.float64).tiny
        inside = covariance[k][:, k] + ridge * torch.eye(len(k), dtype=torch.float64)
        regression = torch.linalg.solve(inside, covariance[k][:, r]).T  # (R, K)
        add_to(layer, norm, k, r, regression, mean[r] - regression @ mean[k])


@torch.no_grad()
def add_to(layer: Any, norm: Any, kept: Tensor, removed: Tensor, regression: Tensor, constant: Tensor) -> None:
    """Adds what a layer's removed inputs contribute to the weights of the kept ones and to its bias, or if it has none to the mean of the
    batch normalisation that follows."""
    weight = layer.weight.double().cpu().flatten(2) if layer.weight.dim() > 2 else layer.weight.double().cpu()[..., None]
    gone = weight[:, removed]  # (O, R, positions)
    weight[:, kept] += torch.einsum("orp,rk->okp", gone, regression)
    layer.weight.copy_(weight.view(layer.weight.shape))
    added = gone.sum(2) @ constant
    if layer.bias is not None:
        layer.bias.copy_(layer.bias.double().cpu() + added)
    else:
        assert isinstance(norm, _BatchNorm)
        assert norm.running_mean is not None
        norm.running_mean.copy_(norm.running_mean.double().cpu() - added)
