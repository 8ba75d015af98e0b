"""Every head of the registry, small, with batches of all cases: what the tests of the heads share."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from slow_cases import slow_except
from torch import Tensor

from fusion.features import Features
from fusion.heads import (
    FusionHead,
    Unimodal,
    WeightedLogits,
    available,
)
from fusion.heads.registry import HEADS

OUT = 3
DIMS = {"a": 4, "b": 6}
COUNTS = {"a": 3, "b": 5, "c": 2}

Build = Callable[..., FusionHead]

# A head joins the suite by being in the registry; here stand the options that make it small, and further forms of it.
SMALL: dict[str, dict[str, Any]] = {
    "JointTransformer": {"depth": 1, "num_heads": 2},
    "TensorFusion": {"embed": 3},
    "LowRankTensor": {"rank": 2},
    "Mutan": {"embed": 5, "rank": 2},
    "SqueezeExcite": {"squeeze": 6, "attend": 4},
    "Bottleneck": {"num_heads": 2, "bottlenecks": 2},
    "Perceiver": {"depth": 1, "num_heads": 2, "latents": 3},
    "InteractionExperts": {"expert": "Gated"},
    "Stacking": {"hidden": 7},
    "CrossAttention": {"depth": 2, "num_heads": 2},
    "CoAttention": {"depth": 1, "num_heads": 2},
    "GatedCrossAttention": {"depth": 1, "num_heads": 2},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "CrossAttention a_to_b": {"depth": 1, "direction": "a_to_b"},
    "CrossAttention b_to_a": {"depth": 1, "direction": "b_to_a", "self_attention": False},
    "CrossAttention tanh_gate": {"depth": 1, "tanh_gate": True},
    "AlignedProduct cross": {"interaction": "cross", "depth": 2},
    "Bottleneck missing": {"missing": "learned"},
    "CrossAttention missing": {"depth": 1, "missing": "learned"},
    "AdaptiveGraph missing": {"nodes": "pooled", "missing": "learned"},
    "InteractionExperts tokens": {"expert": "Perceiver", "expert_args": {"depth": 1, "num_heads": 2, "latents": 3, "missing": "learned"}},
    "ConfidenceWeighted energy": {"score": "energy"},
    "FiLM stream": {"stream": "a"},
    "GatedCrossAttention stream": {"stream": "b"},
    "Bottleneck late": {"depth": 3, "fusion_layer": 1},
    "SqueezeExcite everywhere": {"spatial": ["a", "b"]},
    "AdaptiveGraph mlp": {"adjacency": "mlp", "edge_dim": 4},
    "AdaptiveGraph top_k": {"top_k": 2},
    "AdaptiveGraph pooled": {"nodes": "pooled", "adjacency": "mlp", "top_k": 3},
}


def small(name: str) -> Build:
    kind = name.split()[0]
    return partial(HEADS[kind], dim=8, **SMALL.get(kind, {}) | VARIANTS.get(name, {}))


LATE = {name: small(name) for name in [*available(family="late"), "ConfidenceWeighted energy"]} | {
    "WeightedLogits given": lambda dims, out_dim, **more: WeightedLogits(
        dims, out_dim, dim=8, weights={name: 1.0 + place for place, name in enumerate(dims)}, **more
    ),
}
WITH_UNIMODAL = {name: small(name) for name in [*available(), *VARIANTS] if name not in LATE}
FUSING = WITH_UNIMODAL | LATE
ALL = FUSING | {"Unimodal": partial(Unimodal, dim=8)}
ONLY_TWO = [name for name in FUSING if HEADS[name.split()[0]].most_modalities == 2 or name == "AlignedProduct cross"]

fusing = pytest.mark.parametrize("name", FUSING)
fusing_any_number = pytest.mark.parametrize("name", [name for name in FUSING if name not in ONLY_TWO])
every = pytest.mark.parametrize("name", ALL)
# A second each: those of every family run by default.
TRACED = ["JointTransformer", "Concat", "Gated", "LevelWeighted", "Perceiver", "LogitMean", "CrossAttention", "Unimodal"]
traced = pytest.mark.parametrize("name", slow_except(ALL, *TRACED))


def dims_of(name: str) -> dict[str, int]:
    return {"a": 4} if name == "Unimodal" else DIMS


def make(name: str, dims: dict[str, int] | None = None, *, dtype: torch.dtype = torch.float64, **more: bool) -> FusionHead:
    """The head in eval mode, with no parameter left at a start that would hide a mistake (zero gates, zero weights)."""
    torch.manual_seed(0)
    head = ALL[name](dims or dims_of(name), OUT, **more).to(dtype).eval()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return head


def whole(mask: Tensor, dim: int, dtype: torch.dtype = torch.float64) -> Features:
    return Features(torch.randn(*mask.shape, dim, dtype=dtype), mask, torch.randn(mask.shape[0], dim, dtype=dtype))


def batch_of(dims: dict[str, int], size: int = 4, *, seed: int = 1, dtype: torch.dtype = torch.float64) -> dict[str, Features]:
    """A mixed batch: padding in every modality; sample m lacks modality m, where there is another; the last lacks none."""
    torch.manual_seed(seed)
    features = {}
    for place, (name, dim) in enumerate(dims.items()):
        mask = torch.arange(COUNTS[name])[None] < torch.randint(1, COUNTS[name] + 1, (size, 1))
        if len(dims) > 1 and place < size - 1:
            mask[place] = False
        features[name] = whole(mask, dim, dtype)
    return features


def smudged(features: dict[str, Features], junk: float | None) -> dict[str, Features]:
    """Other values under every False mask: `junk`, or noise if None."""

    def smudge(x: Tensor, mask: Tensor) -> Tensor:
        other = 5 * torch.randn_like(x) if junk is None else torch.full_like(x, junk)
        return torch.where(mask[..., None], x, other)

    return {name: f._replace(tokens=smudge(f.tokens, f.mask), pooled=smudge(f.pooled, f.present)) for name, f in features.items()}


def run(head: FusionHead, features: dict[str, Features]) -> tuple[Tensor, dict[str, Tensor]]:
    """The output, and by name the gradient of every parameter and of every input, of a loss that reads all that is meant to be read."""
    leaves = {
        name: f._replace(tokens=f.tokens.detach().clone().requires_grad_(), pooled=f.pooled.detach().clone().requires_grad_())
        for name, f in features.items()
    }
    head.zero_grad()
    output, by_modality, *_ = head(leaves)
    loss = output.sin().sum()
    for name, alone in by_modality.items():
        loss = loss + alone[leaves[name].present].cos().sum()
    loss.backward()
    gradients = {f"parameter {name}": p.grad for name, p in head.named_parameters()}
    for name, f in leaves.items():
        gradients |= {f"tokens {name}": f.tokens.grad, f"pooled {name}": f.pooled.grad}
    return output.detach(), {name: g for name, g in gradients.items() if g is not None}
