"""No fusion: one modality alone, the baseline that a fusion has to beat."""

from collections.abc import Mapping

from torch import Tensor, nn

from fusion.features import Features
from fusion.heads.base import FusionHead, FusionOutput
from fusion.heads.late import classifier


class Unimodal(FusionHead):
    """Classify one modality from its pooled features.

        y = W2 GELU(W1 norm(x))

    Used for models with only one modality. Reads pooled features (B, D). Cost: D * dim + dim * out_dim parameters.

    Args:
        dim: hidden width of the classifier; 0: no hidden layer.
        dropout: dropout probability before the last layer.

    >>> import torch
    >>> Unimodal({"text": 8}, 3)({"text": torch.randn(4, 8)}).output.shape
    torch.Size([4, 3])
    """

    stage = "pooled"
    family = "none"
    fewest_modalities = 1

    def __init__(self, dims: Mapping[str, int], out_dim: int, *, dim: int = 256, dropout: float = 0.0) -> None:
        if len(dims) != 1:
            raise ValueError(f"Unimodal reads exactly one modality; got {', '.join(dims) or 'none'}")
        super().__init__(dims, out_dim, width=None)
        (self.name, width) = next(iter(dims.items()))
        self.decide = classifier(width, out_dim, dim, dropout)

    def output_layers(self) -> list[nn.Module]:
        return [self.decide[-1]]

    def forward(self, features: Mapping[str, Features | Tensor]) -> FusionOutput:
        logits = self.decide(self.read(features)[self.name].pooled)
        return FusionOutput(logits, {self.name: logits})
