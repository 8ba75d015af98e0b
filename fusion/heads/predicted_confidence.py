"""Late fusion: the modalities' logits, weighted by how right each is predicted to be."""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from fusion.features import Features, keep, masked_softmax, presence
from fusion.heads.base import FusionHead, FusionOutput, check_options
from fusion.heads.late import classifier


class PredictedConfidence(FusionHead):
    """Classify each modality alone, predict the probability that each gives to the true class, and weight the decisions by it.

        y = sum_m w_m f_m(x_m)            w = softmax over present m of (c_m + h_m) r_m            c_m = sigmoid(g_m(x_m))
        h_m = mean over j != m of log c_j / sum_k log c_k
        r_m = u_m / max_k u_k            u_m = mean over the classes of |softmax(f_m(x_m)) - 1/C|

    c is the mono-confidence, which model.balance=PDF trains; h the holo-confidence, by which a modality gains where the others are unsure;
    r a calibration relative to the modality whose prediction is farthest from uniform, which gets no gradient. (For two modalities as
    in the paper; h sums to 1 for any number.) It chooses between decisions made alone, by confidences that the loss of y
    changes as well, so that it can learn XOR, slowly; with `detach` XOR stays at chance.

    Source: Cao et al. (2024), "Predictive Dynamic Fusion" (PDF).
    Reads: pooled features (B, D_m).
    Cost: as LogitMean, and sum(D_m) * dim + M * dim parameters and multiply-adds per sample for g.

    Args:
        dim: hidden width of each modality's classifier, and of its g; 0: no hidden layer.
        detach: stop the gradient from the loss of y to g, as in the paper; g then needs the losses of model.balance=PDF.
        dropout: dropout probability before the last layer of each classifier and g; from 0 to below 1.

    >>> head = PredictedConfidence({"text": 8, "image": 16}, 3)
    >>> head({"text": torch.randn(4, 8), "image": torch.randn(4, 16)}).confidence["text"].shape
    torch.Size([4])
    """

    stage = "pooled"
    family = "late"
    one_of_classes = True
    fewest_outputs = 2  # the probability of a single class is always 1

    def __init__(self, dims: Mapping[str, int], out_dim: int, *, dim: int = 256, detach: bool = False, dropout: float = 0.0) -> None:
        check_options(type(self).__name__, dropout=dropout)
        super().__init__(dims, out_dim, width=None)
        self.detach = detach
        self.decide = nn.ModuleDict({name: classifier(width, out_dim, dim, dropout) for name, width in dims.items()})
        self.predict_confidence = nn.ModuleDict({name: classifier(width, 1, dim, dropout) for name, width in dims.items()})

    def forward(self, features: Mapping[str, Features | Tensor]) -> FusionOutput:
        clean = self.read(features)
        alone = {name: self.decide[name](f.pooled) for name, f in clean.items()}
        # In float32 at least: a probability near 1 has no logarithm in fp16.
        scores = torch.cat([self.predict_confidence[name](f.pooled) for name, f in clean.items()], dim=1)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))  # (B, M)
        logits, present = torch.stack(list(alone.values()), dim=1), presence(clean)
        weights = confidence_weights(scores.detach() if self.detach else scores, logits, present)
        output = (keep(logits, present) * weights.unsqueeze(-1).to(logits.dtype)).sum(dim=1)
        return FusionOutput(output, alone, confidence=dict(zip(alone, scores.sigmoid().unbind(dim=1), strict=True)))

    def output_layers(self) -> list[nn.Module]:
        return [cast(nn.Sequential, decide)[-1] for decide in self.decide.values()]


def confidence_weights(scores: Tensor, logits: Tensor, present: Tensor) -> Tensor:
    """Weights (B, M) of the present modalities (B, M), from g (B, M), whose sigmoid is the confidence, and logits (B, M, C)."""
    losses = torch.where(present, softplus(-scores), 0.0)  # -log c
    total = losses.sum(dim=1, keepdim=True)
    others = (present.sum(dim=1, keepdim=True) - 1).clamp(min=1)
    holo = (total - losses) / others / total.clamp(min=1e-4)
    p = logits.detach().to(scores.dtype).softmax(dim=-1)
    distance = torch.where(present, (p - 1 / p.shape[-1]).abs().mean(dim=-1), 0.0)
    calibration = distance / distance.amax(dim=1, keepdim=True).clamp(min=1e-6)
    return masked_softmax((scores.sigmoid() + holo) * calibration, present, dim=1)
