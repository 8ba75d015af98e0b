"""Late fusion: the modalities' logits, weighted per sample by their confidence."""

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from fusion.features import keep, masked_softmax
from fusion.heads.late import LateHead


class ConfidenceWeighted(LateHead):
    """Classify each modality alone and weight the decisions, sample by sample, by each modality's own confidence.

        y = sum_m w_m f_m(x_m)        w = softmax over present m of s * c_m
        c_m = 1 - entropy(softmax(f_m(x_m))) / log(out_dim)    or    log sum_c exp f_mc(x_m) / 10 ("energy")

    The first c_m is 1 for a certain prediction and 0 for a uniform one; the sharpness s > 0 is learned (1 at the start). A weight depends
    on its own modality alone up to the common scale, so the sign of y is that of a sum over modalities: XOR stays at chance. The energy is
    the paper's score; adding a constant to all logits changes it and no prediction, so that only model.balance=QMF trains it, not the
    loss of y. (The paper uses c_m as weights, without the softmax.)

    Source: Zhang et al. (2023), "Provable Dynamic Fusion for Low-Quality Multimodal Data" (QMF).
    Reads: pooled features (B, D_m).
    Cost: as LogitMean, and one parameter.

    Args:
        score: the confidence c_m, by "entropy" or by "energy".
        dim: hidden width of each modality's classifier; 0: no hidden layer.
        dropout: dropout probability before the last layer of each classifier; from 0 to below 1.

    >>> head = ConfidenceWeighted({"text": 8, "image": 16}, 3)
    >>> head({"text": torch.randn(4, 8), "image": torch.randn(4, 16)}).output.shape
    torch.Size([4, 3])
    """

    one_of_classes = True

    def __init__(
        self,
        dims: Mapping[str, int],
        out_dim: int,
        *,
        score: Literal["entropy", "energy"] = "entropy",
        dim: int = 256,
        dropout: float = 0.0,
    ) -> None:
        if score not in ("entropy", "energy"):
            raise ValueError(f"ConfidenceWeighted: score is '{score}'; expected entropy or energy")
        super().__init__(dims, out_dim, dim=dim, dropout=dropout)
        self.score = score
        self.log_sharpness = nn.Parameter(torch.zeros(()))

    def combine(self, logits: Tensor, present: Tensor) -> Tensor:
        score = confidence(logits) if self.score == "entropy" else energy_confidence(logits.detach())
        weights = masked_softmax(self.log_sharpness.exp() * score, present, dim=1)
        return (keep(logits, present) * weights.unsqueeze(-1).to(logits.dtype)).sum(dim=1)


def confidence(logits: Tensor) -> Tensor:
    """Confidence (B, M) from logits (B, M, C): 1 for a certain decision, 0 for a uniform one; 1 if there is only one class."""
    log_p = logits.log_softmax(dim=-1)
    entropy = -(log_p.exp() * log_p).sum(dim=-1)
    return 1 - entropy / math.log(max(logits.shape[-1], 2))


def energy_confidence(logits: Tensor) -> Tensor:
    """Confidence (..., ) from logits (..., C): their negative free energy, a tenth of it as in the authors' experiments."""
    return logits.logsumexp(dim=-1) / 10
