"""Losses of numbers, beside torch.nn.functional's mse_loss, l1_loss and huber_loss."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def quantile_loss(input: Tensor, target: Tensor, quantiles: Sequence[float]) -> Tensor:
    """The pinball loss, which is least where each output is that quantile of the target.

        l = sum_q max(q (y - o_q), (q - 1) (y - o_q))

    Source: Koenker and Bassett (1978), "Regression Quantiles".

    Args:
        input: (B, Q) predicted quantiles.
        target: (B,).
        quantiles: Q probabilities between 0 and 1.

    Returns (B,).

    >>> float(quantile_loss(torch.tensor([[0.0]]), torch.tensor([2.0]), [0.9]))
    1.79...
    """
    outputs = input.to(torch.promote_types(input.dtype, torch.float32))
    levels = torch.as_tensor(quantiles, dtype=outputs.dtype, device=outputs.device)
    error = target.to(outputs.dtype)[:, None] - outputs
    return torch.maximum(levels * error, (levels - 1) * error).sum(dim=1)


def gaussian_loss(mean: Tensor, log_variance: Tensor, target: Tensor) -> Tensor:
    """Negative log likelihood of a normal distribution whose variance is predicted too.

        l = (log_variance + (y - mean)^2 exp(-log_variance) + log(2 pi)) / 2

    Source: Nix and Weigend (1994), "Estimating the mean and variance of the target probability distribution". The variance is clamped to
    [e^-10, e^10], since beyond fp16 gradients overflow or vanish: standardise the target.

    Args:
        mean: (B, ...).
        log_variance: (B, ...).
        target: (B, ...).

    Returns (B, ...).

    >>> float(gaussian_loss(torch.zeros(1), torch.zeros(1), torch.ones(1)))
    1.41893...
    """
    dtype = torch.promote_types(mean.dtype, torch.float32)
    mean, log_variance = mean.to(dtype), log_variance.to(dtype).clamp(-10, 10)
    return (log_variance + (target.to(dtype) - mean).square() * (-log_variance).exp() + math.log(2 * math.pi)) / 2
