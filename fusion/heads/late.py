"""Base of the late heads: one classifier per modality, and the decisions of the present modalities combined."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from fusion.features import Features, presence
from fusion.heads.base import FusionHead, FusionOutput, check_options


class LateHead(FusionHead, ABC):
    """Base class of the heads that combine decisions; subclasses implement `combine`.

    Each modality is classified alone from its pooled features: LayerNorm, hidden layer of width `dim` with GELU (none if
    `dim` is 0), linear. `by_modality` always holds these predictions.
    """

    stage = "pooled"
    family = "late"

    def __init__(self, dims: Mapping[str, int], out_dim: int, *, dim: int = 256, dropout: float = 0.0) -> None:
        check_options(type(self).__name__, dropout=dropout)
        super().__init__(dims, out_dim, width=None)
        self.decide = nn.ModuleDict({name: classifier(width, out_dim, dim, dropout) for name, width in dims.items()})

    def forward(self, features: Mapping[str, Features | Tensor]) -> FusionOutput:
        clean = self.read(features)
        alone = {name: self.decide[name](f.pooled) for name, f in clean.items()}
        present = presence(clean)
        return FusionOutput(self.combine(torch.stack(list(alone.values()), dim=1), present), alone)

    def output_layers(self) -> list[nn.Module]:
        return [cast(nn.Sequential, decide)[-1] for decide in self.decide.values()]

    @abstractmethod
    def combine(self, logits: Tensor, present: Tensor) -> Tensor:
        """Returns (B, out_dim) from the decisions (B, M, out_dim) of the modalities that are present (B, M)."""


def classifier(width: int, out_dim: int, dim: int, dropout: float) -> nn.Sequential:
    """LayerNorm, a hidden layer of width `dim` with GELU (none if 0), and a linear layer to `out_dim`. Raises ValueError for options that
    are out of range."""
    if dim < 0:
        raise ValueError(f"dim is {dim}; expected a width, or 0 for no hidden layer")
    check_options("the classifier", dropout=dropout)
    hidden = [nn.Linear(width, dim), nn.GELU()] if dim else []
    return nn.Sequential(nn.LayerNorm(width), *hidden, nn.Dropout(dropout), nn.Linear(dim or width, out_dim))
