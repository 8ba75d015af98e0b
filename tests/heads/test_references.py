"""Heads against the published formulas, in float64 NumPy."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy_layers import Array, Sample, array, attention, batch, gelu, linear, norm, normalised, ready, samples, sigmoid, softmax
from torch.nn.functional import multi_head_attention_forward

from fusion.features import Features
from fusion.heads import (
    Concat,
    ConfidenceWeighted,
    Embrace,
    FusionHead,
    Gated,
    LogitMean,
    PredictedConfidence,
    ProductOfExperts,
    ResidualMLP,
    Stacking,
    WeightedLogits,
)
from fusion.heads.attention import Attention
from fusion.heads.joint_transformer import sinusoid

DIMS = {"a": 4, "b": 6}


def pooled(size: int = 5) -> dict[str, Array]:
    generator = np.random.default_rng(0)
    return {name: generator.normal(size=(size, dim)) for name, dim in DIMS.items()}


def as_features(x: dict[str, Array], present: dict[str, list[bool]]) -> dict[str, Features]:
    tensors = {name: torch.from_numpy(value) for name, value in x.items()}
    return {name: Features(t[:, None], torch.tensor(present[name])[:, None], t) for name, t in tensors.items()}


def test_gated_with_two_modalities_is_the_sigmoid_unit_of_arevalo_and_others() -> None:
    """h = z * tanh(W_a x_a) + (1 - z) * tanh(W_b x_b) with z = sigmoid(W_z [x_a; x_b]): W_z is the difference of the two gates."""
    torch.manual_seed(0)
    head = Gated(DIMS, 3, dim=7).double().eval()
    x = pooled()

    gate_a, gate_b = head.gate["a"], head.gate["b"]
    w_z = (gate_a.weight - gate_b.weight).detach().numpy()
    b_z = (gate_a.bias - gate_b.bias).detach().numpy()
    z = sigmoid(np.concatenate([x["a"], x["b"]], axis=-1) @ w_z.T + b_z)
    h = z * np.tanh(linear(head.candidate["a"], x["a"])) + (1 - z) * np.tanh(linear(head.candidate["b"], x["b"]))

    output = head({name: torch.from_numpy(value) for name, value in x.items()}).output
    np.testing.assert_allclose(output.detach().numpy(), linear(head.classifier, h), rtol=1e-12)


def test_gated_keeps_the_only_modality_that_is_there_whole() -> None:
    torch.manual_seed(0)
    head = Gated(DIMS, 3, dim=7).double().eval()
    x = pooled(1)
    output = head(as_features(x, {"a": [False], "b": [True]})).output
    expected = linear(head.classifier, np.tanh(linear(head.candidate["b"], x["b"])))
    np.testing.assert_allclose(output.detach().numpy(), expected, rtol=1e-12)


def test_concat_mixes_normalised_features_side_by_side() -> None:
    torch.manual_seed(0)
    head = Concat(DIMS, 3, dim=7).double().eval()
    x = pooled()
    present = {"a": [True, True, False, True, True], "b": [True, False, True, True, True]}
    for layer in head.norm.values():  # a shift, which an absent modality must not bring in
        torch.nn.init.normal_(layer.bias)
    shift = {name: head.norm[name].bias.detach().numpy() for name in DIMS}
    side_by_side = [(normalised(x[name]) + shift[name]) * np.array(present[name])[:, None] for name in DIMS]
    expected = linear(head.classifier, gelu(linear(head.mix[0], np.concatenate(side_by_side, axis=-1))))
    np.testing.assert_allclose(head(as_features(x, present)).output.detach().numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_attention_is_softmax_attention_over_the_real_tokens(heads: int) -> None:
    torch.manual_seed(0)
    layer = Attention(8, heads).double().eval()
    x, context = torch.randn(4, 3, 8, dtype=torch.float64), torch.randn(4, 5, 8, dtype=torch.float64)
    mask = torch.rand(4, 5) > 0.4
    mask[2] = False
    expected = np.stack([attention(layer, array(one), array(read[real])) for one, read, real in zip(x, context, mask, strict=True)])
    np.testing.assert_allclose(layer(x, context, mask).detach().numpy(), expected, atol=1e-12)
    assert (expected[2] == 0).all()
    assert (np.abs(expected[0]) > 0).any()


def test_attention_agrees_with_that_of_torch() -> None:
    torch.manual_seed(0)
    layer = Attention(8, 2).double().eval()
    x, context = torch.randn(4, 3, 8, dtype=torch.float64), torch.randn(4, 5, 8, dtype=torch.float64)
    mask = torch.arange(5)[None] < torch.tensor([5, 3, 1, 4])[:, None]
    expected, _ = multi_head_attention_forward(
        x.transpose(0, 1),
        context.transpose(0, 1),
        context.transpose(0, 1),
        embed_dim_to_check=8,
        num_heads=2,
        in_proj_weight=torch.cat([layer.query.weight, layer.key.weight, layer.value.weight]),
        in_proj_bias=torch.cat([layer.query.bias, layer.key.bias, layer.value.bias]),
        bias_k=None,
        bias_v=None,
        add_zero_attn=False,
        dropout_p=0.0,
        out_proj_weight=layer.out.weight,
        out_proj_bias=layer.out.bias,
        training=False,
        key_padding_mask=~mask,
    )
    torch.testing.assert_close(layer(x, context, mask), expected.transpose(0, 1), atol=1e-12, rtol=0)


def test_logit_mean_is_the_mean_of_the_decisions_of_the_modalities_that_are_there() -> None:
    torch.manual_seed(0)
    head = LogitMean(DIMS, 3, dim=0).double().eval()
    x = pooled(4)
    present = {"a": [True, False, True, False], "b": [True, True, False, False]}
    output, by_modality, *_ = head(as_features(x, present))
    logits = {name: linear(head.decide[name][-1], normalised(x[name])) for name in DIMS}  # LayerNorm, then linear
    expected = [(logits["a"][0] + logits["b"][0]) / 2, logits["b"][1], logits["a"][2], np.zeros(3)]
    np.testing.assert_allclose(output.detach().numpy(), np.stack(expected), atol=1e-12)
    for name, row in (("a", 0), ("b", 1)):
        np.testing.assert_allclose(by_modality[name][row].detach().numpy(), logits[name][row], atol=1e-12)


def test_given_weights_count_in_proportion_among_the_modalities_that_are_there() -> None:
    torch.manual_seed(0)
    head = WeightedLogits(DIMS, 3, weights={"b": 1.0, "a": 3.0}, dim=0).double().eval()
    x = pooled(3)
    output = head(as_features(x, {"a": [True, False, True], "b": [True, True, False]})).output
    logits = {name: linear(head.decide[name][-1], normalised(x[name])) for name in DIMS}
    expected = [0.75 * logits["a"][0] + 0.25 * logits["b"][0], logits["b"][1], logits["a"][2]]
    np.testing.assert_allclose(output.detach().numpy(), np.stack(expected), atol=1e-6)  # the weights are kept in float32


def test_learned_weights_are_a_softmax_over_the_modalities_that_are_there() -> None:
    torch.manual_seed(0)
    dims = DIMS | {"c": 2}
    head = WeightedLogits(dims, 3, dim=0).double().eval()
    np.testing.assert_allclose(head.weights.numpy(), [1 / 3] * 3)
    with torch.no_grad():
        head.log_weights.copy_(torch.tensor([0.5, -1.0, 2.0]))
    x = pooled(1) | {"c": np.array([[0.3, -0.2]])}
    output = head(as_features(x, {"a": [True], "b": [False], "c": [True]})).output
    share = np.exp(0.5) / (np.exp(0.5) + np.exp(2.0))
    logits = {name: linear(head.decide[name][-1], normalised(x[name])) for name in dims}
    np.testing.assert_allclose(output.detach().numpy(), share * logits["a"] + (1 - share) * logits["c"], atol=1e-12)


def test_learned_weights_move_towards_the_modality_that_knows_the_answer() -> None:
    torch.manual_seed(0)
    head = WeightedLogits({"a": 2, "b": 2}, 2, dim=8)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.02)
    for _ in range(100):
        features = {"a": torch.randn(64, 2), "b": torch.randn(64, 2)}
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(head(features).output, (features["b"][:, 0] > features["b"][:, 1]).long()).backward()
        optimizer.step()
    assert head.weights[1] > head.weights[0]


@pytest.mark.parametrize("dim", [8, 7])
def test_the_sinusoid_is_that_of_vaswani_and_others(dim: int) -> None:
    """PE(position, 2i) = sin(position / 10000^(2i / D)), PE(position, 2i + 1) = cos of the same."""
    expected = np.zeros((50, dim))
    for position in range(50):
        for column in range(dim):
            angle = position / 10000 ** (2 * (column // 2) / dim)
            expected[position, column] = np.cos(angle) if column % 2 else np.sin(angle)
    np.testing.assert_allclose(sinusoid(torch.zeros(2, 50, dim, dtype=torch.float64)).numpy(), expected, atol=1e-5)  # made in float32


def test_attention_begins_by_picking() -> None:
    """Of tokens of unit variance the logits begin with a standard deviation near 3: softmax picks, where PyTorch's default averages."""
    torch.manual_seed(0)
    attention = Attention(64, 4)
    x, context = torch.randn(50, 20, 64), torch.randn(50, 30, 64)
    query, key = attention.split(attention.query(x)), attention.split(attention.key(context))
    logits = (query @ key.transpose(-1, -2)).detach() / 16**0.5
    assert 2.5 < float(logits.std()) < 3.5
    assert float(logits.softmax(dim=-1).amax(dim=-1).mean()) > 0.3  # 1/30 if it averaged


def decisions(head: FusionHead, sample: Sample) -> dict[str, Array]:
    """The logits of each modality that the sample has."""
    found = {}
    for name, f in sample.items():
        if f is not None:
            decide = head.decide[name]
            found[name] = linear(decide[4], gelu(linear(decide[1], norm(decide[0], f[1]))))
    return found


def rows(head: FusionHead, reference: Callable[[Sample], Array]) -> None:
    features = batch(DIMS, {"a": 2, "b": 3})
    expected = np.stack([reference(sample) for sample in samples(features)])
    np.testing.assert_allclose(array(head(features).output), expected, atol=1e-8)


def test_a_product_of_experts_is_the_normalised_product_of_softmaxes() -> None:
    head = ready(ProductOfExperts(DIMS, 3, dim=5))

    def reference(sample: Sample) -> Array:
        product = np.prod([softmax(logits) for logits in decisions(head, sample).values()], axis=0)
        return np.log(product / product.sum())

    rows(head, reference)


def test_confidence_is_one_less_the_share_of_the_entropy_that_a_guess_would_have() -> None:
    head = ready(ConfidenceWeighted(DIMS, 3, dim=5))

    def reference(sample: Sample) -> Array:
        logits = np.stack(list(decisions(head, sample).values()))
        p = softmax(logits)
        sure = 1 + (p * np.log(p)).sum(axis=1) / np.log(3)
        return softmax(np.exp(head.log_sharpness.item()) * sure) @ logits

    rows(head, reference)


def test_an_energy_is_a_tenth_of_the_log_sum_of_exponentials_and_no_gradient_passes_through_it() -> None:
    head = ready(ConfidenceWeighted(DIMS, 3, dim=5, score="energy"))

    def reference(sample: Sample) -> Array:
        logits = np.stack(list(decisions(head, sample).values()))
        return softmax(np.exp(head.log_sharpness.item()) * np.log(np.exp(logits).sum(axis=1)) / 10) @ logits

    rows(head, reference)
    shifted = copy.deepcopy(head)
    with torch.no_grad():
        shifted.decide["a"][-1].bias += 3  # which changes no decision of a alone, but its weight
    features = batch(DIMS, {"a": 2, "b": 3})
    assert not torch.allclose(head(features).output[2:].softmax(dim=1), shifted(features).output[2:].softmax(dim=1))
    weighted, alone, *_ = head(features)
    found = torch.autograd.grad(weighted[2:].softmax(dim=1)[:, 0].sum(), alone["a"])[0]
    assert torch.allclose(found.sum(dim=1), torch.zeros(5, dtype=torch.float64))


@pytest.mark.parametrize("dims", [DIMS, DIMS | {"c": 2}])
def test_predicted_confidences_weight_by_mono_and_holo_confidence_and_relative_calibration(dims: dict[str, int]) -> None:
    head = ready(PredictedConfidence(dims, 3, dim=5))

    def reference(sample: Sample) -> Array:
        logits, c = decisions(head, sample), {}
        for name in logits:
            predict, found = head.predict_confidence[name], sample[name]
            assert found is not None
            c[name] = sigmoid(linear(predict[4], gelu(linear(predict[1], norm(predict[0], found[1])))))[0]
        losses = {name: -np.log(value) for name, value in c.items()}
        distance = {name: np.abs(softmax(x) - 1 / 3).mean() for name, x in logits.items()}
        scores = []
        for name in logits:
            others = [losses[other] / sum(losses.values()) for other in logits if other != name]
            scores.append((c[name] + (np.mean(others) if others else 0)) * distance[name] / max(distance.values()))
        return softmax(np.array(scores)) @ np.stack(list(logits.values()))

    features = batch(dims, {"a": 2, "b": 3, "c": 2})
    expected = np.stack([reference(sample) for sample in samples(features)])
    np.testing.assert_allclose(array(head(features).output), expected, atol=1e-8)


def test_stacking_decides_over_log_probabilities_and_presence() -> None:
    head = ready(Stacking(DIMS, 3, dim=5, hidden=7))

    def reference(sample: Sample) -> Array:
        found = decisions(head, sample)
        log_p = [np.log(softmax(found[name])) if name in found else np.zeros(3) for name in DIMS]
        x = np.concatenate([*log_p, [float(name in found) for name in DIMS]])
        return linear(head.mix[3], gelu(linear(head.mix[0], x)))

    rows(head, reference)


def test_stacking_shapes_the_decisions_only_if_they_are_not_detached() -> None:
    for detach in (False, True):
        head = Stacking(DIMS, 3, dim=5, detach=detach)
        head({"a": torch.randn(2, 4), "b": torch.randn(2, 6)}).output.sin().sum().backward()
        assert all((p.grad is None) == detach for p in head.decide.parameters())
        assert all(p.grad is not None for p in head.mix.parameters())


def test_a_residual_mlp_adds_to_the_joint_vector_block_by_block() -> None:
    head = ready(ResidualMLP(DIMS, 3, dim=5, depth=2))

    def reference(sample: Sample) -> Array:
        x = np.concatenate([np.zeros(DIMS[name]) if f is None else norm(head.norm[name], f[1]) for name, f in sample.items()])
        x = linear(head.project, x)
        for block in head.blocks:
            x = x + linear(block[1][3], gelu(linear(block[1][0], norm(block[0], x))))
        return linear(head.classifier, norm(head.norm_joint, x))

    rows(head, reference)


def test_embrace_expects_the_docked_features_of_the_modalities_that_are_there() -> None:
    head = ready(Embrace(DIMS, 3, dim=5, probabilities={"a": 3.0, "b": 1.0}))

    def reference(sample: Sample) -> Array:
        share = {name: p for name, p in (("a", 0.75), ("b", 0.25)) if sample[name] is not None}
        e = np.zeros(5)
        for name, p in share.items():
            dock = head.dock[name]
            e += p / sum(share.values()) * np.maximum(linear(dock[1], norm(dock[0], sample[name][1])), 0)  # type: ignore[index]
        return linear(head.classifier, gelu(linear(head.mix[1], e)))

    rows(head, reference)
