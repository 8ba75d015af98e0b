"""Attention maps: on request, beside the usual pass, the weights that it used."""

import copy

import pytest
import torch
from small_heads import DIMS, FUSING, batch_of, make

from fusion.heads import AdaptiveGraph, CrossAttention, attention_maps
from fusion.heads.attention import Attention

ATTENDING = [name for name in FUSING if any(hasattr(part, "attention_weights") for part in make(name).modules())]


def test_every_head_with_attention_in_its_formula_gives_maps() -> None:
    heads = {name.split()[0] for name in ATTENDING}
    attending = "JointTransformer SqueezeExcite Bottleneck Perceiver AdaptiveGraph CrossAttention CoAttention GatedCrossAttention"
    assert heads == {*attending.split(), "InteractionExperts"}  # those of its experts


@pytest.mark.parametrize("name", ATTENDING)
def test_maps_are_named_by_their_module_and_each_row_sums_to_one_or_to_nothing(name: str) -> None:
    head, features = make(name), batch_of(DIMS)
    before = copy.deepcopy(head.state_dict())
    output, maps = attention_maps(head, features)
    assert torch.equal(output.output, head(features).output)
    assert maps.keys() == {key for key, part in head.named_modules() if hasattr(part, "attention_weights")}
    for key, weights in maps.items():
        assert weights.dim() == 4, key
        assert weights.shape[0] == 4, key
        assert not weights.requires_grad
        sums = weights.sum(dim=-1)
        assert torch.allclose(sums, sums.round(), atol=1e-12), key
        assert set(sums.round().unique().tolist()) <= {0.0, 1.0}, key
        assert (weights >= 0).all(), key
    assert all(torch.equal(value, before[key]) for key, value in head.state_dict().items())
    assert not any(part._forward_hooks for part in head.modules())


def test_the_weights_are_those_by_which_the_values_are_summed() -> None:
    torch.manual_seed(0)
    layer = Attention(8, 2).double()
    x, context = torch.randn(3, 4, 8).double(), torch.randn(2, 5, 8).double()
    rows = torch.tensor([1, 0, 1])
    mask = torch.tensor([[True] * 5, [True, False, True, False, False], [False] * 5])
    weights = layer.attention_weights(x, context, mask, rows)
    assert weights.shape == (3, 2, 4, 5)
    values = layer.split(layer.value(context)[rows])
    summed = layer.out((weights @ values).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x, context, mask, rows)[:2], summed[:2])
    assert (weights.transpose(1, 3)[~mask] == 0).all()


def test_columns_follow_the_order_of_the_modalities_that_answer() -> None:
    head = CrossAttention({"a": 4, "b": 6, "c": 5}, 3, dim=8, num_heads=2, depth=1).double().eval()
    dims = {"a": 4, "b": 6, "c": 5}
    features = batch_of(dims)
    _, maps = attention_maps(head, features)
    weights = maps["layers.0.b.cross_attention"]  # reads a, then c
    assert weights.shape == (4, 2, 5, 5)
    read = torch.cat([features["a"].mask, features["c"].mask], dim=1)
    assert torch.equal(weights[:, 0, 0] > 0, read)


def test_the_graph_gives_its_edges() -> None:
    head = AdaptiveGraph(DIMS, 3, dim=8, top_k=2).double().eval()
    features = batch_of(DIMS)
    _, maps = attention_maps(head, features)
    real = torch.cat([f.mask for f in features.values()], dim=1)
    edges = maps["adjacency"]
    assert edges.shape == (4, 1, 8, 8)
    kept = (edges > 0).sum(dim=-1)[:, 0]
    # A real node keeps its own edge and two more, as far as there are so many.
    assert torch.equal(kept, real.sum(dim=1, keepdim=True).minimum(2 + real.int()))


def test_hooks_are_taken_away_even_when_the_pass_fails() -> None:
    head = make("CrossAttention")
    with pytest.raises(ValueError, match="built for a, b"):
        attention_maps(head, {})
    assert not any(part._forward_hooks for part in head.modules())
