"""Late fusion: a weighted sum of the modalities' logits, with learned or fixed weights."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fusion.features import keep, masked_softmax
from fusion.heads.late import LateHead


class WeightedLogits(LateHead):
    """Classify each modality alone and sum the logits with one weight per modality, learned or fixed.

        y = sum_m w_m f_m(x_m)            w = softmax(a) over the present modalities; a is learned, or log of the given weights

    The weights of the present modalities always sum to 1, so that the logits of a sample without one have the same scale.
    Additive in the modalities: it cannot learn what depends on their interaction (XOR stays at chance).

    Source: Kittler et al. (1998), "On Combining Classifiers".
    Reads: pooled features (B, D_m).
    Cost: as LogitMean, and M parameters.

    Args:
        weights: by modality, a positive number for each; normalised to sum to 1 and not trained. None: learned, initially equal.
        dim: hidden width of each modality's classifier; 0: no hidden layer.
        dropout: dropout probability before the last layer of each classifier; from 0 to below 1.

    >>> head = WeightedLogits({"text": 8, "image": 16}, 3, weights={"text": 3.0, "image": 1.0})
    >>> [round(float(w), 2) for w in head.weights]
    [0.75, 0.25]
    """

    def __init__(
        self, dims: Mapping[str, int], out_dim: int, *, weights: dict[str, float] | None = None, dim: int = 256, dropout: float = 0.0
    ) -> None:
        super().__init__(dims, out_dim, dim=dim, dropout=dropout)
        if weights is None:
            self.log_weights = nn.Parameter(torch.zeros(len(dims)))
            return
        if weights.keys() != dims.keys() or not all(0 < weight < math.inf for weight in weights.values()):
            raise ValueError(f"WeightedLogits: weights must give a positive number for each of {', '.join(dims)}; got {weights}")
        self.register_buffer("log_weights", torch.tensor([float(weights[name]) for name in dims]).log())

    @property
    def weights(self) -> Tensor:
        """Weights (M,) of a sample that has every modality, in the order of `dims`."""
        return self.log_weights.detach().softmax(dim=0)

    def combine(self, logits: Tensor, present: Tensor) -> Tensor:
        weights = masked_softmax(self.log_weights.expand_as(present), present, dim=1)
        return (keep(logits, present) * weights.unsqueeze(-1).to(logits.dtype)).sum(dim=1)
