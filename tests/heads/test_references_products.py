"""Heads that multiply their modalities, against the published formulas in float64 NumPy, written out in full tensors."""

import itertools

import numpy as np
import pytest
import torch
from numpy_layers import Array, Sample, array, batch, gelu, linear, norm, normalised, ready, samples

from fusion.heads import AlignedProduct, FactorizedBilinear, FiLM, FusionHead, LowRankTensor, Mutan, TensorFusion
from fusion.heads.factorized_bilinear import SMALLEST, signed_sqrt

DIMS = {"a": 4, "b": 6}
COUNTS = {"a": 2, "b": 3, "c": 2}


def agrees(head: FusionHead, reference, dims: dict[str, int] = DIMS) -> None:  # type: ignore[no-untyped-def]
    """The head's outputs are its classifier's of what `reference` gives for each sample."""
    features = batch(dims, COUNTS)
    expected = [linear(head.classifier, reference(sample)) for sample in samples(features)]
    np.testing.assert_allclose(array(head(features).output), np.stack(expected), atol=1e-8)


def outer(vectors: list[Array]) -> Array:
    """The tensor of all products, one index a vector, by loops."""
    product = np.zeros([len(vector) for vector in vectors])
    for place in itertools.product(*(range(len(vector)) for vector in vectors)):
        product[place] = np.prod([vector[index] for vector, index in zip(vectors, place, strict=True)])
    return product


def pooled_or_zero(head: FusionHead, sample: Sample, name: str) -> Array:
    found = sample[name]
    return np.zeros(head.dims[name]) if found is None else norm(head.norm[name], found[1])


@pytest.mark.parametrize("dims", [DIMS, DIMS | {"c": 3}])
def test_tensor_fusion_reads_the_outer_product_with_appended_ones(dims: dict[str, int]) -> None:
    head = ready(TensorFusion(dims, 3, embed=3, dim=7))

    def reference(sample: Sample) -> Array:
        h = []
        for name in dims:
            found = sample[name]
            embed = head.embed[name]
            h.append(np.append(np.zeros(3) if found is None else gelu(linear(embed[1], norm(embed[0], found[1]))), 1))
        return gelu(linear(head.mix[1], outer(h).flatten()))

    agrees(head, reference, dims)


@pytest.mark.parametrize("dims", [DIMS, DIMS | {"c": 3}])
def test_a_low_rank_tensor_is_the_full_one_that_its_factors_make_contracted_with_the_outer_product(dims: dict[str, int]) -> None:
    head = ready(LowRankTensor(dims, 3, rank=2, dim=5))
    # Factor r of modality m for output k: a vector of D_m + 1 entries, the last of which is the bias.
    factors = {name: np.concatenate([array(f.weight), array(f.bias)[:, None]], axis=1).reshape(2, 5, -1) for name, f in head.factor.items()}
    full = np.stack([sum(outer([factors[name][r, k] for name in dims]) for r in range(2)) for k in range(5)])

    def reference(sample: Sample) -> Array:
        z = outer([np.append(pooled_or_zero(head, sample, name), 1) for name in dims])
        return np.array([(tensor * z).sum() for tensor in full])

    agrees(head, reference, dims)


def test_factorized_bilinear_is_the_normalised_full_bilinear_form() -> None:
    head = ready(FactorizedBilinear(DIMS, 3, dim=5, rank=3))
    u, v = (array(head.factor[name].weight).reshape(5, 3, -1) for name in DIMS)
    full = np.stack([sum(np.outer(u[i, k], v[i, k]) for k in range(3)) for i in range(5)])

    def reference(sample: Sample) -> Array:
        x = {name: pooled_or_zero(head, sample, name) for name in DIMS}
        if sample["a"] is None:
            z = np.array([sum(v[i, k] @ x["b"] for k in range(3)) for i in range(5)])  # the factor of a is 1
        elif sample["b"] is None:
            z = np.array([sum(u[i, k] @ x["a"] for k in range(3)) for i in range(5)])
        else:
            z = np.array([x["a"] @ form @ x["b"] for form in full])
        rooted = np.sign(z) * np.sqrt(np.abs(z))
        return rooted / np.linalg.norm(rooted)

    agrees(head, reference)


def test_mutan_is_the_bilinear_form_of_its_core() -> None:
    head = ready(Mutan(DIMS, 3, embed=4, dim=5, rank=2))
    # With a 1 appended for the biases: core[k] = sum_r m_rk n_rk'.
    m, n = (np.concatenate([array(f.weight), array(f.bias)[:, None]], axis=1).reshape(2, 5, -1) for f in head.factor.values())
    core = np.stack([sum(np.outer(m[r, k], n[r, k]) for r in range(2)) for k in range(5)])

    def reference(sample: Sample) -> Array:
        h = {}
        for name in DIMS:
            found = sample[name]
            embed = head.embed[name]
            h[name] = None if found is None else np.append(np.tanh(linear(embed[1], norm(embed[0], found[1]))), 1)
        if h["a"] is None:
            return np.array([sum(n[r, k] for r in range(2)) @ h["b"] for k in range(5)])
        if h["b"] is None:
            return np.array([sum(m[r, k] for r in range(2)) @ h["a"] for k in range(5)])
        return np.array([h["a"] @ core[k] @ h["b"] for k in range(5)])

    agrees(head, reference)


@pytest.mark.parametrize(("interaction", "dims"), [("align", DIMS), ("align", DIMS | {"c": 3}), ("cross", DIMS)])
def test_an_aligned_product_reads_the_feature_interaction_matrix_or_its_diagonal(interaction: str, dims: dict[str, int]) -> None:
    head = ready(AlignedProduct(dims, 3, dim=5, interaction=interaction, depth=2))  # type: ignore[arg-type]

    def reference(sample: Sample) -> Array:
        h = []
        for name in dims:
            found = sample[name]
            u = np.ones(5) if found is None else linear(head.project[name][1], norm(head.project[name][0], found[1]))
            h.append(u if found is None else np.sqrt(5) * u / np.sqrt(u @ u + 5e-5))  # the length is kept from 0
        matrix = outer(h)
        z = matrix.flatten() if interaction == "cross" else np.array([matrix[(i,) * len(h)] for i in range(5)])
        for layer in head.pre_output:
            z = np.maximum(linear(layer[0], z), 0)
        return z

    agrees(head, reference, dims)


@pytest.mark.parametrize("stream", ["a", "b"])
def test_film_scales_and_shifts_block_by_block(stream: str) -> None:
    head = ready(FiLM(DIMS, 3, dim=5, depth=2, stream=stream))
    condition = "b" if stream == "a" else "a"

    def reference(sample: Sample) -> Array:
        given, told = sample[stream], sample[condition]
        x = np.zeros(5) if given is None else linear(head.project, norm(head.norm_stream, given[1]))
        for first, second, modulate in zip(head.first, head.second, head.modulate, strict=True):
            gamma, beta = np.ones(5), np.zeros(5)
            if told is not None:
                both = linear(modulate, norm(head.norm_condition, told[1]))
                gamma, beta = 1 + both[:5], both[5:]
            h = np.maximum(linear(first, x), 0)
            x = h + np.maximum(gamma * normalised(linear(second, h)) + beta, 0)
        return x

    agrees(head, reference)


def test_the_signed_square_root_is_exact_except_next_to_zero_where_its_slope_stays_finite() -> None:
    z = torch.tensor([-4.0, -2e-3, 0.0, 0.3, 9.0], dtype=torch.float64, requires_grad=True)
    np.testing.assert_allclose(array(signed_sqrt(z)), [-2, -np.sqrt(2e-3), 0, np.sqrt(0.3), 3], rtol=1e-12)
    near = torch.tensor([-SMALLEST, -SMALLEST / 3, SMALLEST / 2, SMALLEST], dtype=torch.float64)
    assert torch.equal(signed_sqrt(near).sign(), near.sign())
    signed_sqrt(z).sum().backward()
    np.testing.assert_allclose(array(z.grad), [1 / 4, 1 / (2 * np.sqrt(2e-3)), SMALLEST**-0.5, 1 / (2 * np.sqrt(0.3)), 1 / 6])


def test_custom_arithmetic_has_the_gradients_of_its_values() -> None:
    torch.manual_seed(0)
    z = torch.randn(3, 4, dtype=torch.float64)
    z = torch.where(z.abs() < 0.1, z + 0.3, z).requires_grad_()
    assert torch.autograd.gradcheck(signed_sqrt, z)
    inputs = [torch.randn(2, dim, dtype=torch.float64, requires_grad=True) for dim in DIMS.values()]
    for make in (TensorFusion, LowRankTensor, FactorizedBilinear, Mutan, AlignedProduct, FiLM):
        head = ready(make(DIMS, 3, dim=4))
        assert torch.autograd.gradcheck(lambda a, b, head=head: head({"a": a, "b": b}).output, inputs), make
