"""Intermediate fusion: a bilinear form of two modalities by Tucker decomposition with a core of low rank."""

from collections.abc import Mapping

from torch import Tensor, nn

from fusion.features import Features
from fusion.heads.base import FusionHead, check_options
from fusion.heads.factorized_bilinear import factor_or_one


class Mutan(FusionHead):
    """Project both modalities to a small width, and sum a few products of linear maps of them.

        h_m = tanh(W_m norm(x_m))            y = sum_{r=1..rank} (M_r h_1 + a_r) * (N_r h_2 + b_r)

    A Tucker decomposition of the full bilinear tensor whose core, seen from each output feature, is a matrix of rank `rank`: y_k = h_1'
    (sum_r m_rk n_rk') h_2, and, by the biases a_r and b_r, terms linear in each alone. The factor of an absent modality is 1. For two
    modalities only.

    Source: Ben-younes et al. (2017), "MUTAN: Multimodal Tucker Fusion for Visual Question Answering".
    Reads: pooled features (B, D_m).
    Cost: (D_1 + D_2) * embed + 2 * rank * embed * dim parameters and multiply-adds per sample.

    Args:
        embed: width of h_m, to which each modality is projected.
        dim: width of the fused features.
        rank: rank R of the core, the number of products that are summed.
        dropout: dropout probability on the projected modalities h_m; from 0 to below 1.
        unimodal: also predict from each modality alone, by a linear layer on its pooled features (by_modality); model.balance turns it on.

    >>> import torch
    >>> head = Mutan({"text": 8, "image": 16}, 3, embed=16, dim=32)
    >>> head({"text": torch.randn(4, 8), "image": torch.randn(4, 16)}).output.shape
    torch.Size([4, 3])
    """

    stage = "pooled"
    family = "intermediate"
    most_modalities = 2

    def __init__(
        self,
        dims: Mapping[str, int],
        out_dim: int,
        *,
        embed: int = 128,
        dim: int = 256,
        rank: int = 5,
        dropout: float = 0.0,
        unimodal: bool = False,
    ) -> None:
        check_options(type(self).__name__, embed=embed, dim=dim, rank=rank, dropout=dropout)
        super().__init__(dims, out_dim, width=dim, unimodal=unimodal)
        self.rank = rank
        self.embed = nn.ModuleDict(
            {
                name: nn.Sequential(nn.LayerNorm(width), nn.Linear(width, embed), nn.Tanh(), nn.Dropout(dropout))
                for name, width in dims.items()
            }
        )
        self.factor = nn.ModuleDict({name: nn.Linear(embed, rank * dim) for name in dims})

    def fuse(self, features: dict[str, Features]) -> Tensor:  # (B, dim)
        one, other = (factor_or_one(self.factor[name](self.embed[name](f.pooled)), f.present) for name, f in features.items())
        return (one * other).unflatten(-1, (self.rank, -1)).sum(dim=1)
