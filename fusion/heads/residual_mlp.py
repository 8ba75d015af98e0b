"""Intermediate fusion: residual MLP blocks over the concatenated pooled features."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fusion.features import Features, keep
from fusion.heads.attention import FeedForward
from fusion.heads.base import FusionHead, check_options


class ResidualMLP(FusionHead):
    """Concatenate the pooled features and refine the joint vector with residual blocks.

        x = W [norm(x_1); ...; norm(x_M)]            x <- x + W_2 GELU(W_1 norm(x)), depth times            y = norm(x)

    Trains at greater depth than Concat, since each block adds to an identity path. An absent modality is replaced by zeros.

    Source: Gorishniy et al. (2021), "Revisiting Deep Learning Models for Tabular Data" (its ResNet, with layer norm for batch
    norm and GELU for ReLU), after He et al. (2016).
    Reads: pooled features (B, D_m).
    Cost: sum(D_m) * dim + 2 * depth * mlp_ratio * dim^2 parameters and multiply-adds per sample.

    Args:
        dim: width of the joint vector, which the blocks refine to the fused features.
        depth: number of residual blocks.
        mlp_ratio: hidden width of the blocks, as a multiple of dim; above 0.
        dropout: dropout probability on each block's hidden layer and output; from 0 to below 1.
        unimodal: also predict from each modality alone, by a linear layer on its pooled features (by_modality); model.balance turns it on.

    >>> head = ResidualMLP({"text": 8, "image": 16}, 3, dim=32)
    >>> head({"text": torch.randn(4, 8), "image": torch.randn(4, 16)}).output.shape
    torch.Size([4, 3])
    """

    stage = "pooled"
    family = "intermediate"

    def __init__(
        self,
        dims: Mapping[str, int],
        out_dim: int,
        *,
        dim: int = 256,
        depth: int = 2,
        mlp_ratio: float = 2.0,
        dropout: float = 0.0,
        unimodal: bool = False,
    ) -> None:
        check_options(type(self).__name__, dim=dim, depth=depth, mlp_ratio=mlp_ratio, dropout=dropout)
        super().__init__(dims, out_dim, width=dim, unimodal=unimodal)
        self.norm = nn.ModuleDict({name: nn.LayerNorm(width) for name, width in dims.items()})
        self.project = nn.Linear(sum(dims.values()), dim)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(dim), FeedForward(dim, mlp_ratio=mlp_ratio, dropout=dropout)) for _ in range(depth)
        )
        self.norm_joint = nn.LayerNorm(dim)

    def fuse(self, features: dict[str, Features]) -> Tensor:  # (B, dim)
        x = self.project(torch.cat([keep(self.norm[name](f.pooled), f.present) for name, f in features.items()], dim=-1))
        for block in self.blocks:
            x = x + block(x)
        return self.norm_joint(x)
