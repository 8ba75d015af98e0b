"""The limits of the heads: what would be wrong in silence is refused, and what is extreme but right works."""

import inspect

import pytest
import torch
from small_heads import COUNTS, DIMS, FUSING, OUT, batch_of, fusing, make, whole

from fusion.benchmarks.heads import peak_bytes
from fusion.features import Features, masked_mean
from fusion.heads import Unimodal
from fusion.heads.registry import HEADS


@fusing
def test_a_modality_too_narrow_to_be_normalised_is_refused_or_heard(name: str) -> None:
    dims = {"a": 1, "b": 6}
    if HEADS[name.split()[0]].narrowest > 1:
        with pytest.raises(ValueError, match="width of 'a' is 1; expected at least 2; layer normalisation maps a single number to 0"):
            FUSING[name](dims, OUT)
        return
    head = make(name, dims)
    features = {m: whole(torch.ones(4, COUNTS[m], dtype=torch.bool), dim) for m, dim in dims.items()}
    louder = features["a"]._replace(tokens=3 * features["a"].tokens, pooled=3 * features["a"].pooled)
    assert not torch.allclose(head(features).output, head(features | {"a": louder}).output)


@pytest.mark.parametrize("name", ["ProductOfExperts", "PredictedConfidence", "Stacking"])
def test_a_probability_over_one_class_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: out_dim is 1; expected at least 2"):
        HEADS[name](DIMS, 1)


@fusing
def test_modalities_of_different_numbers_of_samples_are_refused_and_never_broadcast(name: str) -> None:
    features = batch_of(DIMS)
    one = features["b"]
    short = Features(one.tokens[:1], one.mask[:1], one.pooled[:1])
    with pytest.raises(ValueError, match="the same number of samples; got 4 of 'a', 1 of 'b'"):
        make(name)(features | {"b": short})


@fusing
def test_pooled_features_of_another_width_are_refused(name: str) -> None:
    features = batch_of(DIMS)
    with pytest.raises(ValueError, match="built for 'b' of width"):
        make(name)(features | {"b": features["b"]._replace(pooled=torch.randn(4, 3, dtype=torch.float64))})


SIZES = ("dim", "depth", "num_heads", "rank", "embed", "hidden", "latents", "bottlenecks", "squeeze", "attend", "edge_dim", "depths")


@pytest.mark.parametrize("name", HEADS)
def test_options_out_of_range_are_refused_by_name(name: str) -> None:
    options = inspect.signature(HEADS[name]).parameters
    late = HEADS[name].family == "late"  # whose width may be 0: no hidden layer
    wrong = {size: 0 for size in SIZES if size in options and not (late and size == "dim")} | {"dropout": 1.0}
    if "mlp_ratio" in options:
        wrong["mlp_ratio"] = float("inf")
    for option, value in wrong.items():
        with pytest.raises(ValueError, match=f"{option} is {value}|num_heads {value}|at least two layers"):
            HEADS[name](DIMS, OUT, **{option: value})


@pytest.mark.parametrize("name", HEADS)
def test_no_gradient_of_constant_features_is_beyond_fp16(name: str) -> None:
    """A picture that is one colour all over, at the head's own start."""
    torch.manual_seed(0)
    dims = {"a": 32, "b": 32}
    head = HEADS[name](dims, 5)
    features = {m: Features(torch.zeros(3, 4, 32), torch.ones(3, 4, dtype=torch.bool), torch.zeros(3, 32)) for m in dims}
    features["b"] = whole(features["b"].mask, 32, torch.float32)
    leaves = {m: f._replace(pooled=f.pooled.requires_grad_(), tokens=f.tokens.requires_grad_()) for m, f in features.items()}
    head(leaves).output.sum().backward()
    for key, p in head.named_parameters():
        assert p.grad is None or p.grad.abs().max() < 65504 / 64, key


@pytest.mark.parametrize("name", [name for name in HEADS if HEADS[name].stage == "tokens" and name != "AdaptiveGraph"])
def test_training_memory_is_linear_in_the_tokens_of_either_modality_with_dropout(name: str) -> None:
    kept = []
    for count in (256, 1024):
        torch.manual_seed(0)
        head = HEADS[name](DIMS, 5, dim=16, dropout=0.2)
        features = {m: whole(torch.ones(1, count, dtype=torch.bool), dim, torch.float32) for m, dim in DIMS.items()}
        kept.append(peak_bytes(lambda head=head, features=features: head(features).output.sum().backward()))
    assert kept[1] < 5 * kept[0]


def test_a_mean_over_thousands_of_tokens_does_not_overflow_fp16() -> None:
    tokens = torch.full((1, 8192, 4), 9.0, dtype=torch.float16)
    assert masked_mean(tokens, torch.ones(1, 8192, dtype=torch.bool)).tolist() == [[9.0] * 4]


@pytest.mark.parametrize(
    "name", ["LogitMean", "WeightedLogits", "ProductOfExperts", "ConfidenceWeighted", "PredictedConfidence", "Stacking", "Unimodal"]
)
@pytest.mark.parametrize(("options", "words"), [({"dim": -1}, "dim is -1"), ({"dropout": 1.0}, "dropout is 1.0")])
def test_classifiers_of_single_modalities_reject_what_can_t_be(name: str, options: dict, words: str) -> None:
    dims = {"text": 8} if name == "Unimodal" else {"text": 8, "image": 8}
    with pytest.raises(ValueError, match=words):
        (HEADS | {"Unimodal": Unimodal})[name](dims, 3, **options)


def test_a_tiny_feed_forward_layer_keeps_one_unit() -> None:
    head = HEADS["CrossAttention"]({"text": 8, "image": 8}, 3, dim=8, mlp_ratio=0.01)
    assert all(p.numel() for p in head.parameters())
