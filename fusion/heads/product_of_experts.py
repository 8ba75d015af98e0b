"""Late fusion: the normalised product of the modalities' class probabilities."""

from torch import Tensor

from fusion.features import keep
from fusion.heads.late import LateHead


class ProductOfExperts(LateHead):
    """Classify each modality alone and multiply the class probabilities of those that are present.

        y_c = log(prod over present m of p_m(c)) - log Z            p_m = softmax(f_m(x_m)), Z so that the exp(y_c) sum to 1

    Returns log-probabilities. An uncertain modality (p_m flat) leaves the decision to the others. Additive in the logarithms: it cannot
    learn what depends on the modalities' interaction (XOR stays at chance).

    Source: Hinton (2002), "Training Products of Experts by Minimizing Contrastive Divergence".
    Reads: pooled features (B, D_m).
    Cost: sum(D_m) * dim + M * dim * out_dim parameters and multiply-adds per sample.

    Args:
        dim: hidden width of each modality's classifier; 0: no hidden layer.
        dropout: dropout probability before the last layer of each classifier; from 0 to below 1.

    >>> import torch
    >>> head = ProductOfExperts({"text": 8, "image": 16}, 3)
    >>> head({"text": torch.randn(4, 8), "image": torch.randn(4, 16)}).output.exp().sum(dim=1).allclose(torch.ones(4))
    True
    """

    one_of_classes = True
    fewest_outputs = 2  # the probability of a single class is always 1

    def combine(self, logits: Tensor, present: Tensor) -> Tensor:
        return keep(logits.log_softmax(dim=-1), present).sum(dim=1).log_softmax(dim=-1)
