"""Cross-attention fusion through tanh gates: it starts as the text model alone and learns to use the image."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fusion.features import Features
from fusion.heads.attention import CrossAttentionLayer, Projection, SelfAttentionLayer
from fusion.heads.base import FusionHead, check_options, stream_and_other
from fusion.heads.missing_tokens import Missing


class GatedCrossAttention(FusionHead):
    """Let one modality (the text) attend to the other through gates that are closed at the start.

        x <- x + tanh(g) * Attention(x, c); x <- x + tanh(g') * FeedForward(x); x <- Transformer layer(x)            g = g' = 0 at first
        y = norm(x)_class

    x is preceded by a class token. While the gates are 0 the output depends on x alone, so that a pretrained text encoder is not
    disturbed by untrained cross-attention. A sample without x still attends to c with the class token. For two modalities only.

    Source: Alayrac et al. (2022), "Flamingo: a Visual Language Model for Few-Shot Learning" (its gated xattn-dense layers).
    Reads: tokens (B, N_m, D_m), n = N_x + 1.
    Cost: sum(D_m) * dim + 24 * depth * dim^2 parameters (mlp_ratio 4); for each layer n * (22 * dim^2 + 2 * n * dim + 2 * N_c * dim) + 2 *
    N_c * dim^2 multiply-adds: linear in the tokens of c.

    Args:
        dim: width of the tokens and of the fused features.
        depth: number of layers, each a gated cross-attention to c and a transformer layer over x.
        num_heads: number of attention heads H, of which dim is a multiple.
        stream: the modality x that attends to the other, c. None: the text, or else the first modality.
        mlp_ratio: hidden width of the feed-forward layers, as a multiple of dim; above 0.
        dropout: dropout probability on the outputs of attention (not on its weights) and in the feed-forward layers; from 0 to below 1.
        unimodal: also predict from each modality alone, by a linear layer on its pooled features (by_modality); model.balance turns it on.
        missing: a modality that a sample lacks is "masked", or replaced by a "learned" token of its own for each pattern of present ones.

    >>> head = GatedCrossAttention({"text": 8, "image": 16}, 3, dim=32)
    >>> head({"text": torch.randn(4, 7, 8), "image": torch.randn(4, 49, 16)}).output.shape
    torch.Size([4, 3])
    """

    stage = "tokens"
    family = "cross-attention"
    reads_shared = True
    most_modalities = 2

    def __init__(
        self,
        dims: Mapping[str, int],
        out_dim: int,
        *,
        dim: int = 256,
        depth: int = 2,
        num_heads: int = 4,
        stream: str | None = None,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        unimodal: bool = False,
        missing: Missing = "masked",
    ) -> None:
        check_options(type(self).__name__, dim=dim, depth=depth, num_heads=num_heads, mlp_ratio=mlp_ratio, dropout=dropout)
        super().__init__(dims, out_dim, width=dim, unimodal=unimodal, missing=missing)
        self.stream, self.condition = stream_and_other("GatedCrossAttention", dims, stream, usual="text")
        options: dict[str, Any] = {"mlp_ratio": mlp_ratio, "dropout": dropout}
        self.project = nn.ModuleDict({name: Projection(width, dim) for name, width in dims.items()})
        self.class_token = nn.Parameter(0.02 * torch.randn(dim))
        self.cross_layers = nn.ModuleList(
            CrossAttentionLayer(dim, num_heads, self_attention=False, tanh_gate=True, **options) for _ in range(depth)
        )
        self.self_layers = nn.ModuleList(SelfAttentionLayer(dim, num_heads, **options) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)

    def fuse(self, features: dict[str, Features]) -> Tensor:  # (B, dim)
        stream, condition = features[self.stream].unshared(), features[self.condition]
        x = self.project[self.stream](stream.tokens)
        x = torch.cat([self.class_token.expand(x.shape[0], 1, -1), x], dim=1)
        mask = None if stream.full else torch.cat([torch.ones_like(stream.mask[:, :1]), stream.mask], dim=1)
        context = self.project[self.condition](condition.tokens)
        for cross, own in zip(self.cross_layers, self.self_layers, strict=True):
            x = own(cross(x, mask, context, condition.attention_mask, condition.indices), mask)
        return self.norm(x[:, 0])
