"""Weights of several tasks' losses, that change in training."""

from collections.abc import Sequence

import torch
from torch import Tensor


def dynamic_weights(before: Sequence[float], last: Sequence[float], temperature: float = 2.0) -> list[float]:
    """Dynamic weight average: losses that fall slowly weigh more.

        r_i = last_i / before_i            w_i = T exp(r_i / temperature) / sum_j exp(r_j / temperature)

    Source: Liu et al. (2019), "End-to-End Multi-Task Learning with Attention" (DWA).

    Args:
        before: each task's mean loss in the epoch before the last.
        last: in the last epoch.
        temperature: the higher, the more equal are the weights.

    >>> [round(weight, 3) for weight in dynamic_weights([1.0, 1.0], [1.0, 0.5])]
    [1.124, 0.876]
    """
    falls = torch.tensor(last, dtype=torch.float64) / torch.tensor(before, dtype=torch.float64).clamp(min=1e-12)
    return ((falls / temperature).softmax(dim=0) * len(last)).tolist()


def gradnorm_weights(
    weights: Tensor, norms: Tensor, losses: Tensor, initial: Tensor, *, alpha: float, lr: float, present: Tensor | None = None
) -> Tensor:
    """One step of GradNorm: weights (T,) that bring the norms of the tasks' gradients closer to a common size, larger for tasks that learn
    slowly.

        G_i = w_i |grad L_i|            r_i = (L_i / L_i(0)) / mean_j (L_j / L_j(0))            target_i = mean(G) r_i^alpha
        w_i <- w_i - lr sign(G_i - target_i) |grad L_i| / mean_j |grad L_j|, then scaled to the sum T

    Source: Chen et al. (2018), "GradNorm: Gradient Normalization for Adaptive Loss Balancing in Deep Multitask Networks", by plain gradient
    descent on sum_i |G_i - target_i| with constant targets, in units of the mean norm, so that a step doesn't depend on the losses' scale.
    Weights stay at least 0.01. Where a norm or loss isn't finite, the weights stay as they are.

    Args:
        weights: (T,) the current weights, above 0.
        norms: (T,) norms of the gradients of the unweighted losses by the shared parameters.
        losses: (T,) the current losses.
        initial: (T,) the losses at the start.
        alpha: how much more slow tasks get, at least 0; 0 makes the norms equal.
        lr: step size.
        present: (T,) bool, which tasks have samples in this update; the weights of the others stay as they are. None: all.

    >>> gradnorm_weights(torch.ones(2), torch.tensor([4.0, 1.0]), torch.ones(2), torch.ones(2), alpha=1.0, lr=0.1)
    tensor([0.8936, 1.1064])
    """
    present = torch.ones_like(weights, dtype=torch.bool) if present is None else present

    def mean(x: Tensor) -> Tensor:
        return torch.where(present, x, 0.0).sum() / present.sum().clamp(min=1)

    size = weights * norms
    progress = losses / initial.clamp(min=1e-12)
    target = mean(size) * (progress / mean(progress).clamp(min=1e-12)) ** alpha
    moved = (weights - lr * torch.sign(size - target) * norms / mean(norms).clamp(min=1e-12)).clamp(min=0.01)
    scaled = torch.where(present, moved * (mean(weights) / mean(moved)), weights)
    finite = torch.where(present, scaled + norms, 0.0).isfinite().all() & (present.sum() > 1)
    return torch.where(finite, scaled, weights)
