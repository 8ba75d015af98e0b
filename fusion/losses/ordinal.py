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
    logits = cumulative_logits(input)
    ignored = target == ignore_index
    chosen = target.where(~ignored, 0)
    classes = logits.shape[1] + 1
    above_last = logsigmoid(logits.gather(1, (chosen - 1).clamp(min=0)[:, None])[:, 0])
    not_above = logsigmoid(-logits.gather(1, chosen.clamp(max=classes - 2)[:, None])[:, 0])
    # s(a) - s(b) = s(a) s(-b) (1 - exp(b - a)); here a - b = softplus(output_k), so that the last factor is s(output_k).
    gap = logsigmoid(input.to(logits.dtype).gather(1, chosen.clamp(max=classes - 2)[:, None])[:, 0])
    log_p = torch.where(chosen == 0, not_above, torch.where(chosen == classes - 1, above_last, above_last + not_above + gap))
    loss = -log_p
    if weight is not None:
        loss = loss * weight[chosen]
    return loss.masked_fill(ignored, 0.0)
