"""Losses of labels that are each there or not, beside torch.nn.functional.binary_cross_entropy_with_logits."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def binary_focal_loss(
    input: Tensor, target: Tensor, *, gamma: float = 2.0, alpha: float | None = None, pos_weight: Tensor | None = None
) -> Tensor:
    """Binary cross entropy that counts well classified labels less, averaged over the labels of a sample.

        l = 1/L sum_c -a_c (1 - q_c)^gamma log q_c            q_c = p_c where y_c = 1, else 1 - p_c; p = sigmoid(input)

    a_c is alpha where y_c = 1, else 1 - alpha; pos_weight multiplies the terms where y_c = 1. Source: Lin et al. (2017), "Focal Loss for
    Dense Object Detection". gamma = 0 is binary cross entropy.

    Args:
        input: (B, L) logits.
        target: (B, L) 0 or 1; any value between is a mixture of both terms.
        gamma: how much less; 0 or more.
        alpha: weight of the labels that are there, from 0 to 1, the others get 1 - alpha; None weighs none.
        pos_weight: (L,) weight of each label where it is there.

    Returns (B,).

    >>> float(binary_focal_loss(torch.zeros(1, 3), torch.tensor([[1.0, 0.0, 0.0]]), gamma=1.0))  # log(2) / 2
    0.34657...
    """
    logits = input.to(torch.promote_types(input.dtype, torch.float32))
    target = target.to(logits.dtype)
    present = -(gamma * logsigmoid(-logits)).exp() * logsigmoid(logits)
    absent = -(gamma * logsigmoid(logits)).exp() * logsigmoid(-logits)
    if pos_weight is not None:
        present = present * pos_weight
    if alpha is not None:
        present, absent = alpha * present, (1 - alpha) * absent
    return (target * present + (1 - target) * absent).mean(dim=1)


def asymmetric_loss(
    input: Tensor, target: Tensor, *, gamma_positive: float = 0.0, gamma_negative: float = 4.0, margin: float = 0.05
) -> Tensor:
    """Binary cross entropy that counts easy negatives less than easy positives, and very easy negatives not at all, averaged over the
    labels of a sample.

        l = 1/L sum_c -(1 - p_c)^gamma_positive log p_c                     where y_c = 1
                      -(p'_c)^gamma_negative log(1 - p'_c)                  where y_c = 0;  p' = max(p - margin, 0), p = sigmoid(input)

    Source: Ridnik et al. (2021), "Asymmetric Loss For Multi-Label Classification".

    Args:
        input: (B, L) logits.
        target: (B, L) 0 or 1; any value between is a mixture of both terms.
        gamma_positive: how much less an easy positive counts; 0 or more.
        gamma_negative: how much less an easy negative counts; 0 or more.
        margin: negatives of a probability below count nothing; from 0 to below 1.

    Returns (B,).

    >>> float(asymmetric_loss(torch.zeros(1, 1), torch.zeros(1, 1), gamma_negative=1.0, margin=0.1))  # -0.4 log(0.6)
    0.20433...
    """
    logits = input.to(torch.promote_types(input.dtype, torch.float32))
    target = target.to(logits.dtype)
    present = -(gamma_positive * logsigmoid(-logits)).exp() * logsigmoid(logits)
    if margin:
        shifted = (logits.sigmoid() - margin).clamp(min=0)
        # A power of 0 has no finite gradient below 1; there the whole term is 0.
        focus = shifted.clamp(min=torch.finfo(logits.dtype).tiny).pow(gamma_negative) if gamma_negative else torch.ones_like(shifted)
        absent = torch.where(shifted > 0, -focus * torch.log1p(-shifted), torch.zeros_like(shifted))
    else:
        absent = -(gamma_negative * logsigmoid(logits)).exp() * logsigmoid(-logits)
    return (target * present + (1 - target) * absent).mean(dim=1)
