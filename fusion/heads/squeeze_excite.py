"""Intermediate fusion: a joint summary of all modalities rescales the channels of each before pooling."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fusion.features import Features, keep, masked_mean, masked_softmax
from fusion.heads.base import FusionHead, check_options, default_modality
from fusion.heads.missing_tokens import Missing


class SqueezeExcite(FusionHead):
    """Squeeze every modality to its mean, and let the joint summary recalibrate each modality's channels and positions.

        x_m <- norm(x_m)            z = ReLU(W [mean(x_1); ...; mean(x_M)])            x_m <- 2 * sigmoid(E_m z) * x_m, channel by channel
        p_m = sum_n a_mn x_mn            a_m = softmax_n(v_m . tanh(U_m x_mn + V_m z)) for m in `spatial`, else uniform
        y = GELU(A [p_1; ...; p_M])

    The multimodal transfer module's recalibration, then spatial attention over the tokens of the modalities in `spatial`, with the same
    summary as query. An absent modality contributes nothing to z and y.

    Source: Joze et al. (2020), "MMTM: Multimodal Transfer Module for CNN Fusion"; the spatial attention after Xu et al. (2015), "Show,
    Attend and Tell".
    Reads: tokens (B, N_m, D_m), D = sum(D_m).
    Cost: (2 * D * squeeze) + D * dim parameters and, for the spatial attention, (D_m + squeeze) * attend; N_m * D_m * attend
    multiply-adds: linear in the tokens.

    Args:
        dim: width of the fused features.
        squeeze: width of the joint summary z.
        attend: hidden width of the spatial attention.
        spatial: modalities pooled by spatial attention; the others by their mean. None: the image, or else the last modality.
        dropout: dropout probability on the fused features; from 0 to below 1.
        unimodal: also predict from each modality alone, by a linear layer on its pooled features (by_modality); model.balance turns it on.
        missing: a modality that a sample lacks is "masked", or replaced by a "learned" token of its own for each pattern of present ones.

    >>> head = SqueezeExcite({"text": 8, "image": 16}, 3, dim=32)
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
        squeeze: int = 64,
        attend: int = 64,
        spatial: list[str] | None = None,
        dropout: float = 0.0,
        unimodal: bool = False,
        missing: Missing = "masked",
    ) -> None:
        check_options(type(self).__name__, dim=dim, squeeze=squeeze, attend=attend, dropout=dropout)
        super().__init__(dims, out_dim, width=dim, unimodal=unimodal, missing=missing)
        if isinstance(spatial, str):
            raise ValueError(f"SqueezeExcite: spatial is '{spatial}'; expected a list of modalities, such as ['{spatial}']")
        attended = [default_modality("image", dims)] if spatial is None else spatial
        if unknown := [name for name in attended if name not in dims]:
            raise ValueError(f"SqueezeExcite: spatial has the unknown modality '{unknown[0]}'; expected some of {', '.join(dims)}")
        self.norm = nn.ModuleDict({name: nn.LayerNorm(width) for name, width in dims.items()})
        self.squeeze = nn.Sequential(nn.Linear(sum(dims.values()), squeeze), nn.ReLU())
        self.excite = nn.ModuleDict({name: nn.Linear(squeeze, width) for name, width in dims.items()})
        self.places = nn.ModuleDict({name: SpatialAttention(dims[name], squeeze, attend) for name in dims if name in attended})
        self.mix = nn.Sequential(nn.Linear(sum(dims.values()), dim), nn.GELU(), nn.Dropout(dropout))

    def fuse(self, features: dict[str, Features]) -> Tensor:  # (B, dim)
        x = {name: self.norm[name](f.tokens) for name, f in features.items()}
        z = self.squeeze(torch.cat([masked_mean(x[name], f.mask) for name, f in features.items()], dim=-1))
        pooled = []
        for name, f in features.items():
            gate = 2 * self.excite[name](z).sigmoid()
            if name in self.places:
                pooled.append(self.places[name](x[name] * gate[:, None], z, f.mask))
            else:
                pooled.append(masked_mean(x[name], f.mask) * gate)  # the gate doesn't depend on the position
        return self.mix(torch.cat(pooled, dim=-1))


class SpatialAttention(nn.Module):
    """Attention pooling of real tokens (B, N, D) to (B, D), with a summary (B, S) as query."""

    def __init__(self, dim: int, summary_dim: int, attend: int) -> None:
        super().__init__()
        self.token = nn.Linear(dim, attend)
        self.summary = nn.Linear(summary_dim, attend, bias=False)
        self.score = nn.Linear(attend, 1, bias=False)

    def forward(self, tokens: Tensor, summary: Tensor, mask: Tensor) -> Tensor:
        weights = self.attention_weights(tokens, summary, mask)[:, 0]  # (B, 1, N)
        return (weights @ keep(tokens, mask)).squeeze(1)

    def attention_weights(self, tokens: Tensor, summary: Tensor, mask: Tensor) -> Tensor:
        """Returns the attention weights (B, 1, 1, N) of one head and one query."""
        scores = self.score((self.token(tokens) + self.summary(summary)[:, None]).tanh()).mT  # (B, 1, N)
        return masked_softmax(scores, mask[:, None], dim=-1)[:, None]
