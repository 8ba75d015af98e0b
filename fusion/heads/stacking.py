"""Late fusion: a small model over the modalities' decisions."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fusion.features import keep
from fusion.heads.base import check_options
from fusion.heads.late import LateHead


class Stacking(LateHead):
    """Classify each modality alone and let a small network combine the decisions.

        y = W_2 GELU(W_1 [log p_1; ...; log p_M; present])            p_m = softmax(f_m(x_m)); 0 for an absent modality

    Trained end to end, so that the decisions of several modalities can interact, and XOR can be learnt. Log-probabilities are used since
    the probabilities of many classes hardly differ at first, and training on them makes no progress for hundreds of updates.
    `by_modality` holds the decisions as logits. (Wolpert trains the combining model on held-out samples; that is up to the caller.)

    Source: Wolpert (1992), "Stacked Generalization".
    Reads: pooled features (B, D_m).
    Cost: sum(D_m) * dim + M * dim * out_dim for the decisions, (M * (out_dim + 1) + out_dim) * hidden for the network over them.

    Args:
        dim: hidden width of each modality's classifier; 0: no hidden layer.
        hidden: hidden width of the network that combines the decisions.
        detach: stop the gradient from that network to the modalities' classifiers; these then need losses of their own, such as those of
            model.balance=UnimodalLosses.
        dropout: dropout probability before the last layer of each classifier and of the network; from 0 to below 1.

    >>> head = Stacking({"text": 8, "image": 16}, 3)
    >>> head({"text": torch.randn(4, 8), "image": torch.randn(4, 16)}).output.shape
    torch.Size([4, 3])
    """

    one_of_classes = True
    fewest_outputs = 2  # the probability of a single class is always 1

    def __init__(
        self,
        dims: Mapping[str, int],
        out_dim: int,
        *,
        dim: int = 256,
        hidden: int = 64,
        detach: bool = False,
        dropout: float = 0.0,
    ) -> None:
        check_options(type(self).__name__, hidden=hidden)
        super().__init__(dims, out_dim, dim=dim, dropout=dropout)
        self.detach = detach
        self.mix = nn.Sequential(nn.Linear(len(dims) * (out_dim + 1), hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, out_dim))

    def output_layers(self) -> list[nn.Module]:
        return [*super().output_layers(), self.mix[-1]]

    def combine(self, logits: Tensor, present: Tensor) -> Tensor:
        decisions = keep((logits.detach() if self.detach else logits).log_softmax(dim=-1), present)
        return self.mix(torch.cat([decisions.flatten(1), present.to(decisions.dtype)], dim=-1))
