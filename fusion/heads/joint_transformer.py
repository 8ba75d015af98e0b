"""Early fusion: patches and words in one transformer, from the first layer."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fusion.features import Features, joint_mask
from fusion.heads.attention import Projection, SelfAttentionLayer
from fusion.heads.base import FusionHead, check_options
from fusion.heads.missing_tokens import Missing


class JointTransformer(FusionHead):
    """One stream: every patch and every word attends to all others from the first layer on.

        t_m = W_m norm(x_m) + position + type_m            y = norm(Transformer([class; t_1; ...; t_M]))_class

    With modality-type embeddings, sinusoidal positions (Vaswani et al., 2017) for any length, a class token of its own and pre-norm layers.
    It reads the embeddings before any encoder layer; the encoders' layers are then removed.

    Source: Kim et al. (2021), "ViLT: Vision-and-Language Transformer Without Convolution or Region Supervision", after VisualBERT.
    Reads: tokens (B, N_m, D_m), N = 1 + sum(N_m).
    Cost: sum(D_m) * dim + 12 * depth * dim^2 parameters (mlp_ratio 4); depth * (12 * N * dim^2 + 2 * N^2 * dim) multiply-adds.

    Args:
        dim: width of the tokens and of the fused features.
        depth: number of transformer layers.
        num_heads: number of attention heads H, of which dim is a multiple.
        mlp_ratio: hidden width of the feed-forward layers, as a multiple of dim; above 0.
        dropout: dropout probability on the outputs of attention (not on its weights) and in the feed-forward layers; from 0 to below 1.
        positions: add sinusoidal positions to the tokens; False if the tokens already contain positions.
        unimodal: also predict from each modality alone, by a linear layer on its pooled features (by_modality); model.balance turns it on.
        missing: a modality that a sample lacks is "masked", or replaced by a "learned" token of its own for each pattern of present ones.

    >>> head = JointTransformer({"text": 8, "image": 16}, 3, dim=32, depth=2)
    >>> head({"text": torch.randn(4, 7, 8), "image": torch.randn(4, 49, 16)}).output.shape
    torch.Size([4, 3])
    """

    stage = "embeddings"
    family = "early"

    def __init__(
        self,
        dims: Mapping[str, int],
        out_dim: int,
        *,
        dim: int = 256,
        depth: int = 4,
        num_heads: int = 4,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        positions: bool = True,
        unimodal: bool = False,
        missing: Missing = "masked",
    ) -> None:
        check_options(type(self).__name__, dim=dim, depth=depth, num_heads=num_heads, mlp_ratio=mlp_ratio, dropout=dropout)
        super().__init__(dims, out_dim, width=dim, unimodal=unimodal, missing=missing)
        self.positions = positions
        self.project = nn.ModuleDict({name: Projection(width, dim) for name, width in dims.items()})
        self.modality = nn.ParameterDict({name: nn.Parameter(0.02 * torch.randn(dim)) for name in dims})
        self.class_token = nn.Parameter(0.02 * torch.randn(dim))
        self.layers = nn.ModuleList(SelfAttentionLayer(dim, num_heads, mlp_ratio=mlp_ratio, dropout=dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)

    def fuse(self, features: dict[str, Features]) -> Tensor:  # (B, dim)
        first = next(iter(features.values()))
        tokens = [self.class_token.expand(first.tokens.shape[0], 1, -1)]
        joint = joint_mask(features)
        mask = None if joint is None else torch.cat([torch.ones_like(first.mask[:, :1]), joint], dim=1)
        for name, f in features.items():
            t = self.project[name](f.tokens) + self.modality[name]
            tokens.append(t + positions(t, f.mask) if self.positions else t)
        x = torch.cat(tokens, dim=1)
        for layer in self.layers:
            x = layer(x, mask)
        return self.norm(x[:, 0])


def positions(tokens: Tensor, mask: Tensor) -> Tensor:
    """Sinusoidal positions (B, N, D), counted from each sample's first real token, so that padding before it has no effect."""
    position = torch.arange(tokens.shape[1], device=tokens.device) - mask.int().argmax(dim=1, keepdim=True)
    return sinusoid(tokens)[position.clamp(min=0)]


def sinusoid(tokens: Tensor) -> Tensor:
    """Sinusoidal positions (N, D) for tokens (B, N, D) (Vaswani et al., 2017)."""
    _, length, dim = tokens.shape
    position = torch.arange(length, device=tokens.device, dtype=torch.float32)[:, None]
    rate = torch.exp(torch.arange(0, dim, 2, device=tokens.device, dtype=torch.float32) * (-math.log(10000.0) / dim))
    return torch.stack([(position * rate).sin(), (position * rate).cos()], dim=-1).flatten(1)[:, :dim].to(tokens.dtype)
