"""Intermediate fusion: a few learned latents attend to the tokens of all modalities."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fusion.features import Features, joint_mask
from fusion.heads.attention import CrossAttentionLayer, Projection, SelfAttentionLayer
from fusion.heads.base import FusionHead, check_options
from fusion.heads.missing_tokens import Missing


class Perceiver(FusionHead):
    """Let a small array of latents alternate cross-attention to all tokens with self-attention.

        z <- z + Attention(z, [t_1; ...; t_M]); z <- z + FeedForward(z); z <- Transformer layer(z)            t_m = W_m norm(x_m) + type_m
        y = mean(norm(z))

    The layers process the latents, not the inputs, so that the cost is linear in the number of tokens. The tokens contain positions
    already (encoders add them). For a sample without any real token, cross-attention gives zeros. (The paper
    shares weights between its layers, and initialises the latents smaller.)

    Source: Jaegle et al. (2021), "Perceiver: General Perception with Iterative Attention".
    Reads: tokens (B, N_m, D_m), N = sum(N_m).
    Cost: sum(D_m) * dim + 24 * depth * dim^2 parameters (mlp_ratio 4); sum(N_m * D_m) * dim + depth * (2 * N * dim^2 + 2 * latents * N *
    dim) multiply-adds that depend on N.

    Args:
        dim: width of the tokens and latents, and of the fused features.
        depth: number of layers, each a cross-attention of the latents to the tokens and a transformer layer over the latents.
        latents: number of latents.
        num_heads: number of attention heads H, of which dim is a multiple.
        mlp_ratio: hidden width of the feed-forward layers, as a multiple of dim; above 0.
        dropout: dropout probability on the outputs of attention (not on its weights) and in the feed-forward layers; from 0 to below 1.
        unimodal: also predict from each modality alone, by a linear layer on its pooled features (by_modality); model.balance turns it on.
        missing: a modality that a sample lacks is "masked", or replaced by a "learned" token of its own for each pattern of present ones.

    >>> head = Perceiver({"text": 8, "image": 16}, 3, dim=32)
    >>> head({"text": torch.randn(4, 7, 8), "image": torch.randn(4, 49, 16)}).output.shape
    torch.Size([4, 3])
    """

    stage = "tokens"
    family = "intermediate"

    def __init__(
        self,
        dims: Mapping[str, int],
        out_dim: int,
        *,
        dim: int = 256,
        depth: int = 2,
        latents: int = 16,
        num_heads: int = 4,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        unimodal: bool = False,
        missing: Missing = "masked",
    ) -> None:
        check_options(type(self).__name__, dim=dim, depth=depth, latents=latents, num_heads=num_heads, mlp_ratio=mlp_ratio, dropout=dropout)
        super().__init__(dims, out_dim, width=dim, unimodal=unimodal, missing=missing)
        self.project = nn.ModuleDict({name: Projection(width, dim) for name, width in dims.items()})
        self.modality = nn.ParameterDict({name: nn.Parameter(0.02 * torch.randn(dim)) for name in dims})
        self.latents = nn.Parameter(torch.randn(latents, dim))
        options: dict[str, Any] = {"mlp_ratio": mlp_ratio, "dropout": dropout}
        self.read_layers = nn.ModuleList(CrossAttentionLayer(dim, num_heads, self_attention=False, **options) for _ in range(depth))
        self.think_layers = nn.ModuleList(SelfAttentionLayer(dim, num_heads, **options) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)

    def fuse(self, features: dict[str, Features]) -> Tensor:  # (B, dim)
        tokens = torch.cat([self.project[name](f.tokens) + self.modality[name] for name, f in features.items()], dim=1)
        mask = joint_mask(features)
        z = self.latents.expand(tokens.shape[0], -1, -1)
        for read, think in zip(self.read_layers, self.think_layers, strict=True):
            z = think(read(z, None, tokens, mask), None)
        return self.norm(z).mean(dim=1)
