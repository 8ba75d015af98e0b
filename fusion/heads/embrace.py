"""Intermediate fusion: every joint feature is taken from one modality, drawn at random."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fusion.features import Features, keep, presence
from fusion.heads.base import FusionHead, check_options


class Embrace(FusionHead):
    """Project all modalities to one width and draw, feature by feature, the modality whose value the joint vector takes.

        h_m = ReLU(W_m norm(x_m))        e_i = h_mi with m ~ Multinomial(p)        y = GELU(W e)

    The draw is a regulariser that makes the network robust to any mix of the modalities; p is renormalised over the modalities that a
    sample has. In evaluation e is its expectation, sum_m p_m h_m, as with dropout, and so deterministic (the paper draws there too).

    Source: Choi and Lee (2019), "EmbraceNet: A robust deep learning architecture for multimodal classification".
    Reads: pooled features (B, D_m).
    Cost: sum(D_m) * dim + dim^2 parameters and multiply-adds per sample.

    Args:
        dim: width to which each modality is projected, and of the fused features.
        probabilities: p by modality, a positive number for each; normalised to sum to 1. None: uniform.
        dropout: dropout probability on the drawn features e and on the fused features; from 0 to below 1.
        unimodal: also predict from each modality alone, by a linear layer on its pooled features (by_modality); model.balance turns it on.

    >>> head = Embrace({"text": 8, "image": 16}, 3, dim=32, probabilities={"text": 0.7, "image": 0.3})
    >>> head({"text": torch.randn(4, 8), "image": torch.randn(4, 16)}).output.shape
    torch.Size([4, 3])
    """

    stage = "pooled"
    family = "intermediate"
    probabilities: Tensor

    def __init__(
        self,
        dims: Mapping[str, int],
        out_dim: int,
        *,
        dim: int = 256,
        probabilities: dict[str, float] | None = None,
        dropout: float = 0.0,
        unimodal: bool = False,
    ) -> None:
        check_options(type(self).__name__, dim=dim, dropout=dropout)
        super().__init__(dims, out_dim, width=dim, unimodal=unimodal)
        p = dict.fromkeys(dims, 1.0) if probabilities is None else probabilities
        if p.keys() != dims.keys() or not all(0 < value < math.inf for value in p.values()):
            raise ValueError(f"Embrace: probabilities must give a positive number for each of {', '.join(dims)}; got {p}")
        self.register_buffer("probabilities", torch.tensor([float(p[name]) for name in dims]) / sum(p.values()))
        self.dock = nn.ModuleDict(
            {name: nn.Sequential(nn.LayerNorm(width), nn.Linear(width, dim), nn.ReLU()) for name, width in dims.items()}
        )
        self.mix = nn.Sequential(nn.Dropout(dropout), nn.Linear(dim, dim), nn.GELU(), nn.Dropout(dropout))

    def fuse(self, features: dict[str, Features]) -> Tensor:  # (B, dim)
        docked = torch.stack([self.dock[name](f.pooled) for name, f in features.items()], dim=1)  # (B, M, dim)
        present = presence(features)
        masked = present * self.probabilities
        p = masked / masked.sum(dim=1, keepdim=True).clamp(min=torch.finfo(masked.dtype).tiny)  # (B, M), zeros if none is present
        if self.training:
            # Inverse transform sampling: the modality whose interval of (0, 1) contains a uniform number.
            cumulative = p.cumsum(dim=1)[..., None]
            uniform = torch.rand(docked.shape[0], 1, docked.shape[2], device=docked.device, dtype=cumulative.dtype) * cumulative[:, -1:]
            drawn = (uniform >= cumulative).sum(dim=1, keepdim=True).clamp(max=len(self.dims) - 1)
            return self.mix(keep(docked.gather(1, drawn)[:, 0], present.any(dim=1)))
        return self.mix((docked * p[..., None].to(docked.dtype)).sum(dim=1))
