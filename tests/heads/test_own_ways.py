"""What single heads promise beyond the contract: their options, and what they refuse."""

from typing import Any

import pytest
import torch
from small_heads import COUNTS, DIMS, OUT, batch_of, smudged, whole
from torch import Tensor, nn

from fusion.features import Features
from fusion.heads import (
    AdaptiveGraph,
    AlignedProduct,
    Bottleneck,
    CoAttention,
    CrossAttention,
    Embrace,
    FiLM,
    FusionHead,
    GatedCrossAttention,
    JointTransformer,
    LevelWeighted,
    SqueezeExcite,
    TensorFusion,
    WeightedLogits,
)


def test_cross_attention_in_one_direction_leaves_the_answering_modality_unread_by_itself() -> None:
    """With a_to_b among three, only a reads, and only b: c has no attention layer anywhere."""
    head = CrossAttention(DIMS | {"c": 5}, OUT, dim=8, num_heads=2, direction="a_to_b")
    assert all(list(layer) == ["a"] for layer in head.layers)
    assert head.reads == {"a": ["b"]}


def test_cross_attention_refuses_an_unknown_direction_listing_those_there_are() -> None:
    with pytest.raises(ValueError, match="unknown direction 'a_to_c'; expected both, a_to_b, b_to_a"):
        CrossAttention(DIMS, OUT, direction="a_to_c")


@pytest.mark.parametrize("head", [CoAttention, CrossAttention, GatedCrossAttention, JointTransformer])
def test_a_width_that_the_attention_heads_do_not_divide_is_refused(head: type[FusionHead]) -> None:
    with pytest.raises(ValueError, match="dim 10 is not a multiple of num_heads 4"):
        head(DIMS, OUT, dim=10, num_heads=4)  # type: ignore[call-arg]


def test_a_tanh_gate_starts_with_the_asking_modality_alone() -> None:
    torch.manual_seed(0)
    head = CrossAttention(DIMS, OUT, dim=8, num_heads=2, direction="a_to_b", tanh_gate=True).double().eval()
    features = batch_of(DIMS)
    gates = [p for name, p in head.named_parameters() if "gate" in name]
    assert len(gates) == 4
    assert all(gate == 0 for gate in gates)

    def what_a_became(b: Features) -> Tensor:
        seen: list[Tensor] = []
        with_hook = head.layers[-1]["a"].register_forward_hook(lambda module, inputs, output: seen.append(output))
        head(features | {"b": b})
        with_hook.remove()
        return seen[0]

    other = whole(features["b"].mask, DIMS["b"])
    assert torch.equal(what_a_became(features["b"]), what_a_became(other))
    nn.init.ones_(gates[0])
    assert not torch.allclose(what_a_became(features["b"]), what_a_became(other))


@pytest.mark.parametrize("weights", [{"a": 1.0}, {"a": 1.0, "c": 1.0}, {"a": 1.0, "b": 0.0}, {"a": 1.0, "b": -1.0}, {}])
def test_weights_that_do_not_fit_the_modalities_are_refused_naming_them(weights: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="positive number for each of a, b"):
        WeightedLogits(DIMS, OUT, weights=weights)


def test_a_joint_transformer_without_positions_reads_its_tokens_as_a_set() -> None:
    head = JointTransformer(DIMS, OUT, dim=8, depth=1, num_heads=2, positions=False).double().eval()
    features = {m: whole(torch.ones(2, COUNTS[m], dtype=torch.bool), dim) for m, dim in DIMS.items()}
    shuffled = {m: f._replace(tokens=f.tokens.flip(1)) for m, f in features.items()}
    torch.testing.assert_close(head(shuffled).output, head(features).output, atol=1e-10, rtol=0)


LEVELS = {"a": [4, 5, 4], "b": [6, 3]}


def levels_of(size: int = 4, *, seed: int = 1) -> dict[str, list[Features]]:
    """Several levels of each modality of `batch_of`: one mask, many widths and token counts."""
    torch.manual_seed(seed)
    features = batch_of(DIMS, size)
    return {m: [whole(features[m].mask, width) for width in widths] for m, widths in LEVELS.items()}


def levels_head() -> LevelWeighted:
    torch.manual_seed(0)
    return LevelWeighted(LEVELS, OUT, dim=8, unimodal=True).double().eval()


def test_every_level_has_its_say_and_no_masked_value_of_any_level_is_heard() -> None:
    head, levels = levels_head(), levels_of()
    output = head(levels).output
    for m in LEVELS:
        for place, f in enumerate(levels[m]):
            smeared = smudged({m: f}, float("nan"))[m]
            changed = levels | {m: [*levels[m][:place], smeared, *levels[m][place + 1 :]]}
            assert torch.equal(head(changed).output, output)
            other = whole(f.mask, f.dim)
            changed = levels | {m: [*levels[m][:place], other, *levels[m][place + 1 :]]}
            assert not torch.allclose(head(changed).output[-1], output[-1])


def test_every_parameter_of_a_head_of_levels_gets_a_finite_gradient() -> None:
    head = levels_head()
    output, by_modality, *_ = head({m: [smudged({m: f}, float("inf"))[m] for f in found] for m, found in levels_of().items()})
    (output.sin().sum() + sum(alone.sin().sum() for alone in by_modality.values())).backward()
    for name, p in head.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.abs().max() > 0, name


def test_a_head_of_levels_takes_the_last_of_those_there_are() -> None:
    head = LevelWeighted({"a": [9, 4, 5], "b": 6}, OUT, dim=8, depths=2)
    assert head.level_dims == {"a": [4, 5], "b": [6]}
    assert head.dims == {"a": 5, "b": 6}


def test_a_head_of_levels_refuses_another_number_of_them_and_another_width() -> None:
    levels = levels_of()
    with pytest.raises(ValueError, match="built for 3 levels of 'a'; got 2"):
        levels_head()(levels | {"a": levels["a"][1:]})
    with pytest.raises(ValueError, match="'b' of width 3; got 6"):
        levels_head()(levels | {"b": levels["b"][:1] * 2})
    with pytest.raises(ValueError, match="depths is 0"):
        LevelWeighted(LEVELS, OUT, depths=0)
    with pytest.raises(ValueError, match="no level of 'a'"):
        LevelWeighted({"a": [], "b": 4}, OUT)


def test_an_exported_head_of_levels_answers_as_the_eager_one_for_other_batches() -> None:
    head, levels = levels_head(), levels_of()
    batch = torch.export.Dim("batch", min=1, max=64)
    lengths = {m: torch.export.Dim(f"{m}_tokens", min=1, max=64) for m in LEVELS}
    shape = {m: Features({0: batch, 1: lengths[m]}, {0: batch, 1: lengths[m]}, {0: batch}) for m in LEVELS}  # type: ignore[arg-type]
    shapes = {m: [shape[m]] * len(found) for m, found in LEVELS.items()}
    program = torch.export.export(head, (levels,), dynamic_shapes=(shapes,)).module()
    other = levels_of(7, seed=3)
    torch.testing.assert_close(program(other).output, head(other).output)


def test_embrace_draws_each_feature_from_one_modality_in_the_given_proportion_and_expects_it_in_evaluation() -> None:
    torch.manual_seed(0)
    head = Embrace(DIMS, OUT, dim=64, probabilities={"a": 3.0, "b": 1.0}).double()
    features = batch_of(DIMS, 500)
    docked = {m: head.dock[m](f.pooled) for m, f in features.items()}
    seen: list[Tensor] = []
    head.mix.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    head(features)
    from_a, from_b = (seen[0] == docked[m] for m in DIMS)
    assert (from_a | from_b)[2:].all()
    assert torch.equal(seen[0][0], docked["b"][0])  # sample 0 lacks a, sample 1 lacks b
    assert torch.equal(seen[0][1], docked["a"][1])
    differing = (docked["a"] != docked["b"])[2:]
    assert float(from_a[2:][differing].double().mean()) == pytest.approx(0.75, abs=0.02)
    head.eval()(features)
    torch.testing.assert_close(seen[1][2:], 0.75 * docked["a"][2:] + 0.25 * docked["b"][2:])
    torch.testing.assert_close(seen[1][1], docked["a"][1])


def test_gated_cross_attention_starts_as_its_stream_alone_and_opens_with_its_gates() -> None:
    torch.manual_seed(0)
    head = GatedCrossAttention({"text": 4, "image": 6}, OUT, dim=8, num_heads=2).double().eval()
    features = dict(zip(("text", "image"), batch_of(DIMS).values(), strict=True))
    changed = features | {"image": whole(features["image"].mask, 6)}
    assert head.stream == "text"
    assert torch.equal(head(changed).output, head(features).output)
    with torch.no_grad():
        head.cross_layers[0].gate_attention.fill_(0.5)  # type: ignore[union-attr, operator]
    assert not torch.allclose(head(changed).output, head(features).output)


@pytest.mark.parametrize("head", [FiLM, GatedCrossAttention])
def test_a_stream_that_is_no_modality_is_refused_naming_those_there_are(head: type[FusionHead]) -> None:
    with pytest.raises(ValueError, match="stream is 'sound'; expected one of the modalities a, b"):
        head(DIMS, OUT, stream="sound")  # type: ignore[call-arg]


def test_a_bottleneck_lets_nothing_through_before_its_fusion_layer_and_says_what_it_needs() -> None:
    torch.manual_seed(0)
    head = Bottleneck(DIMS, OUT, dim=8, depth=3, fusion_layer=1, num_heads=2).double().eval()
    features = batch_of(DIMS)
    seen: list[Tensor] = []
    head.layers[0]["a"].register_forward_hook(lambda module, inputs, output: seen.append(output))
    outputs = [head(features | {"b": b}).output for b in (features["b"], whole(features["b"].mask, 6))]
    assert torch.equal(*seen)
    assert not torch.allclose(*outputs)
    for fusion_layer in (-1, 2, 3):
        with pytest.raises(ValueError, match=f"fusion_layer is {fusion_layer} of 3; at least two layers"):
            Bottleneck(DIMS, OUT, dim=8, depth=3, fusion_layer=fusion_layer)


def test_tensor_fusion_refuses_a_product_too_large_saying_what_fits() -> None:
    with pytest.raises(ValueError, match=r"257\^2 products x dim 256 are 16,908,544 weights.*embed <= 255, or LowRankTensor"):
        TensorFusion(DIMS, OUT, embed=256)
    assert TensorFusion(DIMS, OUT, embed=15, dim=4).mix[1].in_features == 256


def test_an_aligned_product_refuses_an_unknown_interaction_and_a_matrix_too_large() -> None:
    with pytest.raises(ValueError, match="interaction is 'outer'; expected align or cross"):
        AlignedProduct(DIMS, OUT, interaction="outer")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"257\^2 products x dim 257 are 16,974,593 weights; use dim <= 256, interaction 'align'"):
        AlignedProduct(DIMS, OUT, dim=257, interaction="cross")
    assert AlignedProduct(DIMS, OUT, dim=257).project["a"][1].out_features == 257


def test_an_aligned_product_multiplies_equal_features_and_a_cross_product_all_pairs() -> None:
    """Rotating the features of one modality changes which are multiplied: the diagonal depends on it, the whole matrix only by order."""
    features = {m: whole(torch.ones(2, COUNTS[m], dtype=torch.bool), dim) for m, dim in DIMS.items()}
    seen: dict[str, list[Tensor]] = {"align": [], "cross": []}
    for interaction, products in seen.items():
        torch.manual_seed(0)
        head = AlignedProduct(DIMS, OUT, dim=8, interaction=interaction).double().eval()  # type: ignore[arg-type]
        head.pre_output.register_forward_hook(lambda module, inputs, output, products=products: products.append(inputs[0]))
        head(features)
        with torch.no_grad():
            for p in head.project["b"][1].parameters():
                p.copy_(p.roll(1, dims=0))
        head(features)
    diagonal, rotated = (x.sort(dim=1).values for x in seen["align"])
    assert not torch.allclose(diagonal, rotated)
    whole_matrix, reordered = (x.sort(dim=1).values for x in seen["cross"])
    torch.testing.assert_close(whole_matrix, reordered)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "top_k is 0; expected at least 1"),
        ({"nodes": "words"}, "nodes is 'words'"),
        ({"adjacency": "random"}, "'random'; expected tokens or pooled, and cosine or mlp"),
    ],
)
def test_a_graph_refuses_what_it_cannot_build(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdaptiveGraph(DIMS, OUT, **options)


def test_squeeze_excite_refuses_to_attend_to_a_modality_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="spatial has the unknown modality 'c'; expected some of a, b"):
        SqueezeExcite(DIMS, OUT, spatial=["c"])


@pytest.mark.parametrize("probabilities", [{"a": 1.0}, {"a": 1.0, "b": 0.0}, {"a": 1.0, "c": 1.0}])
def test_embrace_refuses_probabilities_that_do_not_fit(probabilities: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="positive number for each of a, b"):
        Embrace(DIMS, OUT, probabilities=probabilities)
