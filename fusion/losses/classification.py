"""Losses of one class of several, beside torch.nn.functional.cross_entropy."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax


def focal_loss(input: Tensor, target: Tensor, *, gamma: float = 2.0, weight: Tensor | None = None, ignore_index: int = -100) -> Tensor:
    """Cross entropy that counts well classified samples less.

        l = -w_y (1 - p_y)^gamma log p_y            p = softmax(input)

    Source: Lin et al. (2017), "Focal Loss for Dense Object Detection", for several classes. Computed in float32 or wider; gamma = 0 is
    cross entropy.

    Args:
        input: (B, C) logits.
        target: (B,) int64, the number of the class.
        gamma: how much less; 0 or more.
        weight: (C,) of each class.
        ignore_index: a target of this number has loss 0.

    Returns (B,).

    >>> float(focal_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([1]), gamma=1.0))  # log(2) / 2
    0.34657...
    """
    logits = input.to(torch.promote_types(input.dtype, torch.float32))
    log_p = log_softmax(logits, dim=1)
    ignored = target == ignore_index
    chosen = target.where(~ignored, 0)[:, None]
    log_py = log_p.gather(1, chosen)[:, 0]
    # 1 - p_y as the sum of the others' probabilities: exact where p_y is near 1, with a gradient that is finite for every gamma.
    log_rest = log_p.scatter(1, chosen, -torch.inf).logsumexp(dim=1) if input.shape[1] > 1 else torch.zeros_like(log_py)
    loss = -(gamma * log_rest).exp() * log_py if gamma else -log_py
    if weight is not None:
        loss = loss * weight[chosen[:, 0]]
    return loss.masked_fill(ignored, 0.0)


def logit_adjusted_loss(
    input: Tensor, target: Tensor, prior: Tensor, *, tau: float = 1.0, weight: Tensor | None = None, ignore_index: int = -100
) -> Tensor:
    """Cross entropy for long tails: in training, the logits are offset by the logarithms of the classes' frequencies, so that predictions
    from the plain logits minimise the balanced error.

        l = -w_y log softmax(input + tau log prior)_y

    Source: Menon et al. (2021), "Long-tail learning via logit adjustment".

    Args:
        input: (B, C) logits.
        target: (B,) int64, the number of the class.
        prior: (C,) frequencies of the classes in training, above 0; they need not add up to 1.
        tau: strength; 0 is cross entropy.
        weight: (C,) of each class.
        ignore_index: a target of this number has loss 0.

    Returns (B,).

    >>> float(logit_adjusted_loss(torch.zeros(1, 2), torch.tensor([1]), torch.tensor([0.75, 0.25])))  # log(4)
    1.38629...
    """
    logits = input.to(torch.promote_types(input.dtype, torch.float32)) + tau * prior.log()
    return cross_entropy(logits, target, weight=weight, ignore_index=ignore_index, reduction="none")


def effective_number_weights(counts: Tensor, beta: float = 0.999) -> Tensor:
    """Weights of classes by the inverse of their effective number of samples, with mean 1.

        w_c ~ (1 - beta) / (1 - beta^n_c)

    Source: Cui et al. (2019), "Class-Balanced Loss Based on Effective Number of Samples". With beta = 0 all weights are 1; with beta -> 1
    they are inverse frequencies.

    Args:
        counts: (C,) samples of each class, above 0.
        beta: from 0 to below 1.

    >>> effective_number_weights(torch.tensor([1.0, 1.0, 2.0]), beta=0.5)
    tensor([1.1250, 1.1250, 0.7500])
    """
    if not 0 <= beta < 1:
        raise ValueError(f"beta is {beta}; expected from 0 to below 1")
    counts = counts.to(torch.float64)
    # 1 - beta^n without cancellation.
    inverse = -1 / torch.expm1(counts * torch.log(torch.tensor(beta, dtype=torch.float64))) if beta else torch.ones_like(counts)
    return (inverse * (len(counts) / inverse.sum())).to(torch.float32)
