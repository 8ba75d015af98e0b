"""Every loss equals its formula in float64, has a finite gradient at extreme logits under autocast, and keeps torch's conventions."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from fusion.losses import (
    asymmetric_loss,
    binary_focal_loss,
    cumulative_link_loss,
    cumulative_logits,
    effective_number_weights,
    focal_loss,
    gaussian_loss,
    info_nce_loss,
    logit_adjusted_loss,
    quantile_loss,
    sigmoid_pair_loss,
)

B, C = 5, 4
LOGITS = arrays.arrays(np.float64, (B, C), elements=st.floats(-8, 8))
CLASSES = arrays.arrays(np.int64, (B,), elements=st.integers(0, C - 1))
LABELS = arrays.arrays(np.float64, (B, C), elements=st.sampled_from([0.0, 1.0]))


def softmax(x):
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def close(ours, reference):
    assert ours.shape == (B,)
    np.testing.assert_allclose(ours.numpy(), reference, rtol=1e-9, atol=1e-12)


@given(LOGITS, CLASSES, st.sampled_from([0.0, 0.5, 1.0, 2.0, 5.0]))
def test_focal_loss_is_its_formula(x, y, gamma):
    weight = np.array([0.5, 1.0, 2.0, 3.0])
    p = softmax(x)[np.arange(B), y]
    close(
        focal_loss(*map(torch.from_numpy, (x, y)), gamma=gamma, weight=torch.from_numpy(weight)), -weight[y] * (1 - p) ** gamma * np.log(p)
    )


@given(LOGITS, CLASSES, st.sampled_from([0.0, 0.5, 1.0, 2.0]))
def test_logit_adjustment_is_its_formula(x, y, tau):
    prior = np.array([0.7, 0.2, 0.09, 0.01])
    p = softmax(x + tau * np.log(prior))[np.arange(B), y]
    close(logit_adjusted_loss(*map(torch.from_numpy, (x, y, prior)), tau=tau), -np.log(p))


@given(LOGITS, LABELS, st.sampled_from([0.0, 0.5, 2.0]), st.sampled_from([None, 0.25]))
def test_binary_focal_loss_is_its_formula(x, y, gamma, alpha):
    pos_weight = np.array([1.0, 2.0, 0.5, 3.0])
    p = sigmoid(x)
    a_pos, a_neg = (1, 1) if alpha is None else (alpha, 1 - alpha)
    terms = np.where(y == 1, -a_pos * pos_weight * (1 - p) ** gamma * np.log(p), -a_neg * p**gamma * np.log(1 - p))
    ours = binary_focal_loss(*map(torch.from_numpy, (x, y)), gamma=gamma, alpha=alpha, pos_weight=torch.from_numpy(pos_weight))
    close(ours, terms.mean(axis=1))


@given(LOGITS, LABELS, st.sampled_from([0.0, 1.0]), st.sampled_from([0.0, 0.5, 4.0]), st.sampled_from([0.0, 0.05, 0.3]))
def test_asymmetric_loss_is_its_formula(x, y, positive, negative, margin):
    p = sigmoid(x)
    shifted = np.maximum(p - margin, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        focus = np.where((shifted == 0) & (margin > 0), 0, shifted**negative)
    terms = np.where(y == 1, -((1 - p) ** positive) * np.log(p), -focus * np.log(1 - shifted))
    close(
        asymmetric_loss(*map(torch.from_numpy, (x, y)), gamma_positive=positive, gamma_negative=negative, margin=margin), terms.mean(axis=1)
    )


@given(LOGITS, arrays.arrays(np.float64, (B,), elements=st.floats(-5, 5)))
def test_quantile_loss_is_its_formula_and_least_at_the_quantile(x, y):
    levels = [0.1, 0.5, 0.8, 0.95]
    expected = sum(np.where(y > x[:, i], q * (y - x[:, i]), (1 - q) * (x[:, i] - y)) for i, q in enumerate(levels))
    close(quantile_loss(torch.from_numpy(x), torch.from_numpy(y), levels), expected)
    sample = torch.linspace(0, 1, 1001, dtype=torch.float64)
    candidates = torch.linspace(0, 1, 101, dtype=torch.float64)
    means = [float(quantile_loss(c.expand(1001, 1), sample, [0.8]).mean()) for c in candidates]
    assert float(candidates[int(np.argmin(means))]) == pytest.approx(0.8, abs=0.011)


@given(*[arrays.arrays(np.float64, (B,), elements=st.floats(-5, 5))] * 3)
def test_gaussian_loss_is_the_negative_log_density(mean, log_variance, y):
    variance = np.exp(log_variance)
    density = np.exp(-((y - mean) ** 2) / (2 * variance)) / np.sqrt(2 * np.pi * variance)
    with np.errstate(divide="ignore"):
        reference = np.where(density > 1e-300, -np.log(density), (log_variance + (y - mean) ** 2 / variance + np.log(2 * np.pi)) / 2)
    close(gaussian_loss(*map(torch.from_numpy, (mean, log_variance, y))), reference)


@given(LOGITS, arrays.arrays(np.int64, (B,), elements=st.integers(0, C)))
def test_cumulative_link_loss_is_the_likelihood_of_a_distribution_over_ordered_classes(x, y):
    gaps = np.log1p(np.exp(x[:, 1:]))
    above = sigmoid(np.concatenate([x[:, :1], x[:, :1] - gaps.cumsum(axis=1)], axis=1))
    np.testing.assert_allclose(cumulative_logits(torch.from_numpy(x)).sigmoid().numpy(), above, rtol=1e-9)
    edges = np.concatenate([np.ones((B, 1)), above, np.zeros((B, 1))], axis=1)
    p = edges[:, :-1] - edges[:, 1:]
    assert (p >= 0).all()
    loss = cumulative_link_loss(torch.from_numpy(x), torch.from_numpy(y))
    np.testing.assert_allclose(np.exp(-loss.numpy()), p[np.arange(B), y], rtol=1e-7, atol=1e-12)


def test_effective_numbers_go_from_no_weights_to_inverse_frequencies():
    counts = torch.tensor([1.0, 10.0, 1000.0])
    assert torch.allclose(effective_number_weights(counts, 0.0), torch.ones(3))
    inverse = 1 / counts
    assert torch.allclose(effective_number_weights(counts, 1 - 1e-9), inverse * 3 / inverse.sum(), rtol=1e-4)
    beta = 0.99
    expected = (1 - beta) / (1 - beta ** counts.double())
    assert torch.allclose(effective_number_weights(counts, beta).double(), expected * 3 / expected.sum())
    with pytest.raises(ValueError, match="beta is 1"):
        effective_number_weights(counts, 1)


# torch's conventions.


def test_special_cases_are_torchs_own_losses():
    torch.manual_seed(0)
    x, y, labels = torch.randn(6, C), torch.randint(C, (6,)), torch.randint(2, (6, C)).float()
    weight = torch.rand(C)
    assert torch.allclose(focal_loss(x, y, gamma=0, weight=weight), cross_entropy(x, y, weight=weight, reduction="none"))
    assert torch.allclose(logit_adjusted_loss(x, y, torch.ones(C), weight=weight), cross_entropy(x, y, weight=weight, reduction="none"))
    bce = binary_cross_entropy_with_logits(x, labels, pos_weight=weight, reduction="none").mean(dim=1)
    assert torch.allclose(binary_focal_loss(x, labels, gamma=0, pos_weight=weight), bce)
    plain = binary_cross_entropy_with_logits(x, labels, reduction="none").mean(dim=1)
    assert torch.allclose(asymmetric_loss(x, labels, gamma_negative=0, margin=0), plain)
    two = torch.randn(6, 1)
    assert torch.allclose(
        cumulative_link_loss(two, (y > 1).long()), binary_cross_entropy_with_logits(two[:, 0], (y > 1).float(), reduction="none")
    )


@pytest.mark.parametrize("loss", [focal_loss, lambda *a, **k: logit_adjusted_loss(*a, torch.ones(C), **k), cumulative_link_loss])
def test_ignored_targets_have_no_loss_and_no_gradient(loss):
    x, y = torch.randn(3, C, requires_grad=True), torch.tensor([1, -100, 2])
    each = loss(x, y)
    each.sum().backward()
    assert each[1] == 0
    assert (x.grad[1] == 0).all()
    assert (x.grad[[0, 2]] != 0).any(dim=1).all()
    assert loss(x, torch.tensor([1, 0, 2]), ignore_index=0)[1] == 0


EXTREMES = torch.tensor([[-6e4, 6e4, 0.0, 1.0], [6e4, -6e4, 6e4, 0.0], [0.0, 0.0, 0.0, 0.0], [-6e4] * 4, [6e4] * 4])
LABELS_OF_EXTREMES = torch.tensor([[1.0, 0, 1, 0], [0, 1, 0, 1], [1, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 1]])
ALL = {
    "focal": lambda x: focal_loss(x, torch.tensor([0, 1, 2, 3, 0]), gamma=0.5),
    "logit adjusted": lambda x: logit_adjusted_loss(x, torch.tensor([0, 1, 2, 3, 0]), torch.tensor([0.97, 0.01, 0.01, 0.01])),
    "binary focal": lambda x: binary_focal_loss(x, LABELS_OF_EXTREMES, gamma=0.5),
    "asymmetric": lambda x: asymmetric_loss(x, LABELS_OF_EXTREMES, gamma_negative=0.5),
    "asymmetric without margin": lambda x: asymmetric_loss(x, LABELS_OF_EXTREMES, gamma_positive=0.5, margin=0),
    "quantiles": lambda x: quantile_loss(x, torch.zeros(5), [0.1, 0.5, 0.6, 0.9]),
    "gaussian": lambda x: gaussian_loss(x[:, 0], x[:, 1], torch.tensor([1.0, -1.0, 0.0, 5.0, 5.0])),
    "cumulative link": lambda x: cumulative_link_loss(x, torch.tensor([0, 1, 2, 3, 4])),
}


@pytest.mark.parametrize("name", ALL)
def test_extreme_fp16_logits_under_autocast_have_finite_losses_and_gradients(name):
    x = EXTREMES.half().requires_grad_()
    with torch.autocast("cpu", dtype=torch.float16):
        each = ALL[name](x)
    assert each.dtype == torch.float32
    assert torch.isfinite(each).all()
    (each / 6e4).mean().backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("name", ALL)
def test_gradients_are_those_of_finite_differences(name):
    torch.manual_seed(0)
    x = torch.randn(5, C, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ALL[name], (x,))


PAIRS = arrays.arrays(np.float64, (B, C), elements=st.floats(-4, 4))


@given(PAIRS, PAIRS)
def test_info_nce_is_its_formula_both_ways(left, right):
    logits = left @ right.T
    expected = -(np.log(np.diag(softmax(logits))) + np.log(np.diag(softmax(logits.T)))) / 2
    close(info_nce_loss(torch.from_numpy(left), torch.from_numpy(right)), expected)


@given(PAIRS, PAIRS)
def test_the_pairwise_sigmoid_loss_is_its_formula(left, right):
    signs = 2 * np.eye(B) - 1
    close(sigmoid_pair_loss(torch.from_numpy(left), torch.from_numpy(right)), -np.log(sigmoid(signs * (left @ right.T))).sum(axis=1))


@pytest.mark.parametrize("loss", [info_nce_loss, sigmoid_pair_loss])
def test_contrastive_losses_take_candidates_weights_exclusions_and_ignored_targets_as_torch_does(loss):
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(B, C, dtype=torch.float64, generator=generator) for _ in range(2))
    whole = loss(left, right)
    rows = torch.tensor([3, 1])
    candidates = {"rights": right} | ({"lefts": left} if loss is info_nce_loss else {})
    assert torch.allclose(loss(left[rows], right[rows], target=rows, **candidates), whole[rows])
    weight = torch.tensor([1.0, 0.0, 2.0, 0.5, 3.0], dtype=torch.float64)
    assert torch.allclose(loss(left, right, weight=weight), whole * weight)
    ignored = loss(left, right, target=torch.tensor([0, -100, 2, 3, 4]))
    assert ignored[1] == 0
    assert torch.allclose(ignored[2], whole[2])
    excluded = torch.zeros(B, B, dtype=torch.bool)
    excluded[:, 4] = excluded[4] = True  # also of itself, which has no effect
    without = loss(left[:4], right[:4])
    assert torch.allclose(loss(left, right, excluded=excluded)[:4], without)
    assert torch.autograd.gradcheck(lambda x, y: loss(x, y, excluded=excluded), (left.requires_grad_(), right.requires_grad_()))


@pytest.mark.parametrize("loss", [info_nce_loss, sigmoid_pair_loss])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_contrastive_losses_are_finite_at_extreme_logits_under_autocast(loss, dtype):
    left = torch.tensor([[200.0, 0.0], [0.0, 200.0], [-200.0, 0.0]], dtype=dtype, requires_grad=True)
    right = torch.tensor([[-200.0, 0.0], [0.0, 200.0], [200.0, 0.0]], dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        each = loss(left, right)
    assert each.dtype == torch.float32
    assert each[0] >= 40_000
    each.sum().backward()
    assert all(x.grad.isfinite().all() and x.grad.abs().max() > 0 for x in (left, right))
