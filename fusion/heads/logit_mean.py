"""Late fusion: the mean of the modalities' logits."""

from torch import Tensor

from fusion.features import keep
from fusion.heads.late import LateHead


class LogitMean(LateHead):
    """Classify each modality alone and average the logits of those that are present.

        y = mean over present m of f_m(x_m)

    The simplest late fusion. Additive in the modalities: it cannot learn what depends on their interaction (XOR stays at chance).

    Source: Kittler et al. (1998), "On Combining Classifiers" (of logits, so a product of experts up to scale).
    Reads: pooled features (B, D_m).
    Cost: sum(D_m) * dim + M * dim * out_dim parameters and multiply-adds per sample.

    Args:
        dim: hidden width of each modality's classifier; 0: no hidden layer.
        dropout: dropout probability before the last layer of each classifier; from 0 to below 1.

    >>> import torch
    >>> LogitMean({"text": 8, "image": 16}, 3)({"text": torch.randn(4, 8), "image": torch.randn(4, 16)}).output.shape
    torch.Size([4, 3])
    """

    def combine(self, logits: Tensor, present: Tensor) -> Tensor:
        return keep(logits, present).sum(dim=1) / present.sum(dim=1, keepdim=True).clamp(min=1).to(logits.dtype)
