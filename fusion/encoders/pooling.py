"""Pooling of a text's tokens to one vector."""

from typing import Literal, TypeAlias

from torch import Tensor

from fusion.features import masked_mean

Pooling: TypeAlias = Literal["mean", "first", "last"]


def pool(tokens: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """One vector (B, D) for each text, of its tokens (B, N, D) where mask (B, N) is True."""
    if pooling == "mean":
        return masked_mean(tokens, mask)
    if pooling == "first":
        return tokens[:, 0]
    return token_at(tokens, (mask.sum(dim=1) - 1).clamp(min=0))


def token_at(tokens: Tensor, position: Tensor) -> Tensor:
    """The token (B, D) at each sample's position (B,)."""
    return tokens.gather(1, position[:, None, None].expand(-1, 1, tokens.shape[-1]))[:, 0]
