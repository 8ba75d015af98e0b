"""What each head can learn: XOR of two modalities is told by neither alone, and by no sum of what each says."""

import math
from typing import Any

import pytest
import torch
from slow_cases import slow_except
from torch import Tensor
from torch.nn.functional import cross_entropy

from fusion.heads import FusionHead, available
from fusion.heads.registry import HEADS, one_line

WIDTH = 4
DIMS = {"text": WIDTH, "image": WIDTH}


def xor(count: int, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    """One sign a modality, in its first feature, with noise around it and in the others; two tokens a modality, the sign in both."""
    bits = torch.randint(0, 2, (count, 2), generator=generator)
    features = {}
    for column, name in enumerate(DIMS):
        tokens = 0.2 * torch.randn(count, 2, WIDTH, generator=generator)
        tokens[..., 0] += 2.0 * bits[:, column, None] - 1
        features[name] = tokens
    return features, bits[:, 0] ^ bits[:, 1]


def after_training(head: FusionHead, updates: int = 150, *, seed: int = 0, lr: float = 3e-3) -> tuple[float, float]:
    """Accuracy and cross-entropy on samples it has not seen."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr)
    for _ in range(updates):
        features, label = xor(128, generator)
        optimizer.zero_grad()
        cross_entropy(head(features).output, label).backward()
        optimizer.step()
    features, label = xor(1000, generator)
    with torch.no_grad():
        output = head.eval()(features).output
    return float((output.argmax(dim=1) == label).float().mean()), float(cross_entropy(output, label))


# A head joins by being in the registry; here stand the options that make it small, and further forms of it.
SMALL: dict[str, dict[str, Any]] = {
    "TensorFusion": {"embed": 8},
    "AlignedProduct cross": {"interaction": "cross"},
    "Bottleneck": {"dim": 16, "num_heads": 2},
    "Perceiver": {"dim": 16, "num_heads": 2, "latents": 4},
    "CrossAttention": {"dim": 16, "depth": 1, "num_heads": 2},
    "CrossAttention tanh_gate": {"dim": 16, "depth": 1, "num_heads": 2, "direction": "text_to_image", "tanh_gate": True},
    "CoAttention": {"dim": 16, "depth": 1, "num_heads": 2},
    "GatedCrossAttention": {"dim": 16, "num_heads": 2},
    "JointTransformer": {"dim": 16, "depth": 2, "num_heads": 2},
    "InteractionExperts tokens": {"dim": 16, "expert": "CrossAttention", "expert_args": {"depth": 1, "num_heads": 2}},
    "ConfidenceWeighted energy": {"score": "energy"},
    "PredictedConfidence detach": {"detach": True},
    "AdaptiveGraph top_k": {"top_k": 3},
    "AdaptiveGraph mlp": {"adjacency": "mlp"},
    "AdaptiveGraph pooled": {"nodes": "pooled"},
}
ADDITIVE = [
    "LogitMean",
    "WeightedLogits",
    "ProductOfExperts",
    "ConfidenceWeighted",
    "ConfidenceWeighted energy",
    "PredictedConfidence detach",
]
MIXING = sorted({*available(), *SMALL} - {*ADDITIVE, "PredictedConfidence"})
LEARNS_IN_A_SECOND = ["Concat", "FiLM", "Gated", "LowRankTensor", "Stacking", "TensorFusion", "CrossAttention tanh_gate"]


def make(name: str) -> FusionHead:
    torch.manual_seed(0)
    return HEADS[name.split()[0]](DIMS, 2, **{"dim": 32} | SMALL.get(name, {}))


@pytest.mark.parametrize("name", slow_except(MIXING, *LEARNS_IN_A_SECOND))
def test_heads_that_mix_learn_xor_of_two_modalities(name: str) -> None:
    accuracy, _ = after_training(make(name))
    assert accuracy >= 0.99


@pytest.mark.parametrize("name", ADDITIVE)
def test_additive_heads_stay_at_chance_on_xor_of_two_modalities_and_say_so(name: str) -> None:
    """f(a) + g(b) can put at most three of the four corners on their side, and its best loss is that of guessing, log 2."""
    outcomes = [after_training(make(name), seed=seed) for seed in range(5)]
    accuracies, losses = zip(*outcomes, strict=True)
    assert 0.40 <= sum(accuracies) / len(accuracies) <= 0.65
    assert max(accuracies) <= 0.80
    assert min(losses) >= math.log(2) - 0.02
    assert "XOR stays at chance" in one_line(HEADS[name.split()[0]].__doc__ or "")


def test_weights_learned_with_the_decisions_come_to_tell_xor() -> None:
    accuracy, _ = after_training(make("PredictedConfidence"), 600, lr=1e-2)
    assert accuracy >= 0.99


def test_stacking_tells_many_classes_apart_within_few_updates() -> None:
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(12, 16, generator=generator)

    def drawn(count: int) -> tuple[dict[str, Tensor], Tensor]:
        label = torch.randint(0, 12, (count,), generator=generator)
        return {"text": torch.randn(count, 16, generator=generator), "image": means[label]}, label

    torch.manual_seed(0)
    head = HEADS["Stacking"]({"text": 16, "image": 16}, 12)
    optimizer = torch.optim.AdamW(head.parameters(), lr=2e-3)
    for _ in range(60):
        features, label = drawn(32)
        optimizer.zero_grad()
        cross_entropy(head(features).output, label).backward()
        optimizer.step()
    features, label = drawn(1000)
    assert float((head(features).output.argmax(dim=1) == label).float().mean()) > 0.9
