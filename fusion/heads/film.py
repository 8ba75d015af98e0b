"""Intermediate fusion: one modality scales and shifts the features of the other."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from fusion.features import Features, keep
from fusion.heads.base import FusionHead, check_options, stream_and_other


class FiLM(FusionHead):
    """Let one modality (the text) modulate every feature of the other (the image), block by block.

        h = ReLU(A_i x)            x <- h + ReLU(gamma_i * norm(B_i h) + beta_i)            [gamma_i - 1; beta_i] = W_i c
        y = x after depth blocks

    Feature-wise linear modulation of x by c. The norm has no parameters of its own, as in the paper, since gamma and beta are its
    parameters; it is a layer norm, which doesn't mix samples. A sample without c has gamma = 1, beta = 0; without x, x starts as zeros.
    For two modalities only.

    Source: Perez et al. (2018), "FiLM: Visual Reasoning with a General Conditioning Layer".
    Reads: pooled features (B, D_m).
    Cost: depth * (2 * dim^2 + 2 * D_c * dim) + D_x * dim parameters and multiply-adds per sample.

    Args:
        dim: width of the blocks and of the fused features.
        depth: number of blocks.
        stream: the modality x that is modulated by the other, c. None: the image, or else the last modality.
        dropout: dropout probability on the fused features; from 0 to below 1.
        unimodal: also predict from each modality alone, by a linear layer on its pooled features (by_modality); model.balance turns it on.

    >>> head = FiLM({"text": 8, "image": 16}, 3, dim=32)
    >>> head({"text": torch.randn(4, 8), "image": torch.randn(4, 49, 16)}).output.shape
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
        dim: int = 256,
        depth: int = 2,
        stream: str | None = None,
        dropout: float = 0.0,
        unimodal: bool = False,
    ) -> None:
        check_options(type(self).__name__, dim=dim, depth=depth, dropout=dropout)
        super().__init__(dims, out_dim, width=dim, unimodal=unimodal)
        self.stream, self.condition = stream_and_other("FiLM", dims, stream, usual="image")
        self.norm_stream = nn.LayerNorm(dims[self.stream])
        self.norm_condition = nn.LayerNorm(dims[self.condition])
        self.project = nn.Linear(dims[self.stream], dim)
        self.first = nn.ModuleList(nn.Linear(dim, dim) for _ in range(depth))
        self.second = nn.ModuleList(nn.Linear(dim, dim, bias=False) for _ in range(depth))
        self.modulate = nn.ModuleList(nn.Linear(dims[self.condition], 2 * dim) for _ in range(depth))
        self.dropout = nn.Dropout(dropout)

    def fuse(self, features: dict[str, Features]) -> Tensor:  # (B, dim)
        stream, condition = features[self.stream], features[self.condition]
        c = self.norm_condition(condition.pooled)
        x = keep(self.project(self.norm_stream(stream.pooled)), stream.present)
        for first, second, modulate in zip(self.first, self.second, self.modulate, strict=True):
            scale, shift = keep(modulate(c), condition.present).chunk(2, dim=-1)
            h = first(x).relu()
            y = second(h)
            x = h + torch.relu((1 + scale) * layer_norm(y, y.shape[-1:]) + shift)
        return self.dropout(x)
