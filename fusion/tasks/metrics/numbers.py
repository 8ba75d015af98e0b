"""Scores of numbers, from (n, T) predictions and targets in float64."""

import torch
from torch import Tensor
from torchmetrics.functional import spearman_corrcoef


def number_scores(predicted: Tensor, target: Tensor) -> dict[str, Tensor]:
    """mae, rmse, r2 and spearman of each column (T,).

    r2 is NaN for fewer than two samples, and where the targets differ by no more than rounding; spearman also where the predictions don't
    differ.

    >>> scores = number_scores(torch.tensor([[0.0], [1.0], [3.0]]).double(), torch.tensor([[0.0], [1.0], [2.0]]).double())
    >>> {name: round(score.item(), 2) for name, score in scores.items()}
    {'mae': 0.33, 'rmse': 0.58, 'r2': 0.5, 'spearman': 1.0}
    """
    error = predicted - target
    spread = (target - target.mean(dim=0)).square().sum(dim=0)
    differs = (spread > 1e-12 * target.square().sum(dim=0)) & (len(target) > 1)
    ordered = differs & ((predicted - predicted[:1]).abs().amax(dim=0) > 0)
    ranks = torch.stack(
        [
            spearman_corrcoef(predicted[:, i], target[:, i]) if bool(ordered[i]) else error.new_tensor(torch.nan)
            for i in range(target.shape[1])
        ]
    )
    return {
        "mae": error.abs().mean(dim=0),
        "rmse": error.square().mean(dim=0).sqrt(),
        "r2": torch.where(differs, 1 - error.square().sum(dim=0) / spread, torch.nan),
        "spearman": ranks,
    }
