"""The losses of distillation equal their formulas in float64, and stay finite where logits are extreme."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch.nn.functional import kl_div, log_softmax

from fusion.losses import cumulative_link_loss, cumulative_log_probabilities, feature_loss, soft_label_loss, soft_target_loss

B, C = 5, 4
LOGITS = arrays.arrays(np.float64, (B, C), elements=st.floats(-8, 8))
TEMPERATURES = st.sampled_from([0.5, 1.0, 2.0, 10.0])


def softmax(x):
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def close(ours, reference):
    assert ours.shape == (B,)
    np.testing.assert_allclose(ours.numpy(), reference, rtol=1e-8, atol=1e-10)


@given(LOGITS, LOGITS, TEMPERATURES)
def test_soft_targets_are_the_formula_of_hinton(x, teacher, t):
    p, q = softmax(x / t), softmax(teacher / t)
    found = soft_target_loss(torch.from_numpy(x), torch.from_numpy(q), temperature=t)
    close(found, t**2 * (q * np.log(q / p)).sum(axis=1))
    theirs = t**2 * kl_div(log_softmax(torch.from_numpy(x) / t, dim=1), torch.from_numpy(q), reduction="none").sum(dim=1)
    torch.testing.assert_close(found, theirs)


@given(LOGITS, LOGITS, TEMPERATURES)
def test_soft_labels_are_the_formula_for_each_label(x, teacher, t):
    p, q = sigmoid(x / t), sigmoid(teacher / t)
    each = q * np.log(q / p) + (1 - q) * np.log((1 - q) / (1 - p))
    close(soft_label_loss(torch.from_numpy(x), torch.from_numpy(q), temperature=t), t**2 * each.mean(axis=1))


@given(LOGITS, LOGITS)
def test_features_are_compared_by_half_their_mean_squared_difference(x, teacher):
    close(feature_loss(torch.from_numpy(x), torch.from_numpy(teacher)), ((x - teacher) ** 2).mean(axis=1) / 2)


def test_the_gradient_is_that_of_soft_cross_entropy_and_hardly_depends_on_a_high_temperature():
    """Hinton et al.: in the limit it is that of half the squared difference of centred logits, divided by the number of classes."""
    x = torch.randn(B, C, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(B, C, dtype=torch.float64)
    (slope,) = torch.autograd.grad(soft_target_loss(x, (teacher / 500).softmax(dim=1), temperature=500.0).sum(), x)
    centred = (x - x.mean(dim=1, keepdim=True)) - (teacher - teacher.mean(dim=1, keepdim=True))
    torch.testing.assert_close(slope, centred.detach() / C, atol=2e-3, rtol=0)
    q = (teacher / 2).softmax(dim=1)
    (one,) = torch.autograd.grad(soft_target_loss(x, q, temperature=2.0).sum(), x)
    (other,) = torch.autograd.grad(-4 * (q * log_softmax(x / 2, dim=1)).sum(), x)
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("loss", [soft_target_loss, soft_label_loss])
def test_it_is_zero_for_a_student_that_equals_its_teacher_and_finite_for_certain_ones(loss):
    certain = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    x = torch.tensor([[200.0, -200.0], [200.0, -200.0]], dtype=torch.float16, requires_grad=True)
    found = loss(x, certain, temperature=2.0)
    assert found.dtype == torch.float32
    assert abs(found[0].item()) < 1e-30
    assert found[1] > 100
    found.sum().backward()
    assert x.grad.isfinite().all()


@given(LOGITS)
def test_log_probabilities_of_ordered_classes_are_minus_their_losses_and_sum_to_one(x):
    output = torch.from_numpy(x)
    log_p = cumulative_log_probabilities(output)
    assert log_p.shape == (B, C + 1)
    for k in range(C + 1):
        torch.testing.assert_close(log_p[:, k], -cumulative_link_loss(output, torch.full((B,), k)))
    torch.testing.assert_close(log_p.exp().sum(dim=1), torch.ones(B, dtype=torch.float64))
    above = sigmoid(np.concatenate([x[:, :1], x[:, :1] - np.log1p(np.exp(x[:, 1:])).cumsum(axis=1)], axis=1))
    ones = np.ones((B, 1))
    p = np.concatenate([ones, above], axis=1) - np.concatenate([above, 0 * ones], axis=1)
    np.testing.assert_allclose(log_p.exp().numpy(), p, atol=1e-12)
