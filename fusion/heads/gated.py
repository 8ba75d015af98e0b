"""Intermediate fusion: gates that weight the modalities per sample and feature."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fusion.features import Features, masked_softmax, presence
from fusion.heads.base import FusionHead, check_options


class Gated(FusionHead):
    """Let each sample decide how much of each modality to keep.

        h_m = tanh(W_m x_m)            z = softmax_m(V_m [x_1; ...; x_M])            y = sum_m z_m * h_m

    The paper's bimodal unit, z and 1 - z, generalised to a softmax over M modalities (equal for two; the paper has independent sigmoids
    there); an absent modality gets weight 0.

    Source: Arevalo et al. (2017), "Gated Multimodal Units for Information Fusion" (GMU).
    Reads: pooled features (B, D_m), D = sum(D_m).
    Cost: D * dim + M * D * dim parameters and multiply-adds per sample.

    Args:
        dim: width of the gates and of the fused features.
        dropout: dropout probability on the fused features; from 0 to below 1.
        unimodal: also predict from each modality alone, by a linear layer on its pooled features (by_modality); model.balance turns it on.

    >>> head = Gated({"text": 8, "image": 16}, 3, dim=32)
    >>> head({"text": torch.randn(4, 8), "image": torch.randn(4, 16)}).output.shape
    torch.Size([4, 3])
    """

    stage = "pooled"
    family = "intermediate"
    narrowest = 1

    def __init__(self, dims: Mapping[str, int], out_dim: int, *, dim: int = 256, dropout: float = 0.0, unimodal: bool = False) -> None:
        check_options(type(self).__name__, dim=dim, dropout=dropout)
        super().__init__(dims, out_dim, width=dim, unimodal=unimodal)
        joint = sum(dims.values())
        self.candidate = nn.ModuleDict({name: nn.Linear(width, dim) for name, width in dims.items()})
        self.gate = nn.ModuleDict({name: nn.Linear(joint, dim) for name in dims})
        self.dropout = nn.Dropout(dropout)

    def fuse(self, features: dict[str, Features]) -> Tensor:  # (B, dim)
        joint = torch.cat([f.pooled for f in features.values()], dim=-1)
        present = presence(features)  # (B, M)
        candidates = torch.stack([self.candidate[name](f.pooled).tanh() for name, f in features.items()], dim=1)  # (B, M, dim)
        weights = masked_softmax(torch.stack([self.gate[name](joint) for name in features], dim=1), present.unsqueeze(-1), dim=1)
        return self.dropout((weights * candidates).sum(dim=1))
