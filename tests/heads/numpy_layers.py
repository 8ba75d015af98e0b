"""The layers that heads are built of, in float64 NumPy, for one sample and its real tokens only: no masks, no batches.

Each takes a module of ours for its weights and computes what the papers' formulas say.
"""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fusion.features import Features
from fusion.heads import FusionHead

Array = NDArray[np.float64]
Sample = dict[str, tuple[Array, Array] | None]  # a modality's real tokens (N, D) and pooled (D,); None where the sample lacks it


def array(parameter: torch.Tensor) -> Array:
    return parameter.detach().numpy()


def linear(layer: nn.Linear, x: Array) -> Array:
    y = x @ array(layer.weight).T
    return y if layer.bias is None else y + array(layer.bias)


def normalised(x: Array, epsilon: float = 1e-5) -> Array:
    return (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + epsilon)


def norm(layer: nn.LayerNorm, x: Array) -> Array:
    return normalised(x) * array(layer.weight) + array(layer.bias)


def gelu(x: Array) -> Array:
    return np.array([value / 2 * (1 + float(torch.erf(torch.tensor(value / np.sqrt(2))))) for value in x.flat]).reshape(x.shape)


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def attention(layer: nn.Module, x: Array, context: Array) -> Array:
    """concat_h(softmax(Q_h K_h' / sqrt(D/H)) V_h) W_o; zeros where there is nothing to read."""
    if not len(context):
        return np.zeros_like(x)
    query, key, value = linear(layer.query, x), linear(layer.key, context), linear(layer.value, context)
    width = x.shape[-1] // layer.num_heads
    parts = []
    for head in range(layer.num_heads):
        columns = slice(head * width, (head + 1) * width)
        parts.append(softmax(query[:, columns] @ key[:, columns].T / np.sqrt(width)) @ value[:, columns])
    return linear(layer.out, np.concatenate(parts, axis=-1))


def feed_forward(layer: nn.Sequential, x: Array) -> Array:
    return linear(layer[3], gelu(linear(layer[0], x)))


def self_attention_layer(layer: nn.Module, x: Array) -> Array:
    normed = norm(layer.norm_attention, x)
    x = x + attention(layer.attention, normed, normed)
    return x + feed_forward(layer.feed_forward, norm(layer.norm_feed_forward, x))


def cross_attention_layer(layer: nn.Module, x: Array, context: Array) -> Array:
    if layer.self_attention is not None:
        normed = norm(layer.norm_self, x)
        x = x + attention(layer.self_attention, normed, normed)
    gates = [1.0 if gate is None else np.tanh(gate.item()) for gate in (layer.gate_attention, layer.gate_feed_forward)]
    x = x + gates[0] * attention(layer.cross_attention, norm(layer.norm_query, x), norm(layer.norm_context, context))
    return x + gates[1] * feed_forward(layer.feed_forward, norm(layer.norm_feed_forward, x))


def projection(layer: nn.Sequential, x: Array) -> Array:
    return linear(layer[1], norm(layer[0], x))


def mean(x: Array) -> Array:
    """Of rows; zeros where there are none."""
    return x.mean(axis=0) if len(x) else np.zeros(x.shape[1])


def ready(head: FusionHead) -> FusionHead:
    """In float64, with every weight, norm and gate away from where it starts."""
    head = head.double().eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return head


def batch(dims: dict[str, int], counts: dict[str, int], size: int = 5) -> dict[str, Features]:
    """Padded samples, of which sample m lacks modality m."""
    torch.manual_seed(3)
    features = {}
    for place, (name, dim) in enumerate(dims.items()):
        mask = torch.arange(counts[name])[None] < torch.randint(1, counts[name] + 1, (size, 1))
        mask[place] = False
        tokens, pooled = torch.randn(size, counts[name], dim, dtype=torch.float64), torch.randn(size, dim, dtype=torch.float64)
        features[name] = Features(tokens, mask, pooled)
    return features


def samples(features: dict[str, Features]) -> Iterator[Sample]:
    """The batch, sample by sample, without its padding."""
    for row in range(len(next(iter(features.values())).mask)):
        yield {name: (array(f.tokens[row][f.mask[row]]), array(f.pooled[row])) if f.present[row] else None for name, f in features.items()}
