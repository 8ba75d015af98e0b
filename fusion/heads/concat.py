"""Intermediate fusion: concatenation of the pooled features."""

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn

from fusion.features import Features, keep
from fusion.heads.base import FusionHead, check_options


class Concat(FusionHead):
    """Concatenate the pooled features and mix them with a small MLP.

        y = dropout(GELU(W [norm(x_1); ...; norm(x_M)] + b))

    An absent modality is replaced by zeros.

    Source: the simplest intermediate fusion, and the baseline of most papers.
    Reads: pooled features (B, D_m).
    Cost: sum(D_m) * dim parameters and multiply-adds per sample.

    Args:
        dim: width of the hidden layers and of the fused features.
        depth: number of hidden layers.
        dropout: dropout probability on each hidden layer's output; from 0 to below 1.
        unimodal: also predict from each modality alone, by a linear layer on its pooled features (by_modality); model.balance turns it on.

    >>> head = Concat({"text": 8, "image": 16}, 3, dim=32)
    >>> head({"text": torch.randn(4, 8), "image": torch.randn(4, 49, 16)}).output.shape
    torch.Size([4, 3])
    """

    stage = "pooled"
    family = "intermediate"

    def __init__(
        self, dims: Mapping[str, int], out_dim: int, *, dim: int = 256, depth: int = 1, dropout: float = 0.0, unimodal: bool = False
    ) -> None:
        if depth < 1:
            raise ValueError(f"Concat: depth is {depth}; expected at least 1 hidden layer")
        check_options(type(self).__name__, dim=dim, dropout=dropout)
        super().__init__(dims, out_dim, width=dim, unimodal=unimodal)
        self.norm = nn.ModuleDict({name: nn.LayerNorm(width) for name, width in dims.items()})
        widths = [sum(dims.values()), *[dim] * depth]
        layers: list[nn.Module] = []
        for in_width, out_width in pairwise(widths):
            layers += [nn.Linear(in_width, out_width), nn.GELU(), nn.Dropout(dropout)]
        self.mix = nn.Sequential(*layers)

    def fuse(self, features: dict[str, Features]) -> Tensor:  # (B, dim)
        return self.mix(torch.cat([keep(self.norm[name](f.pooled), f.present) for name, f in features.items()], dim=-1))
