"""Intermediate fusion: every joint feature is taken from one modality, drawn at random."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fusion.features import Features, keep, presence
from fusion.heads.base import FusionHead, check_options


class Embrace(FusionHead):
    """Bring all modalities to one width and draw, feature by feature, whose value the joint vector takes.

        h_m = ReLU(W_m norm(x_m))        e_i = h_mi with m ~ Multinomial(p)        y = GELU(W e)

    The lot is a regulariser by which the network learns to live with any share of each modality; p is renormalised over the modalities that
    a sample has. In evaluation e is its expectation, sum_m p_m h_m, as with dropout: the same answer each time (the paper draws there too).

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
        given = dict.fromkeys(dims, 1.0) if probabilities is None else probabilities
        if given.keys() != dims.keys() or not all(0 < p < math.inf for p in given.values()):
            raise ValueError(f"Embrace: probabilities must give a positive number for each of {', '.join(dims)}; got {given}")
        self.register_buffer("probabilities", torch.tensor([float(given[name]) for name in dims]) / sum(given.values()))
        self.dock = nn.ModuleDict(
            {name: nn.Sequential(nn.LayerNorm(width), nn.Linear(width, dim), nn.ReLU()) for name, width in dims.items()}
        )
        self.mix = nn.Sequential(nn.Dropout(dropout), nn.Linear(dim, dim), nn.GELU(), nn.Dropout(dropout))

    def fuse(self, features: dict[str, Features]) -> Tensor:  # (B, dim)
        docked = torch.stack([self.dock[name](f.pooled) for name, f in features.items()], dim=1)  # (B, M, dim)
        present = presence(features)
        likely = present * self.probabilities
        shares = likely / likely.sum(dim=1, keepdim=True).clamp(min=torch.finfo(likely.dtype).tiny)  # (B, M), zeros if none is present
        if self.training:
            # The modality in whose stretch of (0, 1) a uniform number falls.
            ends = shares.cumsum(dim=1)[..., None]
            lot = torch.rand(docked.shape[0], 1, docked.shape[2], device=docked.device, dtype=ends.dtype) * ends[:, -1:]
            drawn = (lot >= ends).sum(dim=1, keepdim=True).clamp(max=len(self.dims) - 1)
            return self.mix(keep(docked.gather(1, drawn)[:, 0], present.any(dim=1)))
        return self.mix((docked * shares[..., None].to(docked.dtype)).sum(dim=1))
