"""Cross-attention fusion: the tokens of one modality attend to those of another."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fusion.features import Features, keep, masked_mean
from fusion.heads.attention import CrossAttentionLayer, Projection
from fusion.heads.base import FusionHead, check_options
from fusion.heads.missing_tokens import Missing


class CrossAttention(FusionHead):
    """Let the tokens of one modality attend to the tokens of another, layer by layer.

        x_a <- x_a + SelfAttention(x_a);   x_a <- x_a + g * Attention(x_a, x_b);   x_a <- x_a + g' * FeedForward(x_a)
        y = GELU(W norm([mean(x_1); ...; mean(x_M)]))

    A modality that provides only keys and values contributes the mean of its projected tokens to y, so that y stays informative for a
    sample without the query modality.

    Source: Tan and Bansal (2019), "LXMERT: Learning Cross-Modality Encoder Representations from Transformers"; there cross-attention comes
    before self-attention, and both directions share its weights.
    Reads: tokens (B, N_m, D_m).
    Cost: (sum(D_m) + M * dim) * dim parameters, and for each direction and layer 16 * dim^2 (12 without self-attention; mlp_ratio 4); 2 *
    N_a * N_b * dim multiply-adds for cross-attention: linear in the tokens of the other modality.

    Args:
        dim: width of the tokens and of the fused features.
        depth: number of layers.
        num_heads: number of attention heads H, of which dim is a multiple.
        direction: which modality provides queries, and which keys and values: "text_to_image", "image_to_text" (or any other two names),
            "text_to_all" (all the others), or "both" (every modality attends to all the others, as they were before the layer).
        self_attention: begin each layer with self-attention over the query tokens.
        tanh_gate: make g and g' the tanh of learned scalars, which start at 0 (Flamingo); else both are 1.
        mlp_ratio: hidden width of the feed-forward layers, as a multiple of dim; above 0.
        dropout: dropout probability on the outputs of attention (not on its weights), in the feed-forward layers and on the fused features.
        unimodal: also predict from each modality alone, by a linear layer on its pooled features (by_modality); model.balance turns it on.
        missing: a modality that a sample lacks is "masked", or replaced by a "learned" token of its own for each pattern of present ones.

    >>> head = CrossAttention({"text": 8, "image": 16}, 3, dim=32, direction="text_to_image")
    >>> head({"text": torch.randn(4, 7, 8), "image": torch.randn(4, 49, 16)}).output.shape
    torch.Size([4, 3])
    """

    stage = "tokens"
    family = "cross-attention"
    reads_shared = True

    def __init__(
        self,
        dims: Mapping[str, int],
        out_dim: int,
        *,
        dim: int = 256,
        depth: int = 2,
        num_heads: int = 4,
        direction: str = "both",
        self_attention: bool = True,
        tanh_gate: bool = False,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        unimodal: bool = False,
        missing: Missing = "masked",
    ) -> None:
        check_options(type(self).__name__, dim=dim, depth=depth, num_heads=num_heads, mlp_ratio=mlp_ratio, dropout=dropout)
        super().__init__(dims, out_dim, width=dim, unimodal=unimodal, missing=missing)
        self.reads = context_modalities(direction, list(dims))
        self.project = nn.ModuleDict({name: Projection(width, dim) for name, width in dims.items()})
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    name: CrossAttentionLayer(
                        dim, num_heads, mlp_ratio=mlp_ratio, dropout=dropout, self_attention=self_attention, tanh_gate=tanh_gate
                    )
                    for name in self.reads
                }
            )
            for _ in range(depth)
        )
        self.mix = nn.Sequential(nn.LayerNorm(len(dims) * dim), nn.Linear(len(dims) * dim, dim), nn.GELU(), nn.Dropout(dropout))

    def fuse(self, features: dict[str, Features]) -> Tensor:  # (B, dim)
        # A modality that provides only keys and values is the same for all samples that share it: it stays shared.
        features = {name: f.unshared() if name in self.reads else f for name, f in features.items()}
        x = {name: f._replace(tokens=self.project[name](f.tokens)) for name, f in features.items()}
        for layer in self.layers:
            context = {name: joined([x[other] for other in others]) for name, others in self.reads.items()}
            x = x | {
                name: own._replace(tokens=layer.get_submodule(name)(own.tokens, own.attention_mask, c.tokens, c.attention_mask, c.indices))
                for name, c in context.items()
                for own in [x[name]]
            }
        return self.mix(torch.cat([mean(f) for f in x.values()], dim=-1))


def joined(features: list[Features]) -> Features:
    """Concatenates the tokens of several modalities to (B, K, D); a single one is not copied. The pooled features are the first's."""
    if len(features) == 1:
        return features[0]
    own = [f.unshared() for f in features]
    tokens, mask = torch.cat([f.tokens for f in own], dim=1), torch.cat([f.mask for f in own], dim=1)
    return own[0]._replace(tokens=tokens, mask=mask, full=all(f.full for f in own))


def mean(features: Features) -> Tensor:
    """Mean (B, D) of each sample's real tokens."""
    pooled = masked_mean(features.tokens, features.distinct_mask)
    return pooled if features.indices is None else keep(pooled.index_select(0, features.indices), features.present)


def context_modalities(direction: str, names: list[str]) -> dict[str, list[str]]:
    """For each modality that provides queries, those that provide keys and values.

    >>> context_modalities("text_to_image", ["text", "image"]), context_modalities("text_to_all", ["text", "image", "facts"])
    ({'text': ['image']}, {'text': ['image', 'facts']})
    """
    if direction == "both":
        return {name: [other for other in names if other != name] for name in names}
    directions = {f"{a}_to_{b}": {a: [b]} for a in names for b in names if a != b}
    directions |= {f"{a}_to_all": {a: [b for b in names if b != a]} for a in names}
    if direction not in directions:
        raise ValueError(f"CrossAttention: unknown direction '{direction}'; expected both, {', '.join(directions)}")
    return directions[direction]
