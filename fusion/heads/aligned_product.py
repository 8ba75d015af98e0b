"""Intermediate fusion: products of features that were projected to one width, in pairs of equal or of all indices."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from fusion.features import Features
from fusion.heads.base import FusionHead, check_dims, check_options
from fusion.heads.factorized_bilinear import factor_or_one

WIDEST = 256  # of "cross": the dim^3 weights of its first pre-output layer are then 64 MiB in float32


class AlignedProduct(FusionHead):
    """Project the modalities to one width, and classify the products of their features: the feature interaction matrix, or its diagonal.

        h_m = sqrt(dim) u_m / |u_m|,    u_m = U_m norm(x_m)
        z = h_1 * ... * h_M ("align")    or    vec(h_1 h_2') ("cross")            y = pre-output layers(z), each ReLU(W z)

    Aligned encoders, such as those of CLIP, put what belongs together into the same dimensions: the diagonal then suffices, and takes any
    number of modalities; "cross" is for two. The factor of an absent modality is 1, so that z is that of the others. (The paper scales
    h_m to length 1; here its entries have a mean square of 1, so that products don't shrink with dim.)

    Source: Kumar and Nandakumar (2022), "Hate-CLIPper: Multimodal Hateful Meme Classification based on Cross-modal Interaction of CLIP
    Features".
    Reads: pooled features (B, D_m).
    Cost: (sum(D_m) + depth * dim) * dim parameters and multiply-adds per sample; dim^3 instead of dim^2 in the first pre-output layer of
    "cross", whose dim is at most 256.

    Args:
        dim: width of the projections, of the pre-output layers and of the fused features.
        interaction: "align" multiplies features of equal index, "cross" all pairs of features of two modalities.
        depth: number of pre-output layers.
        dropout: dropout probability on the projections, on the products and after each pre-output layer; from 0 to below 1.
        unimodal: also predict from each modality alone, by a linear layer on its pooled features (by_modality); model.balance turns it on.

    >>> head = AlignedProduct({"text": 8, "image": 16}, 3, dim=32)
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
        interaction: Literal["align", "cross"] = "align",
        depth: int = 1,
        dropout: float = 0.0,
        unimodal: bool = False,
    ) -> None:
        if interaction not in ("align", "cross"):
            raise ValueError(f"AlignedProduct: interaction is '{interaction}'; expected align or cross")
        check_options(type(self).__name__, dim=dim, depth=depth, dropout=dropout)
        products = dim
        if interaction == "cross":
            check_dims("AlignedProduct with interaction 'cross'", dims, self.fewest_modalities, 2, self.narrowest)
            if dim > WIDEST:
                raise ValueError(
                    f"AlignedProduct: {dim}^2 products x dim {dim} are {dim**3:,} weights; use dim <= {WIDEST}, interaction 'align' "
                    "or LowRankTensor"
                )
            products = dim**2
        super().__init__(dims, out_dim, width=dim, unimodal=unimodal)
        self.interaction = interaction
        self.project = nn.ModuleDict(
            {name: nn.Sequential(nn.LayerNorm(width), nn.Linear(width, dim), nn.Dropout(dropout)) for name, width in dims.items()}
        )
        self.dropout = nn.Dropout(dropout)
        widths = [products, *[dim] * depth]
        layers = [nn.Sequential(nn.Linear(a, b), nn.ReLU(), nn.Dropout(dropout)) for a, b in pairwise(widths)]
        self.pre_output = nn.Sequential(*layers)

    def fuse(self, features: dict[str, Features]) -> Tensor:  # (B, dim)
        factors = [factor_or_one(self.factor(name, f.pooled), f.present) for name, f in features.items()]
        if self.interaction == "cross":
            products = torch.bmm(factors[0].unsqueeze(2), factors[1].unsqueeze(1)).flatten(1)
        else:
            products = factors[0]
            for factor in factors[1:]:
                products = products * factor
        return self.pre_output(self.dropout(products))

    def factor(self, name: str, pooled: Tensor) -> Tensor:
        """The projection (B, dim) of a modality's pooled features (B, D), its entries scaled to a mean square of 1."""
        u = self.project[name](pooled)
        return rms_norm(u, u.shape[-1:], eps=1e-5)
