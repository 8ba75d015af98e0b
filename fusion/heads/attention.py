"""Masked attention, and the residual layers of the attention-based heads.

B batch, N queries, K keys, D width, H attention heads.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from fusion.features import masked_softmax

# Xavier gain of the attention weights' initialisation. With tokens of unit variance the attention logits then start with a standard
# deviation of gain^2 = 3, so that attention is selective. PyTorch's default for linear layers starts at 1/3, which is close to uniform
# averaging, where small models remain for a long time.
GAIN = 3**0.5


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al., 2017) of queries x (B, N, D) over a context (B, K, D) with its mask (B, K).

    Returns (B, N, D). With mask None the whole context is real. A sample whose context has no real token gets zeros (softmax over nothing
    would be NaN).
    With `index` (B,) the context (U, K, D) is shared: sample b attends to context[index[b]]; keys and values are computed once for each.
    Dropout is applied to the output, not to the attention weights, which are never materialised: memory is linear in N and K on every
    device.
    """

    def __init__(self, dim: int, num_heads: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"dim {dim} is not a multiple of num_heads {num_heads}")
        self.num_heads = num_heads
        self.dropout = nn.Dropout(dropout)
        self.query = nn.Linear(dim, dim)
        # Separate layers: the gradient of a fused layer whose output is split would have to be concatenated, which is a copy.
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for linear in (self.query, self.key, self.value, self.out):
            nn.init.xavier_uniform_(linear.weight, gain=GAIN)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None, index: Tensor | None = None) -> Tensor:
        key, value = self.key(context), self.value(context)
        if index is not None:
            key, value = key.index_select(0, index), value.index_select(0, index)
        allowed = present = None
        if mask is not None:
            present = mask.any(dim=1)
            # Samples without a real context token attend everywhere, and their outputs are zeroed below.
            allowed = (mask | ~present[:, None])[:, None, None, :]
        y = scaled_dot_product_attention(self.split(self.query(x)), self.split(key), self.split(value), attn_mask=allowed)
        y = self.dropout(self.out(y.transpose(1, 2).flatten(2)))
        return y if present is None else torch.where(present[:, None, None], y, 0.0)

    def attention_weights(self, x: Tensor, context: Tensor, mask: Tensor | None, index: Tensor | None = None) -> Tensor:
        """Returns the attention weights (B, H, N, K); rows sum to 1, or to 0 if the context has no real token."""
        key = self.key(context) if index is None else self.key(context).index_select(0, index)
        query, key = self.split(self.query(x)), self.split(key)
        scores = query @ key.mT / query.shape[-1] ** 0.5
        return scores.softmax(dim=-1) if mask is None else masked_softmax(scores, mask[:, None, None, :], dim=-1)

    def split(self, x: Tensor) -> Tensor:  # (B, N, D) -> (B, H, N, D/H)
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def attention_maps(module: nn.Module, *inputs: Any) -> tuple[Any, dict[str, Tensor]]:
    """Returns the output of `module` (a head, a model) for the inputs, and the attention weights of its submodules by name.

    Weights are (B, H, N, K), without gradient: H attention heads, N queries, K keys, in the order in which the head concatenates tokens
    (that of `dims`; a class token before, bottleneck tokens after). AdaptiveGraph's adjacency is returned in the same form, with H = 1.
    They are computed in addition to the usual forward pass, which never materialises them.

    >>> from fusion.heads import CrossAttention
    >>> head = CrossAttention({"text": 8, "image": 16}, 3, dim=32, direction="text_to_image", depth=1).eval()
    >>> output, maps = attention_maps(head, {"text": torch.randn(4, 7, 8), "image": torch.randn(4, 49, 16)})
    >>> {name: tuple(weights.shape) for name, weights in maps.items()}
    {'layers.0.text.self_attention': (4, 4, 7, 7), 'layers.0.text.cross_attention': (4, 4, 7, 49)}
    """
    maps: dict[str, Tensor] = {}

    def record_weights(name: str) -> Callable[..., None]:
        def hook(attending: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            with torch.no_grad():
                maps[name] = attending.attention_weights(*arguments)  # type: ignore[operator]

        return hook

    attending = {name: part for name, part in module.named_modules() if hasattr(part, "attention_weights")}
    hooks = [part.register_forward_hook(record_weights(name)) for name, part in attending.items()]
    try:
        return module(*inputs), maps
    finally:
        for hook in hooks:
            hook.remove()


class FeedForward(nn.Sequential):
    """Token-wise MLP: two linear layers with a GELU between them."""

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
    """Self-attention (if `self_attention`), cross-attention to another modality, then a feed-forward layer; all residual and pre-norm.

    With `tanh_gate` the outputs of cross-attention and of the feed-forward layer are scaled by tanh(g), g = 0 at the start (Flamingo,
    Alayrac et al., 2022), so that the context has no effect at first.
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

    def forward(self, x: Tensor, mask: Tensor | None, context: Tensor, context_mask: Tensor | None, index: Tensor | None = None) -> Tensor:
        """Returns (B, N, D) for queries x (B, N, D) with mask (B, N) and a context (B, K, D), or (U, K, D) with `index` (B,), with
        context_mask (B, K)."""
        if self.self_attention is not None and self.norm_self is not None:
            normed = self.norm_self(x)
            x = x + self.self_attention(normed, normed, mask)
        attended = self.cross_attention(self.norm_query(x), self.norm_context(context), context_mask, index)
        x = x + gated(attended, self.gate_attention)
        return x + gated(self.feed_forward(self.norm_feed_forward(x)), self.gate_feed_forward)


def gated(x: Tensor, gate: Tensor | None) -> Tensor:
    return x if gate is None else x * gate.tanh().to(x.dtype)


class Projection(nn.Sequential):
    """Projects a modality's tokens (B, N, in_dim) to the head's width (B, N, dim): LayerNorm, then a linear layer."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__(nn.LayerNorm(in_dim), nn.Linear(in_dim, dim))
