"""Intermediate fusion: a bilinear form of two modalities, factorised, pooled by sums and normalised."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fusion.features import Features
from fusion.heads.base import FusionHead, check_options

# Below this the square root, whose slope at 0 is infinite, is replaced by the line through the origin that meets it; the L2 norm is clamped
# at its root. Together they scale no gradient by more than 1 / SMALLEST, which fp16 can represent.
SMALLEST = 1e-3


class FactorizedBilinear(FusionHead):
    """Multiply two modalities through low-rank bilinear forms, one for each output feature.

        z_i = sum_{k=1..rank} (u_ik . norm(x_1)) (v_ik . norm(x_2))        =        norm(x_1)' (sum_k u_ik v_ik') norm(x_2)
        y = s / |s|,    s = sign(z) sqrt(|z|)

    (Near 0, where their slopes would be infinite, both are linear.) Power normalisation compresses large products, L2 normalisation
    fixes the length of y. The factor of an absent modality is 1. For two modalities only.

    Source: Yu et al. (2017), "Multi-modal Factorized Bilinear Pooling with Co-attention Learning for Visual Question Answering" (MFB).
    Reads: pooled features (B, D_m).
    Cost: rank * dim * (D_1 + D_2) parameters and multiply-adds per sample.

    Args:
        dim: width of the fused features.
        rank: rank R of each output feature's bilinear form, the number of products that are summed.
        dropout: dropout probability on the products, before they are summed; from 0 to below 1.
        unimodal: also predict from each modality alone, by a linear layer on its pooled features (by_modality); model.balance turns it on.

    >>> head = FactorizedBilinear({"text": 8, "image": 16}, 3, dim=32)
    >>> head({"text": torch.randn(4, 8), "image": torch.randn(4, 16)}).output.shape
    torch.Size([4, 3])
    """

    stage = "pooled"
    family = "intermediate"
    most_modalities = 2

    def __init__(
        self, dims: Mapping[str, int], out_dim: int, *, dim: int = 256, rank: int = 5, dropout: float = 0.0, unimodal: bool = False
    ) -> None:
        check_options(type(self).__name__, dim=dim, rank=rank, dropout=dropout)
        super().__init__(dims, out_dim, width=dim, unimodal=unimodal)
        self.rank = rank
        self.norm = nn.ModuleDict({name: nn.LayerNorm(width) for name, width in dims.items()})
        self.factor = nn.ModuleDict({name: nn.Linear(width, dim * rank, bias=False) for name, width in dims.items()})
        self.dropout = nn.Dropout(dropout)

    def fuse(self, features: dict[str, Features]) -> Tensor:  # (B, dim)
        one, other = (factor_or_one(self.factor[name](self.norm[name](f.pooled)), f.present) for name, f in features.items())
        z = self.dropout(one * other).unflatten(-1, (-1, self.rank)).sum(dim=-1)
        rooted = signed_sqrt(z)
        return rooted / torch.linalg.vector_norm(rooted, dim=-1, keepdim=True).clamp(min=SMALLEST**0.5)


def factor_or_one(factor: Tensor, present: Tensor) -> Tensor:
    """A factor (B, D) of a product, 1 for samples without its modality, so that the product is that of the others."""
    return torch.where(present[:, None], factor, 1.0)


def signed_sqrt(z: Tensor) -> Tensor:
    """sign(z) sqrt(|z|), with a finite slope at 0."""
    size = z.abs()
    large = size > SMALLEST
    return torch.where(large, z.sign() * torch.where(large, size, SMALLEST).sqrt(), z / SMALLEST**0.5)
