"""Learned tokens in the place of missing modalities: an option of every head that reads tokens."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from fusion.features import Features, presence

Missing = Literal["masked", "learned"]
MOST_MODALITIES = 8


class MissingTokens(nn.Module):
    """Gives a sample without a modality one learned token of it, which depends on the pattern: on which other modalities the sample has.

    For M modalities there are 2^M - 1 patterns in which some are missing, and 2^(M-1) tokens of each modality, as wide as its features
    (that of no modality at all included): a token is trained only by the samples of its own pattern. Every pattern has a token of its own,
    after the prompts of Lee et al. (2023), "Multimodal Prompting with Missing Modalities for Visual Recognition".

    The heads then treat the modality as present; its pooled features, and predictions by modality, remain as they are.
    Raises ValueError for more than 8 modalities.
    """

    def __init__(self, head: str, dims: Mapping[str, int]) -> None:
        super().__init__()
        if len(dims) > MOST_MODALITIES:
            raise ValueError(
                f"{head}: missing is 'learned' for {len(dims)} modalities, which have {2 ** len(dims) - 1:,} patterns of missing ones; "
                f"expected at most {MOST_MODALITIES} modalities; use missing 'masked'"
            )
        # Embeddings, so that optimisers treat them as such: no weight decay, and no orthogonalisation.
        start = {name: 0.02 * torch.randn(2 ** (len(dims) - 1), dim) for name, dim in dims.items()}
        self.tokens = nn.ModuleDict({name: nn.Embedding.from_pretrained(weight, freeze=False) for name, weight in start.items()})

    def forward(self, features: dict[str, Features]) -> dict[str, Features]:
        """The features, each with its own tokens (B, N, D), with one real token, the first, in the rows of samples without the modality."""
        rows = pattern_rows(presence(features))
        return {name: self.filled(name, f, row) for (name, f), row in zip(features.items(), rows, strict=True)}

    def filled(self, name: str, f: Features, row: Tensor) -> Features:
        # Also where all samples have the modality: parameters that get no gradient at some update are an error under DDP.
        token = self.tokens[name](row).to(f.tokens.dtype)
        first = torch.arange(f.mask.shape[1], device=f.mask.device) == 0
        place = first & ~f.present[:, None]  # (B, N)
        tokens = torch.where(place.unsqueeze(-1), token[:, None], f.tokens)
        return f._replace(tokens=tokens, mask=f.mask if f.full else f.mask | place)


def pattern_rows(present: Tensor) -> list[Tensor]:
    """For each modality the pattern (B,) of the other modalities that a sample has, (B, M): sum of 2^k over the k-th of the others.

    >>> present = torch.tensor([[True, False, True], [False, True, False], [True, True, False]])
    >>> [row.tolist() for row in pattern_rows(present)]
    [[2, 1, 1], [3, 0, 1], [1, 2, 3]]
    """
    bits = present.long().unbind(dim=1)
    rows = []
    for m in range(len(bits)):
        row = torch.zeros_like(bits[0])
        for k, bit in enumerate([*bits[:m], *bits[m + 1 :]]):
            row = row + bit * 2**k
        rows.append(row)
    return rows
