"""Cross-attention fusion: two streams that attend to each other, layer by layer."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fusion.features import Features, masked_mean
from fusion.heads.attention import CrossAttentionLayer, Projection, SelfAttentionLayer
from fusion.heads.base import FusionHead, check_options
from fusion.heads.factorized_bilinear import factor_or_one
from fusion.heads.missing_tokens import Missing


class CoAttention(FusionHead):
    """Two symmetric streams: in each layer each attends to the other, then to itself.

        x_a <- x_a + Attention(x_a, x_b); x_a <- x_a + FeedForward(x_a); x_a <- Transformer layer(x_a); likewise x_b
        y = tanh(W_a mean(norm(x_a))) * tanh(W_b mean(norm(x_b)))

    The two pooled streams are multiplied, as in ViLBERT's question answering (with their first tokens, and no tanh); the factor of an
    absent modality is 1. For two modalities only; CrossAttention with direction "both" accepts more, and concatenates the streams.

    Source: Lu et al. (2019), "ViLBERT: Pretraining Task-Agnostic Visiolinguistic Representations for Vision-and-Language Tasks".
    Reads: tokens (B, N_m, D_m).
    Cost: (sum(D_m) + 2 * dim) * dim parameters, and for each modality and layer 24 * dim^2 (mlp_ratio 4); N_a * (22 * dim^2 + 2 * N_a *
    dim + 2 * N_b * dim) + 2 * N_b * dim^2 multiply-adds.

    Args:
        dim: width of the tokens and of the fused features.
        depth: number of layers, each cross-attention to the other stream, then self-attention.
        num_heads: number of attention heads H, of which dim is a multiple.
        mlp_ratio: hidden width of the feed-forward layers, as a multiple of dim; above 0.
        dropout: dropout probability on the outputs of attention (not on its weights), in the feed-forward layers and on the fused features.
        unimodal: also predict from each modality alone, by a linear layer on its pooled features (by_modality); model.balance turns it on.
        missing: a modality that a sample lacks is "masked", or replaced by a "learned" token of its own for each pattern of present ones.

    >>> import torch
    >>> head = CoAttention({"text": 8, "image": 16}, 3, dim=32)
    >>> head({"text": torch.randn(4, 7, 8), "image": torch.randn(4, 49, 16)}).output.shape
    torch.Size([4, 3])
    """

    stage = "tokens"
    family = "cross-attention"
    most_modalities = 2

    def __init__(
        self,
        dims: Mapping[str, int],
        out_dim: int,
        *,
        dim: int = 256,
        depth: int = 2,
        num_heads: int = 4,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        unimodal: bool = False,
        missing: Missing = "masked",
    ) -> None:
        check_options(type(self).__name__, dim=dim, depth=depth, num_heads=num_heads, mlp_ratio=mlp_ratio, dropout=dropout)
        super().__init__(dims, out_dim, width=dim, unimodal=unimodal, missing=missing)
        options: dict[str, Any] = {"mlp_ratio": mlp_ratio, "dropout": dropout}
        self.project = nn.ModuleDict({name: Projection(width, dim) for name, width in dims.items()})
        self.cross_layers = nn.ModuleList(
            nn.ModuleDict({name: CrossAttentionLayer(dim, num_heads, self_attention=False, **options) for name in dims})
            for _ in range(depth)
        )
        self.self_layers = nn.ModuleList(
            nn.ModuleDict({name: SelfAttentionLayer(dim, num_heads, **options) for name in dims}) for _ in range(depth)
        )
        self.norm = nn.ModuleDict({name: nn.LayerNorm(dim) for name in dims})
        self.pool = nn.ModuleDict({name: nn.Sequential(nn.Linear(dim, dim), nn.Tanh()) for name in dims})
        self.dropout = nn.Dropout(dropout)

    def fuse(self, features: dict[str, Features]) -> Tensor:  # (B, dim)
        a, b = features
        mask = {name: f.attention_mask for name, f in features.items()}
        x = {name: self.project[name](f.tokens) for name, f in features.items()}
        for cross, own in zip(self.cross_layers, self.self_layers, strict=True):
            x = {one: cross.get_submodule(one)(x[one], mask[one], x[other], mask[other]) for one, other in ((a, b), (b, a))}
            x = {name: own.get_submodule(name)(x[name], mask[name]) for name in x}
        one, other = (
            factor_or_one(self.pool[name](masked_mean(self.norm[name](x[name]), f.mask)), f.present) for name, f in features.items()
        )
        return self.dropout(one * other)
