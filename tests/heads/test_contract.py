"""The contract that every head keeps, checked on each of them."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fusion.features import Features
from fusion.heads import (
    AdaptiveGraph,
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
    "Stacking": {"hidden": 7},
    "CrossAttention": {"depth": 2, "num_heads": 2},
    "CoAttention": {"depth": 1, "num_heads": 2},
    "GatedCrossAttention": {"depth": 1, "num_heads": 2},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "CrossAttention a_to_b": {"depth": 1, "direction": "a_to_b"},
    "CrossAttention b_to_a": {"depth": 1, "direction": "b_to_a", "self_attention": False},
    "CrossAttention tanh_gate": {"depth": 1, "tanh_gate": True},
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


LATE = {name: small(name) for name in available(family="late")} | {
    "WeightedLogits given": lambda dims, out_dim, **more: WeightedLogits(
        dims, out_dim, dim=8, weights={name: 1.0 + place for place, name in enumerate(dims)}, **more
    ),
}
WITH_UNIMODAL = {name: small(name) for name in [*available(), *VARIANTS] if name not in LATE}
FUSING = WITH_UNIMODAL | LATE
ALL = FUSING | {"Unimodal": partial(Unimodal, dim=8)}
ONLY_TWO = [name for name in FUSING if HEADS[name.split()[0]].most_modalities == 2]

fusing = pytest.mark.parametrize("name", FUSING)
fusing_any_number = pytest.mark.parametrize("name", [name for name in FUSING if name not in ONLY_TWO])
every = pytest.mark.parametrize("name", ALL)
# Seconds each: the further forms of a head are left to the slow tests.
traced = pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name in VARIANTS else name for name in ALL])


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
    output, by_modality = head(leaves)
    loss = output.sin().sum()
    for name, alone in by_modality.items():
        loss = loss + alone[leaves[name].present].cos().sum()
    loss.backward()
    gradients = {f"parameter {name}": p.grad for name, p in head.named_parameters()}
    for name, f in leaves.items():
        gradients |= {f"tokens {name}": f.tokens.grad, f"pooled {name}": f.pooled.grad}
    return output.detach(), {name: g for name, g in gradients.items() if g is not None}


@pytest.mark.parametrize("unimodal", [False, True])
@every
@pytest.mark.parametrize("junk", [None, 1e30, float("inf"), float("-inf"), float("nan")])
def test_what_stands_under_a_false_mask_reaches_no_output_and_no_gradient(name: str, junk: float | None, unimodal: bool) -> None:
    head = make(name, unimodal=True) if unimodal and name in WITH_UNIMODAL else make(name)
    features = batch_of(dims_of(name))
    output, gradients = run(head, features)
    other_output, other_gradients = run(head, smudged(features, junk))

    assert torch.equal(output, other_output)
    assert gradients.keys() == other_gradients.keys()
    for key, gradient in gradients.items():
        assert gradient.isfinite().all(), key
        assert torch.equal(gradient, other_gradients[key]), key
    for modality, f in features.items():
        assert (gradients.get(f"tokens {modality}", torch.zeros(*f.mask.shape, 1))[~f.mask] == 0).all()
        assert (gradients.get(f"pooled {modality}", torch.zeros(len(f.pooled), 1))[~f.present] == 0).all()


@fusing
@settings(max_examples=12)
@given(seed=st.integers(0, 10_000), data=st.data())
def test_any_pattern_of_masks_gives_finite_outputs_and_gradients(name: str, seed: int, data: st.DataObject) -> None:
    torch.manual_seed(seed)
    rows = {m: st.lists(st.booleans(), min_size=COUNTS[m], max_size=COUNTS[m]) for m in DIMS}
    masks = {m: torch.tensor(data.draw(st.lists(rows[m], min_size=2, max_size=2), label=m)) for m in DIMS}
    output, gradients = run(make(name), smudged({m: whole(masks[m], DIMS[m]) for m in DIMS}, float("nan")))
    assert output.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@fusing
@pytest.mark.parametrize("absent", DIMS)
def test_a_batch_in_which_nobody_has_one_modality_is_finite_and_depends_on_the_other(name: str, absent: str) -> None:
    head = make(name)
    torch.manual_seed(2)
    features = {m: whole(torch.full((2, COUNTS[m]), m != absent), dim) for m, dim in DIMS.items()}
    output, gradients = run(head, features)
    assert output.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert not torch.allclose(output[0], output[1])


@every
def test_a_sample_is_answered_the_same_alone_and_in_any_batch(name: str) -> None:
    head = make(name)
    features = batch_of(dims_of(name), size=5)
    together = head(features).output
    for row in range(5):
        alone = head({m: Features(*(x[row : row + 1] for x in f[:3])) for m, f in features.items()}).output
        torch.testing.assert_close(alone[0], together[row], atol=1e-10, rtol=0)


@every
def test_padding_appended_under_a_false_mask_changes_nothing(name: str) -> None:
    head = make(name)
    features = batch_of(dims_of(name))
    padded = {
        m: Features(
            torch.cat([f.tokens, torch.full((4, 2 + place, f.dim), float("nan"), dtype=f.tokens.dtype)], dim=1),
            torch.cat([f.mask, torch.zeros(4, 2 + place, dtype=torch.bool)], dim=1),
            f.pooled,
        )
        for place, (m, f) in enumerate(features.items())
    }
    torch.testing.assert_close(head(padded).output, head(features).output, atol=1e-10, rtol=0)


@fusing_any_number
@settings(max_examples=6)
@given(order=st.permutations(["a", "b", "c"]))
def test_the_order_of_the_modalities_in_the_mapping_does_not_matter(name: str, order: list[str]) -> None:
    dims = DIMS | {"c": 5}
    head = make(name, dims)
    features = batch_of(dims)
    assert torch.equal(head({m: features[m] for m in order}).output, head(features).output)


@every
def test_every_parameter_gets_a_gradient_that_is_not_zero(name: str) -> None:
    torch.manual_seed(0)
    head = make(name, unimodal=True) if name in WITH_UNIMODAL else make(name)
    _, gradients = run(head, batch_of(dims_of(name)))
    for key, _ in head.named_parameters():
        assert gradients[f"parameter {key}"].abs().max() > 0, key


@every
def test_the_state_of_one_head_makes_another_one_answer_the_same(name: str) -> None:
    head, other = make(name), ALL[name](dims_of(name), OUT).double().eval()
    features = batch_of(dims_of(name))
    assert not torch.allclose(head(features).output, other(features).output)
    other.load_state_dict(head.state_dict())
    assert torch.equal(head(features).output, other(features).output)


@every
def test_a_deep_copy_answers_the_same_and_shares_nothing(name: str) -> None:
    head = make(name)
    features = batch_of(dims_of(name))
    before = head(features).output
    twin = copy.deepcopy(head)
    assert torch.equal(twin(features).output, before)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(head(features).output, before)


@every
def test_double_precision_and_single_agree(name: str) -> None:
    head = make(name)
    features = batch_of(dims_of(name))
    single = {m: Features(f.tokens.float(), f.mask, f.pooled.float()) for m, f in features.items()}
    double_output = head(features).output
    assert double_output.dtype == torch.float64
    torch.testing.assert_close(copy.deepcopy(head).float()(single).output, double_output.float(), atol=1e-4, rtol=1e-4)


@every
def test_bfloat16_autocast_is_finite_in_value_and_gradient_on_a_mixed_batch(name: str) -> None:
    head = make(name, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, gradients = run(head, smudged(batch_of(dims_of(name), dtype=torch.float32), float("nan")))
    assert output.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@every
def test_float16_autocast_is_close_to_single_precision_and_finite_in_gradient(name: str) -> None:
    head = make(name, dtype=torch.float32)
    features = smudged(batch_of(dims_of(name), dtype=torch.float32), float("nan"))
    with torch.autocast("cpu", dtype=torch.float16):
        output, gradients = run(head, features)
    torch.testing.assert_close(output.float(), head(features).output, atol=0.02, rtol=0.02)
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@every
def test_a_head_goes_to_the_meta_device_and_tells_its_shapes_there(name: str) -> None:
    dims = dims_of(name)
    head = ALL[name](dims, OUT).to("meta")
    features = {m: Features(*(x.to("meta") for x in f[:3])) for m, f in batch_of(dims, dtype=torch.float32).items()}
    assert head(features).output.shape == (4, OUT)
    assert all(p.is_meta for p in [*head.parameters(), *head.buffers()])


@traced
def test_an_exported_head_answers_as_the_eager_one_for_other_batches_and_lengths(name: str) -> None:
    dims = dims_of(name)
    head = make(name, dtype=torch.float32)
    batch = torch.export.Dim("batch", min=1, max=64)
    lengths = {m: torch.export.Dim(f"{m}_tokens", min=1, max=64) for m in dims}
    shapes = {m: Features({0: batch, 1: lengths[m]}, {0: batch, 1: lengths[m]}, {0: batch}) for m in dims}  # type: ignore[arg-type]
    program = torch.export.export(head, (batch_of(dims, dtype=torch.float32),), dynamic_shapes=(shapes,)).module()

    torch.manual_seed(3)
    for size, more in ((2, 1), (7, 4)):
        masks = {m: torch.rand(size, COUNTS[m] + more) > 0.4 for m in dims}
        features = smudged({m: whole(masks[m], dims[m], torch.float32) for m in dims}, float("nan"))
        torch.testing.assert_close(program(features).output, head(features).output, atol=1e-5, rtol=1e-5)


@traced
def test_a_compiled_head_is_one_graph_and_answers_the_same(name: str) -> None:
    torch.compiler.reset()
    head = make(name)
    features = smudged(batch_of(dims_of(name)), float("nan"))
    compiled = torch.compile(head, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(features).output, head(features).output)


@every
def test_functional_call_with_other_parameters_answers_as_a_head_that_has_them(name: str) -> None:
    head, other = make(name), ALL[name](dims_of(name), OUT).double().eval()
    features = batch_of(dims_of(name))
    called = torch.func.functional_call(head, dict(other.named_parameters()) | dict(other.named_buffers()), (features,))
    assert torch.equal(called.output, other(features).output)


@pytest.mark.parametrize("name", ONLY_TWO)
def test_where_the_formula_is_for_two_modalities_three_are_refused_naming_heads_that_take_more(name: str) -> None:
    with pytest.raises(ValueError, match=r"fuses 2 modalities.*got a, b, c.*CrossAttention or LowRankTensor"):
        FUSING[name](DIMS | {"c": 5}, OUT)


@pytest.mark.parametrize("name", ONLY_TWO)
def test_the_order_of_two_modalities_in_the_mapping_does_not_matter(name: str) -> None:
    head = make(name)
    features = batch_of(DIMS)
    assert torch.equal(head(dict(reversed(features.items()))).output, head(features).output)


@fusing_any_number
def test_three_modalities_are_fused_and_each_has_its_say(name: str) -> None:
    dims = DIMS | {"c": 5}
    head = make(name, dims)
    torch.manual_seed(4)
    features = {m: whole(torch.ones(2, COUNTS[m], dtype=torch.bool), dim) for m, dim in dims.items()}
    output = head(features).output
    assert output.shape == (2, OUT)
    for m, dim in dims.items():
        changed = features | {m: whole(features[m].mask, dim)}
        assert not torch.allclose(head(changed).output, output), m


@every
def test_plain_tensors_are_taken_as_tokens_or_as_pooled_features(name: str) -> None:
    dims = dims_of(name)
    head = make(name)
    tokens = {m: torch.randn(2, COUNTS[m], dim, dtype=torch.float64) for m, dim in dims.items()}
    as_features = {m: Features(x, torch.ones(x.shape[:2], dtype=torch.bool), x.mean(dim=1)) for m, x in tokens.items()}
    assert torch.equal(head(tokens).output, head(as_features).output)

    pooled = {m: x[:, 0] for m, x in tokens.items()}
    as_features = {m: Features(x[:, None], torch.ones(2, 1, dtype=torch.bool), x) for m, x in pooled.items()}
    assert torch.equal(head(pooled).output, head(as_features).output)


@fusing
def test_what_samples_share_is_answered_and_learnt_from_as_if_each_had_its_own(name: str) -> None:
    head = make(name)
    rows = torch.tensor([2, 0, 2, 1, 2, 0])
    present = torch.tensor([True, True, False, True, True, True])
    torch.manual_seed(6)
    features = batch_of(DIMS, size=6)
    tokens, pooled = torch.randn(4, 5, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)  # nobody has the last
    tokens[3], pooled[3] = float("nan"), float("nan")
    real = torch.arange(5)[None] < torch.tensor([5, 2, 3, 4])[:, None]
    mask = real[rows] & present[:, None]
    own, own_gradients = run(head, features | {"b": Features(tokens[rows], mask, pooled[rows])})
    shared, gradients = run(head, features | {"b": Features(tokens, mask, pooled, rows)})

    torch.testing.assert_close(shared, own, atol=1e-12, rtol=0)
    for key, gradient in own_gradients.items():
        if key in ("tokens b", "pooled b"):
            gradient = torch.zeros_like(gradients[key]).index_add(0, rows, gradient)
        torch.testing.assert_close(gradients[key], gradient, atol=1e-12, rtol=0, msg=key)


@every
def test_a_modality_missing_or_unknown_is_refused_naming_those_that_were_expected(name: str) -> None:
    dims = dims_of(name)
    head = make(name)
    complete = {m: torch.randn(2, dim, dtype=torch.float64) for m, dim in dims.items()}
    for wrong in ({}, complete | {"sound": torch.randn(2, 4)}, {"x" + m: x for m, x in complete.items()}):
        with pytest.raises(ValueError, match=f"built for {', '.join(dims)}"):
            head(wrong)


@every
def test_features_of_another_width_are_refused_naming_the_modality_and_both_widths(name: str) -> None:
    head = make(name)
    wrong = {m: torch.randn(2, 9 if m == "a" else dim, dtype=torch.float64) for m, dim in dims_of(name).items()}
    with pytest.raises(ValueError, match="'a' of width 4; got 9"):
        head(wrong)


@fusing
@pytest.mark.parametrize("dims", [{}, {"a": 4}])
def test_a_single_modality_is_refused_pointing_to_unimodal(name: str, dims: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"at least 2 modalities; got (a|none).*Unimodal"):
        FUSING[name](dims, OUT)


def test_unimodal_refuses_more_than_one_modality() -> None:
    with pytest.raises(ValueError, match="exactly one modality; got a, b"):
        Unimodal(DIMS, OUT)


@every
@pytest.mark.parametrize("out_dim", [0, -1])
def test_a_useless_out_dim_is_refused(name: str, out_dim: int) -> None:
    with pytest.raises(ValueError, match=f"out_dim is {out_dim}; expected at least 1"):
        ALL[name](dims_of(name), out_dim)


@every
def test_a_useless_width_or_name_of_a_modality_is_refused_naming_it(name: str) -> None:
    with pytest.raises(ValueError, match="width of 'a' is 0; expected at least 1"):
        ALL[name](dims_of(name) | {"a": 0}, OUT)
    for bad in ("a.b", "keys", ""):
        dims = {bad: 4} if name == "Unimodal" else {bad: 4, "b": 4}
        with pytest.raises(ValueError, match=f"'{bad}' can't name a modality"):
            ALL[name](dims, OUT)


@pytest.mark.parametrize("name", WITH_UNIMODAL)
def test_unimodal_true_gives_each_modality_a_prediction_from_its_own_pooled_features(name: str) -> None:
    assert make(name)(batch_of(DIMS)).by_modality == {}
    head = make(name, unimodal=True)
    features = batch_of(DIMS)
    by_modality = head(features).by_modality
    assert list(by_modality) == list(DIMS)
    assert all(alone.shape == (4, OUT) for alone in by_modality.values())

    changed = head(features | {"b": whole(features["b"].mask, DIMS["b"])}).by_modality
    assert torch.equal(changed["a"], by_modality["a"])
    assert not torch.allclose(changed["b"][-1], by_modality["b"][-1])


@pytest.mark.parametrize("name", [*LATE, "Unimodal"])
def test_late_heads_always_give_the_prediction_of_each_modality(name: str) -> None:
    by_modality = make(name)(batch_of(dims_of(name))).by_modality
    assert list(by_modality) == list(dims_of(name))
    assert all(alone.shape == (4, OUT) for alone in by_modality.values())


@pytest.mark.parametrize("name", [name for name in LATE if name != "Stacking"])
def test_a_late_head_scores_a_sample_with_one_modality_as_that_modality_alone(name: str) -> None:
    features = batch_of(DIMS)  # sample 0 lacks a, sample 1 lacks b
    output, by_modality = make(name)(features)
    torch.testing.assert_close(output[0].softmax(dim=0), by_modality["b"][0].softmax(dim=0))
    torch.testing.assert_close(output[1].softmax(dim=0), by_modality["a"][1].softmax(dim=0))


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


@pytest.mark.parametrize("name", FUSING)
def test_positions_of_the_tokens_matter_only_where_a_head_says_so(name: str) -> None:
    """Shuffling real tokens along with their mask changes a joint transformer (positions) and no other head."""
    torch.manual_seed(5)
    head = make(name)
    features = {m: whole(torch.ones(2, COUNTS[m], dtype=torch.bool), dim) for m, dim in DIMS.items()}
    shuffled = {m: f._replace(tokens=f.tokens.flip(1)) for m, f in features.items()}
    same = torch.allclose(head(shuffled).output, head(features).output, atol=1e-10)
    assert same == (name != "JointTransformer"), "positions"


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
    output, by_modality = head({m: [smudged({m: f}, float("inf"))[m] for f in found] for m, found in levels_of().items()})
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
    with pytest.raises(ValueError, match="no modality 'sound' to be the stream; there are a, b"):
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
    with pytest.raises(ValueError, match="no modality 'c' to attend to; there are a, b"):
        SqueezeExcite(DIMS, OUT, spatial=["c"])


@pytest.mark.parametrize("probabilities", [{"a": 1.0}, {"a": 1.0, "b": 0.0}, {"a": 1.0, "c": 1.0}])
def test_embrace_refuses_probabilities_that_do_not_fit(probabilities: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="positive number for each of a, b"):
        Embrace(DIMS, OUT, probabilities=probabilities)


@every
def test_the_output_layers_are_the_linear_maps_whose_values_leave_the_head(name: str) -> None:
    """Found by their width, which no other layer of these small heads has."""
    more = {"unimodal": True} if name in WITH_UNIMODAL else {}
    head = ALL[name](dims_of(name), 11, **more)
    wide = [part for part in head.modules() if isinstance(part, nn.Linear) and part.out_features == 11]
    assert wide
    assert {*head.output_layers()} == {*wide}
