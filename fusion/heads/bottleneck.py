"""Intermediate fusion: one transformer per modality, exchanging information through a few shared tokens."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fusion.features import Features, presence
from fusion.heads.attention import Projection, SelfAttentionLayer
from fusion.heads.base import FusionHead, check_options
from fusion.heads.missing_tokens import Missing


class Bottleneck(FusionHead):
    """Give each modality a transformer of its own, and exchange information only through a few bottleneck tokens.

        [x_m; z_m] <- Transformer_m([x_m; z])            z <- mean_m z_m            y = mean_m norm(x_m)_class

    All information exchanged between modalities passes through the `bottlenecks` tokens z in each layer, which makes each modality
    condense its information and keeps the cost linear in the number of modalities. Every modality has a class token. The means are over
    the modalities that a sample has.

    Source: Nagrani et al. (2021), "Attention Bottlenecks for Multimodal Fusion" (MBT).
    Reads: tokens (B, N_m, D_m).
    Cost: sum(D_m) * dim + 12 * M * depth * dim^2 parameters (mlp_ratio 4); for each modality and layer n * (12 * dim^2 + 2 * n * dim)
    multiply-adds, n = N_m + 1 + bottlenecks.

    Args:
        dim: width of the tokens and of the fused features.
        depth: number of layers of each modality's transformer, at least 2.
        num_heads: number of attention heads H, of which dim is a multiple.
        bottlenecks: number of bottleneck tokens z.
        fusion_layer: first layer that includes z, from 0 to depth - 2; the layers before it are unimodal.
        mlp_ratio: hidden width of the feed-forward layers, as a multiple of dim; above 0.
        dropout: dropout probability on the outputs of attention (not on its weights) and in the feed-forward layers; from 0 to below 1.
        unimodal: also predict from each modality alone, by a linear layer on its pooled features (by_modality); model.balance turns it on.
        missing: a modality that a sample lacks is "masked", or replaced by a "learned" token of its own for each pattern of present ones.

    >>> head = Bottleneck({"text": 8, "image": 16}, 3, dim=32)
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
        num_heads: int = 4,
        bottlenecks: int = 4,
        fusion_layer: int = 0,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        unimodal: bool = False,
        missing: Missing = "masked",
    ) -> None:
        # With fewer than two layers that include z, no class token ever depends on another modality.
        if not 0 <= fusion_layer <= depth - 2:
            raise ValueError(
                f"Bottleneck: fusion_layer is {fusion_layer} of {depth}; at least two layers must include the bottleneck tokens "
                "(one writes them, one reads them)"
            )
        check_options(type(self).__name__, dim=dim, num_heads=num_heads, bottlenecks=bottlenecks, mlp_ratio=mlp_ratio, dropout=dropout)
        super().__init__(dims, out_dim, width=dim, unimodal=unimodal, missing=missing)
        self.fusion_layer = fusion_layer
        self.project = nn.ModuleDict({name: Projection(width, dim) for name, width in dims.items()})
        self.class_tokens = nn.ParameterDict({name: nn.Parameter(0.02 * torch.randn(dim)) for name in dims})
        self.bottlenecks = nn.Parameter(0.02 * torch.randn(bottlenecks, dim))
        self.layers = nn.ModuleList(
            nn.ModuleDict({name: SelfAttentionLayer(dim, num_heads, mlp_ratio=mlp_ratio, dropout=dropout) for name in dims})
            for _ in range(depth)
        )
        self.norm = nn.ModuleDict({name: nn.LayerNorm(dim) for name in dims})

    def fuse(self, features: dict[str, Features]) -> Tensor:  # (B, dim)
        x: dict[str, Tensor] = {}
        mask: dict[str, Tensor | None] = {}
        joint_mask: dict[str, Tensor | None] = {}  # with the bottleneck tokens
        for name, f in features.items():
            size = f.tokens.shape[0]
            x[name] = torch.cat([self.class_tokens[name].expand(size, 1, -1), self.project[name](f.tokens)], dim=1)
            # The outputs of an absent modality's tokens, and of its class token, are not used.
            first = torch.ones_like(f.mask[:, :1])
            own = torch.cat([first, f.mask], dim=1)
            mask[name] = None if f.full else own
            joint_mask[name] = None if f.full else torch.cat([own, first.expand(-1, len(self.bottlenecks))], dim=1)
        present = presence(features)
        shared = self.bottlenecks.expand(present.shape[0], -1, -1)
        for depth, layer in enumerate(self.layers):
            if depth < self.fusion_layer:
                x = {name: layer.get_submodule(name)(x[name], mask[name]) for name in x}
                continue
            updated = []
            for name in x:
                y = layer.get_submodule(name)(torch.cat([x[name], shared], dim=1), joint_mask[name])
                x[name] = y[:, : -len(self.bottlenecks)]
                updated.append(y[:, -len(self.bottlenecks) :])
            shared = mean_of_present(torch.stack(updated, dim=1), present)
        return mean_of_present(torch.stack([self.norm[name](x[name][:, 0]) for name in x], dim=1), present)


def mean_of_present(x: Tensor, present: Tensor) -> Tensor:
    """Mean (B, ...) of x (B, M, ...) over the modalities that are present (B, M); zero if there are none."""
    mask = present.reshape(*present.shape, *[1] * (x.dim() - 2))
    masked = torch.where(mask, x, 0.0)
    return masked.sum(dim=1) / mask.sum(dim=1).clamp(min=1).to(x.dtype)
