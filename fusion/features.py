"""A modality's input to a fusion head: tokens, a mask of the real ones, and one pooled vector.

Presence is encoded in the mask: a sample without a modality has an all-False row, and nothing downstream may depend on
masked values.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class Features(NamedTuple):
    """One modality of a batch.

    Shapes: tokens (B, N, D) float; mask (B, N) bool, True where a token is real; pooled (B, D) float.
    A NamedTuple, so that pytrees, DDP, `torch.compile` and `torch.export` support it.

    An input that several samples share (questions about one image) may be stored once: with `indices` (B,) int64, tokens (U, N, D)
    and pooled (U, D) hold the U distinct inputs, and sample b has tokens[indices[b]]. Samples that share one have the same mask, or an
    all-False one.

    full: True if every token of every sample is known to be real without a device synchronisation; attention then uses no mask, as its
    fastest kernels require.
    """

    tokens: Tensor
    mask: Tensor
    pooled: Tensor
    indices: Tensor | None = None
    full: bool | None = None

    @property
    def attention_mask(self) -> Tensor | None:
        """Mask (B, N) for attention to these tokens; None if all are known to be real."""
        return None if self.full else self.mask

    @property
    def present(self) -> Tensor:
        """(B,) bool: which samples have this modality."""
        return self.mask.any(dim=1)

    @property
    def dim(self) -> int:
        """The width D."""
        return self.tokens.shape[-1]

    @property
    def distinct_mask(self) -> Tensor:
        """(U, N) bool: the real tokens of the distinct inputs, none for one that no sample has; `mask` itself if nothing is shared."""
        if self.indices is None:
            return self.mask
        counts = torch.zeros(self.tokens.shape[:2], dtype=torch.int32, device=self.mask.device)
        return counts.index_add(0, self.indices, self.mask.int()) > 0

    def unshared(self) -> "Features":
        """The same features with each sample's own tokens (B, N, D) and pooled (B, D)."""
        if self.indices is None:
            return self
        return Features(self.tokens.index_select(0, self.indices), self.mask, self.pooled.index_select(0, self.indices), full=self.full)


def promote(x: Features | Tensor) -> Features:
    """Returns Features unchanged, or makes them from a plain tensor whose tokens are all real.

    A tensor (B, N, D) is taken as tokens, pooled by their mean; (B, D) as one token that is also the pooled vector.

    >>> promote(torch.ones(2, 5, 8)).pooled.shape
    torch.Size([2, 8])
    """
    if isinstance(x, Features):
        return x
    if x.dim() == 2:
        return Features(x[:, None], torch.ones(x.shape[0], 1, dtype=torch.bool, device=x.device), x, full=True)
    if x.dim() == 3:
        return Features(x, torch.ones(x.shape[:2], dtype=torch.bool, device=x.device), x.mean(dim=1), full=True)
    raise ValueError(f"expected tokens (B, N, D) or pooled (B, D), got a tensor of shape {tuple(x.shape)}")


def zero_masked(features: Features) -> Features:
    """The same features with masked values set to exactly 0, so that noise, inf or NaN there reach no output and no gradient."""
    if features.full:
        return features
    real = features.distinct_mask
    return features._replace(tokens=keep(features.tokens, real), pooled=keep(features.pooled, real.any(dim=1)))


def presence(features: Mapping[str, Features]) -> Tensor:
    """(B, M) bool: which of the M modalities each sample has."""
    return torch.stack([f.present for f in features.values()], dim=1)


def joint_mask(features: Mapping[str, Features]) -> Tensor | None:
    """Mask (B, K) of the concatenated tokens of all modalities; None if all are known to be real."""
    return None if all(f.full for f in features.values()) else torch.cat([f.mask for f in features.values()], dim=1)


def as_one_token(features: Features) -> Features:
    """Each sample's pooled features as one token (B, 1, D); zero where the modality is absent."""
    pooled = features.pooled if features.indices is None else features.pooled.index_select(0, features.indices)
    pooled = keep(pooled, features.present)
    return Features(pooled[:, None], features.present[:, None], pooled)


def keep(x: Tensor, mask: Tensor) -> Tensor:
    """`x` (*mask.shape, D) where `mask` is True, else zero. Uses `where`, since a product would propagate NaN (NaN * 0 = NaN)."""
    return torch.where(mask.unsqueeze(-1), x, 0.0)


def masked_mean(tokens: Tensor, mask: Tensor) -> Tensor:
    """Mean (B, D) of the real tokens, from (B, N, D) and (B, N); zero for a sample that has none. Summed in float32 at least: a sum of
    thousands of tokens overflows fp16.
    """
    total = keep(tokens, mask).sum(dim=1, dtype=torch.promote_types(tokens.dtype, torch.float32))
    return (total / mask.sum(dim=1, keepdim=True).clamp(min=1)).to(tokens.dtype)


def masked_softmax(scores: Tensor, mask: Tensor, dim: int) -> Tensor:
    """Softmax over the entries of `dim` where `mask` (broadcast to `scores`) is True; the others, and rows without any, get exactly 0."""
    # The lowest finite number instead of -inf: softmax of a row of -inf is NaN, in value and gradient; such rows are zeroed below.
    allowed = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return torch.where(mask, allowed.softmax(dim=dim), 0.0)
