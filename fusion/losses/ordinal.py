"""A loss of ordered classes."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus


def cumulative_logits(output: Tensor) -> Tensor:
    """Logits of "the class is above k" for k = 0 .. C - 2, which never increase in k.

        f = output_0            logit P(y > k) = f - sum_{0 < j <= k} softplus(output_j)

    Args:
        output: (B, C - 1).

    >>> (cumulative_logits(torch.tensor([[0.0, 0.0]])) * 1000).round()
    tensor([[   0., -693.]])
    """
    output = output.to(torch.promote_types(output.dtype, torch.float32))
    return torch.cat([output[:, :1], output[:, :1] - softplus(output[:, 1:]).cumsum(dim=1)], dim=1)


def cumulative_log_probabilities(output: Tensor) -> Tensor:
    """Log probabilities (B, C) of the classes, of which `cumulative_link_loss` is minus that of the right one; exact also where they are
    far below 0.

    Args:
        output: (B, C - 1), as `cumulative_logits` takes them.

    >>> cumulative_log_probabilities(torch.tensor([[0.0, 0.0]])).exp().sum().round(decimals=4)
    tensor(1.)
    """
    logits = cumulative_logits(output)
    none = logits.new_zeros(len(logits), 1)
    above = torch.cat([none, logsigmoid(logits)], dim=1)
    not_above = torch.cat([logsigmoid(-logits), none], dim=1)
    # s(a) - s(b) = s(a) s(-b) (1 - exp(b - a)); here a - b = softplus(output_k), so that the last factor is s(output_k).
    gap = torch.cat([none, logsigmoid(output[:, 1:].to(logits.dtype)), none], dim=1)
    return above + not_above + gap


def cumulative_link_loss(input: Tensor, target: Tensor, *, weight: Tensor | None = None, ignore_index: int = -100) -> Tensor:
    """Negative log likelihood of a cumulative link model: the probability of a class is the difference of two sigmoids.

        P(y = k) = s(l_{k-1}) - s(l_k)            l = cumulative_logits(input), l_{-1} = inf, l_{C-1} = -inf, s = sigmoid

    Source: McCullagh (1980), "Regression Models for Ordinal Data", with thresholds that may depend on the sample (partial proportional
    odds, Peterson and Harrell, 1990).

    Args:
        input: (B, C - 1) outputs, as `cumulative_logits` takes them.
        target: (B,) int64, the number of the class.
        weight: (C,) of each class.
        ignore_index: a target of this number has loss 0.

    Returns (B,).

    >>> float(cumulative_link_loss(torch.zeros(1, 1), torch.tensor([0])))  # log(2)
    0.69314...
    """
    ignored = target == ignore_index
    chosen = target.where(~ignored, 0)
    loss = -cumulative_log_probabilities(input).gather(1, chosen[:, None])[:, 0]
    if weight is not None:
        loss = loss * weight[chosen]
    return loss.masked_fill(ignored, 0.0)
