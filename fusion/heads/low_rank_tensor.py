"""Intermediate fusion: a low-rank weight tensor over the outer product of all modalities, which is never materialised."""

from collections.abc import Mapping

from torch import Tensor, nn

from fusion.features import Features, keep
from fusion.heads.base import FusionHead, check_options


class LowRankTensor(FusionHead):
    """TensorFusion with a weight tensor of low rank: one linear map per modality, and their outputs multiplied.

        y = sum_{r=1..rank} prod_m W_m^r [norm(x_m); 1]        =        sum_r (W_1^r (x) ... (x) W_M^r) . ([x_1; 1] (x) ... (x) [x_M; 1])

    Both sides are equal; only the left one is computed, so that the outer product is never materialised. The appended 1 is the bias of
    each map, and all that an absent modality contributes: the products of the others remain.

    Source: Liu et al. (2018), "Efficient Low-rank Multimodal Fusion with Modality-Specific Factors" (LMF).
    Reads: pooled features (B, D_m).
    Cost: rank * dim * sum(D_m + 1) parameters and multiply-adds per sample.

    Args:
        rank: rank R of the weight tensor, the number of products that are summed.
        dim: width of the fused features.
        dropout: dropout probability on the fused features; from 0 to below 1.
        unimodal: also predict from each modality alone, by a linear layer on its pooled features (by_modality); model.balance turns it on.

    >>> import torch
    >>> head = LowRankTensor({"text": 8, "image": 16}, 3, rank=4, dim=32)
    >>> head({"text": torch.randn(4, 8), "image": torch.randn(4, 16)}).output.shape
    torch.Size([4, 3])
    """

    stage = "pooled"
    family = "intermediate"

    def __init__(
        self, dims: Mapping[str, int], out_dim: int, *, rank: int = 8, dim: int = 256, dropout: float = 0.0, unimodal: bool = False
    ) -> None:
        check_options(type(self).__name__, rank=rank, dim=dim, dropout=dropout)
        super().__init__(dims, out_dim, width=dim, unimodal=unimodal)
        self.rank = rank
        self.norm = nn.ModuleDict({name: nn.LayerNorm(width) for name, width in dims.items()})
        self.factor = nn.ModuleDict({name: nn.Linear(width, rank * dim) for name, width in dims.items()})
        self.dropout = nn.Dropout(dropout)

    def fuse(self, features: dict[str, Features]) -> Tensor:  # (B, dim)
        product: Tensor | None = None
        for name, f in features.items():
            factor = self.factor[name](keep(self.norm[name](f.pooled), f.present))
            product = factor if product is None else product * factor
        assert product is not None
        return self.dropout(product.unflatten(-1, (self.rank, -1)).sum(dim=1))
