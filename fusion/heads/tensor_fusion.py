"""Intermediate fusion: the outer product of all modalities."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fusion.features import Features, keep
from fusion.heads.base import FusionHead, check_options

LARGEST = 2**24  # entries of W: 64 MiB in float32


class TensorFusion(FusionHead):
    """Multiply every feature of each modality with every feature of the others, and apply a linear layer to all the products.

        h_m = GELU(U_m norm(x_m))            y = GELU(W vec([h_1; 1] (x) ... (x) [h_M; 1]))

    The appended ones add, besides the products of all M, those of every subset of the modalities and each alone. An absent modality
    has h_m = 0, which leaves the products of the others. Explicit and exact, but (embed + 1)^M wide: LowRankTensor applies a weight
    tensor of low rank without materialising the product.

    Source: Zadeh et al. (2017), "Tensor Fusion Network for Multimodal Sentiment Analysis".
    Reads: pooled features (B, D_m).
    Cost: sum(D_m) * embed + (embed + 1)^M * dim parameters and multiply-adds per sample; (embed + 1)^M * dim is at most 2^24.

    Args:
        embed: width to which each modality is projected before the products.
        dim: width of the fused features.
        dropout: dropout probability on the products and on the fused features; from 0 to below 1.
        unimodal: also predict from each modality alone, by a linear layer on its pooled features (by_modality); model.balance turns it on.

    >>> head = TensorFusion({"text": 8, "image": 16}, 3, embed=8, dim=32)
    >>> head({"text": torch.randn(4, 8), "image": torch.randn(4, 16)}).output.shape
    torch.Size([4, 3])
    """

    stage = "pooled"
    family = "intermediate"

    def __init__(
        self, dims: Mapping[str, int], out_dim: int, *, embed: int = 32, dim: int = 256, dropout: float = 0.0, unimodal: bool = False
    ) -> None:
        products = (embed + 1) ** len(dims)
        if products * dim > LARGEST:
            fitting = max((e for e in range(1, embed) if (e + 1) ** len(dims) * dim <= LARGEST), default=0)
            raise ValueError(
                f"TensorFusion: {embed + 1}^{len(dims)} products x dim {dim} are {products * dim:,} weights, more than {LARGEST:,}; "
                f"use {f'embed <= {fitting}, or ' if fitting else ''}LowRankTensor"
            )
        check_options(type(self).__name__, embed=embed, dim=dim, dropout=dropout)
        super().__init__(dims, out_dim, width=dim, unimodal=unimodal)
        self.embed = nn.ModuleDict(
            {name: nn.Sequential(nn.LayerNorm(width), nn.Linear(width, embed), nn.GELU()) for name, width in dims.items()}
        )
        self.mix = nn.Sequential(nn.Dropout(dropout), nn.Linear(products, dim), nn.GELU(), nn.Dropout(dropout))

    def fuse(self, features: dict[str, Features]) -> Tensor:  # (B, dim)
        joint: Tensor | None = None
        for name, f in features.items():
            h = keep(self.embed[name](f.pooled), f.present)
            h = torch.cat([h, torch.ones_like(h[:, :1])], dim=-1)
            joint = h if joint is None else torch.bmm(joint.unsqueeze(2), h.unsqueeze(1)).flatten(1)
        return self.mix(joint)
