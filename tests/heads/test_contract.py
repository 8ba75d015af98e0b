"""The contract that every head keeps, checked on each of them."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_heads import (
    ALL,
    COUNTS,
    DIMS,
    FUSING,
    LATE,
    ONLY_TWO,
    OUT,
    WITH_UNIMODAL,
    batch_of,
    dims_of,
    every,
    fusing,
    fusing_any_number,
    make,
    run,
    smudged,
    traced,
    whole,
)
from torch import nn

from fusion.features import Features
from fusion.heads import (
    Unimodal,
)


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


@pytest.mark.parametrize("before", [False, True], ids=["after", "before"])
@every
def test_padding_under_a_false_mask_before_or_after_the_tokens_changes_nothing(name: str, before: bool) -> None:
    head = make(name)
    features = batch_of(dims_of(name))
    way = -1 if before else 1
    padded = {
        m: Features(
            torch.cat([f.tokens, torch.full((4, 2 + place, f.dim), float("nan"), dtype=f.tokens.dtype)][::way], dim=1),
            torch.cat([f.mask, torch.zeros(4, 2 + place, dtype=torch.bool)][::way], dim=1),
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
    with pytest.raises(ValueError, match=f"out_dim is {out_dim}; expected at least [12]"):
        ALL[name](dims_of(name), out_dim)


@every
def test_a_useless_width_or_name_of_a_modality_is_refused_naming_it(name: str) -> None:
    with pytest.raises(ValueError, match=r"width of 'a' is 0; expected at least [12]"):
        ALL[name](dims_of(name) | {"a": 0}, OUT)
    for bad in ("a.b", "keys", ""):
        dims = {bad: 4} if name == "Unimodal" else {bad: 4, "b": 4}
        with pytest.raises(ValueError, match=f"'{bad}' is not a valid name of a modality"):
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
    output, by_modality, *_ = make(name)(features)
    torch.testing.assert_close(output[0].softmax(dim=0), by_modality["b"][0].softmax(dim=0))
    torch.testing.assert_close(output[1].softmax(dim=0), by_modality["a"][1].softmax(dim=0))


@pytest.mark.parametrize("name", FUSING)
def test_positions_of_the_tokens_matter_only_where_a_head_says_so(name: str) -> None:
    """Shuffling real tokens along with their mask changes a joint transformer (positions) and no other head."""
    torch.manual_seed(5)
    head = make(name)
    features = {m: whole(torch.ones(2, COUNTS[m], dtype=torch.bool), dim) for m, dim in DIMS.items()}
    shuffled = {m: f._replace(tokens=f.tokens.flip(1)) for m, f in features.items()}
    same = torch.allclose(head(shuffled).output, head(features).output, atol=1e-10)
    assert same == (name != "JointTransformer"), "positions"


@every
def test_the_output_layers_are_the_linear_maps_whose_values_leave_the_head(name: str) -> None:
    """Found by their width, which no other layer of these small heads has."""
    more = {"unimodal": True} if name in WITH_UNIMODAL else {}
    head = ALL[name](dims_of(name), 11, **more)
    wide = [part for part in head.modules() if isinstance(part, nn.Linear) and part.out_features == 11]
    assert wide
    assert {*head.output_layers()} == {*wide}


@every
def test_a_head_records_the_arguments_that_build_it_again_through_copies_and_pickles(name: str) -> None:
    head = ALL[name](dims_of(name), OUT)
    for copied in (head, copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        again = type(copied)(dims_of(name), OUT, **copied.init_args)
        again.load_state_dict(head.state_dict())
        features = batch_of(dims_of(name), dtype=torch.float32)
        assert torch.equal(again.eval()(features).output, head.eval()(features).output)


def test_recording_arguments_leaves_meta_tensors_functional_calls_and_compilation_alone() -> None:
    head = ALL["Gated"](DIMS, OUT).eval()
    features = batch_of(DIMS, dtype=torch.float32)
    expected = head(features).output
    with torch.device("meta"):
        shell = type(head)(dims=DIMS, out_dim=OUT, **head.init_args)
    assert shell.init_args == head.init_args
    assert all(parameter.is_meta for parameter in shell.parameters())
    assert torch.equal(torch.func.functional_call(shell, head.state_dict(), (features,)).output, expected)
    compiled = torch.compile(head, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(features).output, expected)
