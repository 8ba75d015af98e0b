"""Features and masks: what stands under a False mask is never seen, in value or in gradient."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fusion.features import Features, as_one_token, masked_mean, masked_softmax, promote, zero_masked

JUNK = st.sampled_from([float("nan"), float("inf"), float("-inf"), 1e30, -7.0])


@st.composite
def masks(draw: st.DrawFn) -> Tensor:
    """(B, N) bool, rows without any True among them."""
    batch, count = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    rows = draw(st.lists(st.lists(st.booleans(), min_size=count, max_size=count), min_size=batch, max_size=batch))
    return torch.tensor(rows)


def values(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_promote_gives_features_as_they_are() -> None:
    features = Features(torch.randn(2, 3, 4), torch.tensor([[True, False, False], [False] * 3]), torch.randn(2, 4))
    assert promote(features) is features


def test_promote_takes_three_dimensions_as_real_tokens_pooled_by_their_mean() -> None:
    tokens = values(2, 5, 3, seed=0)
    features = promote(tokens)
    assert features.mask.dtype == torch.bool
    assert features.mask.shape == (2, 5)
    assert features.mask.all()
    assert features.tokens is tokens
    np.testing.assert_allclose(features.pooled.numpy(), tokens.numpy().mean(axis=1), rtol=1e-12)


def test_promote_takes_two_dimensions_as_one_token_that_is_also_the_pooled_vector() -> None:
    pooled = values(4, 3, seed=0)
    features = promote(pooled)
    assert features.tokens.shape == (4, 1, 3)
    assert torch.equal(features.tokens[:, 0], pooled)
    assert features.mask.shape == (4, 1)
    assert features.present.all()
    assert features.pooled is pooled
    assert features.dim == 3


@pytest.mark.parametrize("shape", [(), (3,), (1, 2, 3, 4)])
def test_promote_refuses_other_shapes_naming_the_two_that_it_takes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\(B, N, D\).*\(B, D\)") as refused:
        promote(torch.zeros(shape))
    assert str(shape) in str(refused.value)


@given(mask=masks())
def test_present_is_the_samples_with_a_real_token(mask: Tensor) -> None:
    features = Features(torch.zeros(*mask.shape, 2), mask, torch.zeros(mask.shape[0], 2))
    assert features.present.tolist() == [any(row) for row in mask.tolist()]


@given(mask=masks(), junk=JUNK, seed=st.integers(0, 999))
def test_zero_masked_keeps_what_is_real_and_lets_nothing_else_through(mask: Tensor, junk: float, seed: int) -> None:
    real = mask.numpy()[..., None]
    present = mask.numpy().any(axis=1, keepdims=True)
    plain_tokens, plain_pooled = values(*mask.shape, 3, seed=seed), values(mask.shape[0], 3, seed=seed + 1)
    tokens = plain_tokens.masked_fill(~mask[..., None], junk).requires_grad_()
    pooled = plain_pooled.masked_fill(~mask.any(dim=1)[:, None], junk).requires_grad_()

    clean = zero_masked(Features(tokens, mask, pooled))
    (clean.tokens.square().sum() + clean.pooled.square().sum()).backward()

    np.testing.assert_array_equal(clean.tokens.detach().numpy(), np.where(real, plain_tokens.numpy(), 0))
    np.testing.assert_array_equal(clean.pooled.detach().numpy(), np.where(present, plain_pooled.numpy(), 0))
    assert clean.mask is mask
    np.testing.assert_allclose(tokens.grad.numpy(), np.where(real, 2 * plain_tokens.numpy(), 0))
    np.testing.assert_allclose(pooled.grad.numpy(), np.where(present, 2 * plain_pooled.numpy(), 0))


@given(mask=masks(), junk=JUNK, seed=st.integers(0, 999))
def test_masked_mean_is_the_mean_of_the_real_tokens_and_zero_without_any(mask: Tensor, junk: float, seed: int) -> None:
    plain = values(*mask.shape, 3, seed=seed)
    tokens = plain.masked_fill(~mask[..., None], junk).requires_grad_()

    mean = masked_mean(tokens, mask)
    mean.sum().backward()

    real = mask.numpy()
    expected = [row[keep].mean(axis=0) if keep.any() else np.zeros(3) for row, keep in zip(plain.numpy(), real, strict=True)]
    np.testing.assert_allclose(mean.detach().numpy(), np.stack(expected), atol=1e-12)
    share = np.where(real, 1 / real.sum(axis=1, keepdims=True).clip(min=1), 0)
    np.testing.assert_allclose(tokens.grad.numpy(), np.broadcast_to(share[..., None], plain.shape))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_masked_functions_keep_the_type_of_what_they_are_given(dtype: torch.dtype) -> None:
    mask = torch.tensor([[True, False], [False, False]])
    tokens = torch.ones(2, 2, 3, dtype=dtype)
    assert masked_mean(tokens, mask).dtype == dtype
    assert masked_softmax(tokens, mask[..., None], dim=1).dtype == dtype
    assert zero_masked(Features(tokens, mask, tokens[:, 0])).tokens.dtype == dtype


@given(mask=masks(), junk=JUNK, seed=st.integers(0, 999))
def test_masked_softmax_shares_one_among_the_real_and_gives_exact_zeros_elsewhere(mask: Tensor, junk: float, seed: int) -> None:
    plain = values(*mask.shape, seed=seed)
    scores = plain.masked_fill(~mask, junk).requires_grad_()

    weights = masked_softmax(scores, mask, dim=1)
    (weights * values(*mask.shape, seed=seed + 1)).sum().backward()

    exponentials = np.where(mask.numpy(), np.exp(plain.numpy()), 0)
    total = exponentials.sum(axis=1, keepdims=True)
    expected = np.divide(exponentials, total, out=np.zeros_like(exponentials), where=total > 0)
    np.testing.assert_allclose(weights.detach().numpy(), expected, atol=1e-12)
    assert (weights.detach()[~mask] == 0).all()
    assert scores.grad.isfinite().all()
    assert (scores.grad[~mask] == 0).all()


def test_masked_softmax_of_rows_without_any_real_entry_is_zero_with_a_zero_gradient() -> None:
    scores = torch.randn(2, 3, requires_grad=True)
    weights = masked_softmax(scores, torch.zeros(2, 3, dtype=torch.bool), dim=1)
    weights.sum().backward()
    assert (weights == 0).all()
    assert (scores.grad == 0).all()


def test_masked_softmax_broadcasts_its_mask_and_takes_any_dimension() -> None:
    scores = values(2, 3, 4, seed=0)
    mask = torch.tensor([[True, False, True], [False, False, False]])
    weights = masked_softmax(scores, mask[..., None], dim=1)
    np.testing.assert_allclose(weights.sum(dim=1).numpy(), [[1.0] * 4, [0.0] * 4])
    assert torch.equal(weights[0, [0, 2]], scores[0, [0, 2]].softmax(dim=0))


@given(mask=masks(), data=st.data())
def test_shared_inputs_are_those_of_each_sample(mask: Tensor, data: st.DataObject) -> None:
    distinct, count = mask.shape
    rows = torch.tensor(data.draw(st.lists(st.integers(0, distinct - 1), min_size=1, max_size=6)))
    there = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows))))
    shared = Features(values(distinct, count, 3, seed=0), mask[rows] & there[:, None], values(distinct, 3, seed=1), rows)
    own = shared.unshared()
    assert own.indices is None
    assert torch.equal(own.mask, shared.mask)
    for sample, row in enumerate(rows):
        assert torch.equal(own.tokens[sample], shared.tokens[row])
        assert torch.equal(own.pooled[sample], shared.pooled[row])
    for row in range(distinct):
        shown = [sample for sample in range(len(rows)) if rows[sample] == row and there[sample]]
        assert torch.equal(shared.distinct_mask[row], mask[row] if shown else torch.zeros(count, dtype=torch.bool))


def test_zeroing_shared_inputs_keeps_them_shared_and_clears_those_that_no_sample_has() -> None:
    tokens, pooled = values(3, 2, 4, seed=0), values(3, 4, seed=1)
    tokens[1:], pooled[1:] = float("nan"), float("nan")
    mask = torch.tensor([[True, True], [False, False], [True, True]])
    clean = zero_masked(Features(tokens, mask, pooled, torch.tensor([0, 1, 0])))
    assert torch.equal(clean.tokens, torch.cat([tokens[:1], torch.zeros(2, 2, 4)]))
    assert torch.equal(clean.pooled, torch.cat([pooled[:1], torch.zeros(2, 4)]))
    assert clean.indices is not None


def test_pooled_features_as_one_token_are_those_of_each_sample_and_zero_where_absent() -> None:
    pooled = values(2, 4, seed=1)
    pooled[1] = float("nan")
    mask = torch.tensor([[True, False], [False, False], [True, True]])
    one = as_one_token(Features(values(2, 2, 4, seed=0), mask, pooled, torch.tensor([0, 1, 0])))
    assert torch.equal(one.pooled, torch.stack([pooled[0], torch.zeros(4, dtype=torch.float64), pooled[0]]))
    assert torch.equal(one.tokens[:, 0], one.pooled)
    assert one.mask.tolist() == [[True], [False], [True]]
    assert one.indices is None
