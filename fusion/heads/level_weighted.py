"""Intermediate fusion: several depths of each encoder, weighted per sample."""

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from fusion.features import Features, as_one_token, keep, promote
from fusion.heads.base import FusionHead, FusionOutput, check_options


class LevelWeighted(FusionHead):
    """Let each sample weight the depths of each encoder: low-level features (edges, colours) or high-level ones (objects, meaning).

        h_ml = W_ml norm(x_ml)            a_m = softmax_l(V_m [h_11; ...; h_ML])
        y = GELU(A [sum_l a_1l h_1l; ...; sum_l a_Ml h_Ml])

    The weights over the depths of one modality depend on all modalities: a question can select the depth of the image encoder. An absent
    modality is replaced by zeros.
    dims maps each modality to the widths of its levels, from the shallowest, or to one width; the head uses the last `depths` of them.
    `forward` takes for each modality a list of the features of exactly those levels, or the features of a single level.

    Source: Peters et al. (2018), "Deep contextualized word representations" (ELMo's mix of layers), with weights that depend on the sample.
    Reads: pooled features (B, D_ml) of L levels of each modality.
    Cost: sum(D_ml) * dim + (M * L)^2 * dim + M * dim^2 parameters and multiply-adds per sample.

    Args:
        dim: width to which each level is projected, and of the fused features.
        depths: number of levels L used of each encoder, the last ones; all if it has fewer.
        dropout: dropout probability on the fused features; from 0 to below 1.
        unimodal: also predict from each modality alone, by a linear layer on its pooled features (by_modality); model.balance turns it on.

    >>> head = LevelWeighted({"text": [8, 8], "image": [16, 32, 64]}, 3, dim=32)
    >>> text, image = [torch.randn(4, 7, 8)] * 2, [torch.randn(4, 49, width) for width in (16, 32, 64)]
    >>> head({"text": text, "image": image}).output.shape
    torch.Size([4, 3])
    """

    stage = "levels"
    family = "intermediate"

    def __init__(
        self,
        dims: Mapping[str, int | Sequence[int]],
        out_dim: int,
        *,
        dim: int = 256,
        depths: int = 4,
        dropout: float = 0.0,
        unimodal: bool = False,
    ) -> None:
        if depths < 1:
            raise ValueError(f"LevelWeighted: depths is {depths}; expected at least 1")
        levels = {name: [widths] if isinstance(widths, int) else list(widths)[-depths:] for name, widths in dims.items()}
        if empty := [name for name, widths in levels.items() if not widths]:
            raise ValueError(f"LevelWeighted: dims gives no level of '{empty[0]}'")
        check_options(type(self).__name__, dim=dim, dropout=dropout)
        super().__init__({name: min(widths) for name, widths in levels.items()}, out_dim, width=dim)  # rejects widths that are too small
        self.dims = {name: widths[-1] for name, widths in levels.items()}
        self.level_dims = levels
        self.unimodal = nn.ModuleDict({name: nn.Linear(width, out_dim) for name, width in self.dims.items()}) if unimodal else None
        self.project = nn.ModuleDict(
            {
                name: nn.ModuleList(nn.Sequential(nn.LayerNorm(width), nn.Linear(width, dim)) for width in widths)
                for name, widths in levels.items()
            }
        )
        joint = dim * sum(map(len, levels.values()))
        # A single level needs no weights.
        self.weigh = nn.ModuleDict({name: nn.Linear(joint, len(widths)) for name, widths in levels.items() if len(widths) > 1})
        self.mix = nn.Sequential(nn.Linear(len(dims) * dim, dim), nn.GELU(), nn.Dropout(dropout))

    def forward(self, features: Mapping[str, Features | Tensor | Sequence[Features | Tensor]]) -> FusionOutput:
        clean = self.read_levels(features)
        return self.classify(self.fuse_levels(clean), self.predict_alone({name: levels[-1] for name, levels in clean.items()}))

    def read_levels(self, features: Mapping[str, Features | Tensor | Sequence[Features | Tensor]]) -> dict[str, list[Features]]:
        """Like `read`, for the levels of each modality."""
        lists = {name: [f] if isinstance(f, Features | Tensor) else list(f) for name, f in features.items()}
        for name, widths in self.level_dims.items():
            if name in lists and len(lists[name]) != len(widths):
                raise ValueError(f"LevelWeighted was built for {len(widths)} levels of '{name}'; got {len(lists[name])}")
        self.check_names(lists)
        clean = {name: [as_one_token(promote(f)) for f in lists[name]] for name in self.dims}
        for name, widths in self.level_dims.items():
            for f, width in zip(clean[name], widths, strict=True):
                self.check_width(name, f, width)
        self.check_sizes({name: levels[0] for name, levels in clean.items()})
        return clean

    def fuse_levels(self, features: dict[str, list[Features]]) -> Tensor:  # (B, dim)
        h = {}  # (B, L, dim)
        for name, levels in features.items():
            project = cast(nn.ModuleList, self.project[name])
            h[name] = torch.stack([keep(one(f.pooled), f.present) for one, f in zip(project, levels, strict=True)], dim=1)
        joint = torch.cat([x.flatten(1) for x in h.values()], dim=-1)
        weights = {name: weigh(joint).softmax(dim=-1) for name, weigh in self.weigh.items()}  # (B, L)
        mixed = [(weights[name][:, None] @ x).squeeze(1) if name in weights else x[:, 0] for name, x in h.items()]
        return self.mix(torch.cat(mixed, dim=-1))
