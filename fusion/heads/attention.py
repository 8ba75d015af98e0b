"""Attention with masks, and the residual layers that the attention-based heads are built of.

B batch, N queries, K keys, D width, H attention heads.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from fusion.features import masked_softmax

# Xavier gain of attention's weights. The logits of tokens of unit variance then begin with a standard deviation of gain^2 = 3, so that
# attention picks. PyTorch's default for linear maps begins at 1/3: near averages, on which small models stay for long.
GAIN = 3**0.5


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al., 2017) of tokens x (B, N, D) over a context (B, K, D) with its mask (B, K).

    Without a mask all of the context is real. A sample whose context has no real token gets zeros (softmax over nothing would be NaN).
    Gives (B, N, D).
    With `rows` (B,) the context (U, K, D) is shared: sample b reads number rows[b]; keys and values are made once each.
    Dropout is of what was read, not of the weights: those are never made, so that memory is linear in N and K on every device.
    """

    def __init__(self, dim: int, num_heads: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"dim {dim} is not a multiple of num_heads {num_heads}")
        self.num_heads = num_heads
        self.dropout = nn.Dropout(dropout)
        self.query = nn.Linear(dim, dim)
        # Two maps, since the gradient of one that is cut in two would have to be put together again: a copy.
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for linear in (self.query, self.key, self.value, self.out):
            nn.init.xavier_uniform_(linear.weight, gain=GAIN)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None, rows: Tensor | None = None) -> Tensor:
        key, value = self.key(context), self.value(context)
        if rows is not None:
            key, value = key.index_select(0, rows), value.index_select(0, rows)
        allowed = present = None
        if mask is not None:
            present = mask.any(dim=1)
            # Rows with nothing to read attend everywhere, over zeros, and are zeroed below.
            allowed = (mask | ~present[:, None])[:, None, None, :]
        y = scaled_dot_product_attention(self.split(self.query(x)), self.split(key), self.split(value), attn_mask=allowed)
        y = self.dropout(self.out(y.transpose(1, 2).flatten(2)))
        return y if present is None else torch.where(present[:, None, None], y, 0.0)

    def attention_weights(self, x: Tensor, context: Tensor, mask: Tensor | None, rows: Tensor | None = None) -> Tensor:
        """(B, H, N, K) how much each token reads of each real token of the context; rows sum to 1, or to 0 where there is none."""
        key = self.key(context) if rows is None else self.key(context).index_select(0, rows)
        query, key = self.split(self.query(x)), self.split(key)
        scores = query @ key.mT / query.shape[-1] ** 0.5
        return scores.softmax(dim=-1) if mask is None else masked_softmax(scores, mask[:, None, None, :], dim=-1)

    def split(self, x: Tensor) -> Tensor:  # (B, N, D) -> (B, H, N, D/H)
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def attention_maps(module: nn.Module, *inputs: Any) -> tuple[Any, dict[str, Tensor]]:
    """What `module` (a head, a model) gives for the inputs, and the weights of everything in it that attends, by its name.

    Weights are (B, H, N, K), without gradient: H heads, N queries, K keys, in the order in which the head joins them
    (those of `dims`; a class token before, bottleneck tokens after). AdaptiveGraph's edges are given likewise, with H = 1.
    They are computed beside the usual pass, which never makes them.

    >>> from fusion.heads import CrossAttention
    >>> head = CrossAttention({"text": 8, "image": 16}, 3, dim=32, direction="text_to_image", depth=1).eval()
    >>> output, maps = attention_maps(head, {"text": torch.randn(4, 7, 8), "image": torch.randn(4, 49, 16)})
    >>> {name: tuple(weights.shape) for name, weights in maps.items()}
    {'layers.0.text.self_attention': (4, 4, 7, 7), 'layers.0.text.cross_attention': (4, 4, 7, 49)}
    """
    maps: dict[str, Tensor] = {}

    def keep_weights(name: str) -> Callable[..., None]:
        def hook(attending: nn.Module, given: tuple[Any, ...], output: Any) -> None:
            with torch.no_grad():
                maps[name] = attending.attention_weights(*given)  # type: ignore[operator]

        return hook

    attending = {name: part for name, part in module.named_modules() if hasattr(part, "attention_weights")}
    hooks = [part.register_forward_hook(keep_weights(name)) for name, part in attending.items()]
    try:
        return module(*inputs), maps
    finally:
        for hook in hooks:
            hook.remove()


class FeedForward(nn.Sequential):
    """Two linear maps with a GELU between them, on each token by itself."""

    def __init__(self, dim: int, *, mlp_ratio: float = 4.0, dropout: float = 0.0) -> None:
        hidden = max(1, int(dim * mlp_ratio))
        super().__init__(nn.Linear(dim, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, dim), nn.Dropout(dropout))


class SelfAttentionLayer(nn.Module):
    """x + attention(x, x), then x + feed-forward(x), each on normalised input (pre-norm)."""

    def __init__(self, dim: int, num_heads: int, *, mlp_ratio: float = 4.0, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(dim)
        self.attention = Attention(dim, num_heads, dropout=dropout)
        self.norm_feed_forward = nn.LayerNorm(dim)
        self.feed_forward = FeedForward(dim, mlp_ratio=mlp_ratio, dropout=dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:  # (B, N, D), (B, N) -> (B, N, D)
        normed = self.norm_attention(x)
        x = x + self.attention(normed, normed, mask)
        return x + self.feed_forward(self.norm_feed_forward(x))


class CrossAttentionLayer(nn.Module):
    """x reads itself (if `self_attention`), then another modality, then passes a feed-forward map; all three residual and pre-norm.

    With `tanh_gate` what is read from the other modality, and the feed-forward map after it, enter through tanh(g), g = 0 at the
    start (Flamingo, Alayrac et al., 2022): the stream of the queries begins as if it were alone.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        self_attention: bool = True,
        tanh_gate: bool = False,
    ) -> None:
        super().__init__()
        self.norm_self = nn.LayerNorm(dim) if self_attention else None
        self.self_attention = Attention(dim, num_heads, dropout=dropout) if self_attention else None
        self.norm_query = nn.LayerNorm(dim)
        self.norm_context = nn.LayerNorm(dim)
        self.cross_attention = Attention(dim, num_heads, dropout=dropout)
        self.norm_feed_forward = nn.LayerNorm(dim)
        self.feed_forward = FeedForward(dim, mlp_ratio=mlp_ratio, dropout=dropout)
        self.gate_attention = nn.Parameter(torch.zeros(())) if tanh_gate else None
        self.gate_feed_forward = nn.Parameter(torch.zeros(())) if tanh_gate else None

    def forward(self, x: Tensor, mask: Tensor | None, context: Tensor, context_mask: Tensor | None, rows: Tensor | None = None) -> Tensor:
        """x (B, N, D) with mask (B, N) reads context (B, K, D), or (U, K, D) by `rows`, with context_mask (B, K); gives (B, N, D)."""
        if self.self_attention is not None and self.norm_self is not None:
            normed = self.norm_self(x)
            x = x + self.self_attention(normed, normed, mask)
        read = self.cross_attention(self.norm_query(x), self.norm_context(context), context_mask, rows)
        x = x + gated(read, self.gate_attention)
        return x + gated(self.feed_forward(self.norm_feed_forward(x)), self.gate_feed_forward)


def gated(x: Tensor, gate: Tensor | None) -> Tensor:
    return x if gate is None else x * gate.tanh().to(x.dtype)


class Projection(nn.Sequential):
    """A modality's tokens (B, N, in_dim) brought to the head's width (B, N, dim): LayerNorm, then a linear map."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__(nn.LayerNorm(in_dim), nn.Linear(in_dim, dim))
