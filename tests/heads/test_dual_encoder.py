"""The dual encoder embeds its two sides apart, by the formula, with a scale that stays within its limit."""

import numpy as np
import pytest
import torch

from fusion.features import Features
from fusion.heads import DualEncoder, Gated

DIMS = {"image": 6, "text": 5}


def features(*absent, batch=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, width in (DIMS | {"facts": 4}).items():
        mask = torch.ones(batch, 2, dtype=torch.bool)
        if name in absent:
            mask[0] = False
        made[name] = Features(torch.randn(batch, 2, width, generator=generator), mask, torch.randn(batch, width, generator=generator))
    return made


def only(made, *names):
    return {name: made[name] for name in names}


def test_inner_products_are_scaled_cosines_and_the_bias():
    head = DualEncoder(DIMS, 2 * (4 + 1), temperature=0.05, bias=-3.0).double()
    made = {name: f._replace(tokens=f.tokens.double(), pooled=f.pooled.double()) for name, f in only(features(), *DIMS).items()}
    left, right = head(made).output.detach().chunk(2, dim=1)
    embeddings = []
    for side, name in (("left", "image"), ("right", "text")):
        x = made[name].pooled.numpy() @ head.embedders[side].weight.detach().numpy().T
        embeddings.append(x / np.linalg.norm(x, axis=1, keepdims=True))
    np.testing.assert_allclose((left @ right.T).numpy(), embeddings[0] @ embeddings[1].T / 0.05 - 3, rtol=1e-5)


def test_a_side_does_not_see_the_other():
    head = DualEncoder(DIMS, 10)
    one, other = only(features(), *DIMS), only(features(seed=1), *DIMS)
    changed = head(one | {"text": other["text"]}).output
    assert torch.equal(changed[:, :5], head(one).output[:, :5])
    assert not torch.allclose(changed[:, 5:], head(one).output[:, 5:])


@pytest.mark.parametrize("bias", [None, -10.0])
def test_an_absent_side_is_zero_and_its_values_have_no_influence(bias):
    head = DualEncoder(DIMS, 10, bias=bias)
    made = only(features("text"), *DIMS)
    output = head(made).output
    assert (output[0, 5:] == 0).all()
    assert (output[0, :5] != 0).all()
    assert (output[1:] != 0).any(dim=1).all()
    noise = made["text"]._replace(pooled=made["text"].pooled.clone().index_fill(0, torch.tensor([0]), torch.nan))
    assert torch.equal(head(made | {"text": noise}).output, output)
    head.zero_grad()
    head(made | {"text": noise}).output.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in head.parameters())


@pytest.mark.parametrize("fuse", ["Gated", "CrossAttention", "fusion.heads.Gated"])
def test_a_side_of_several_inputs_is_fused_by_any_head(fuse):
    head = DualEncoder(DIMS | {"facts": 4}, 10, right=["text", "facts"], fuse=fuse, fuse_args={"dim": 8}).eval()
    assert head.stage == ("tokens" if fuse == "CrossAttention" else "pooled")
    made = features("text")
    output = head(made).output
    assert (output[0] != 0).any()
    without = features("text", "facts")
    assert (head(without).output[0, 5:] == 0).all()
    rebuilt = type(head)(DIMS | {"facts": 4}, 10, **head.init_args).eval()
    rebuilt.load_state_dict(head.state_dict())
    assert torch.equal(rebuilt(made).output, output)


def test_the_scale_is_learnt_clamped_and_can_return():
    head = DualEncoder(DIMS, 10, temperature=0.011)
    made = only(features(), *DIMS)
    optimizer = torch.optim.SGD([head.log_scale], lr=1.0)
    above = []
    for sign in (-1, -1, 1, 1):
        optimizer.zero_grad()
        left = head(made).output[:, :4]
        (sign * left.square().sum() / 100).backward()  # grows with the scale
        optimizer.step()
        above.append(head.log_scale.item() - np.log(100))
        if sign < 0:
            assert head.temperature == pytest.approx(0.01)
            torch.testing.assert_close(head(made).output[:, :4].square().sum(dim=1), torch.full((3,), 100.0))
    assert above[0] == above[1] > 0  # at the limit there is no gradient away from it
    assert above[3] < 0


def test_without_projection_embeddings_are_the_pooled_features():
    head = DualEncoder({"image": 4, "text": 4}, 10, projection="none")
    made = {name: torch.randn(3, 4) for name in ("image", "text")}
    left = head(made).output[:, :4]
    torch.testing.assert_close(torch.nn.functional.normalize(left), torch.nn.functional.normalize(made["image"]))
    assert {name for name, _ in head.named_parameters()} == {"log_scale"}


@pytest.mark.parametrize(
    ("options", "out_dim", "message"),
    [
        ({"temperature": 0.001}, 10, r"temperature is 0.001; expected at least 0.01, below which it overflows"),
        ({"temperature": float("nan")}, 10, "temperature is nan"),
        ({"bias": float("inf")}, 10, "bias is inf; expected a finite number"),
        ({"left": ["text", "sound"]}, 10, r"each input on one of them: left is \['text', 'sound'\]"),
        ({"left": ["image"], "right": ["image", "text"]}, 10, "each input on one of them"),
        ({"projection": "none"}, 14, r"the width of 'text', 5, but the task asks for 6; set the task's dim to 5"),
        ({"projection": "mlp"}, 10, "projection is 'mlp'; expected linear or none"),
        ({}, 7, r"out_dim is 7; expected 2 \* \(dim \+ 1\)"),
    ],
)
def test_options_that_cannot_be_are_rejected(options, out_dim, message):
    with pytest.raises(ValueError, match=message):
        DualEncoder(DIMS, out_dim, **options)


@pytest.mark.parametrize(
    ("fuse", "message"), [("Conact", "unknown head 'Conact'; nearest: Concat"), ("JointTransformer", "which reads embeddings")]
)
def test_a_head_that_cannot_fuse_a_side_is_rejected(fuse, message):
    with pytest.raises(ValueError, match=message):
        DualEncoder(DIMS | {"facts": 4}, 10, fuse=fuse)


def test_it_is_used_alone_as_any_head():
    head = DualEncoder(DIMS, 10, left=["image"])
    probe = Gated(DIMS, 3)  # which reads the same features
    made = only(features(), *DIMS)
    assert probe(made).output.shape == (3, 3)
    assert head(made).by_modality == {}


def test_the_matching_loss_is_that_of_pairs_and_of_the_hardest_negatives_of_the_batch():
    head = DualEncoder(DIMS, 10, matcher="Concat", matcher_args={"dim": 8}, matching_weight=2.0)
    made = only(features(batch=4), *DIMS)
    output = head(made)
    with torch.no_grad():
        # Logits of which the chance is all at one negative: the next sample.
        left, right = torch.eye(4) * 50, torch.eye(4).roll(1, dims=0) * 50
        auxiliary = head.matching_loss(head.read(made), left, right)
        expected = []
        for i in range(4):
            to_right = next(j for j in range(4) if j != i and (left @ right.T)[i, j] > 0)
            to_left = next(j for j in range(4) if j != i and (left @ right.T)[j, i] > 0)
            pairs = [(i, i, 1.0), (i, to_right, 0.0), (to_left, i, 0.0)]
            image, text = made["image"].pooled, made["text"].pooled
            logits = [head.matcher({"image": image[[a]], "text": text[[b]]}).output.item() for a, b, _ in pairs]
            p = [1 / (1 + np.exp(-x)) for x in logits]
            expected.append(2 * np.mean([-np.log(q if y else 1 - q) for q, (_, _, y) in zip(p, pairs, strict=True)]))
    np.testing.assert_allclose(auxiliary.numpy(), expected, rtol=1e-4)
    output.auxiliary.mean().backward()
    assert all(p.grad is not None for p in head.matcher.parameters())
    assert head.eval()(made).auxiliary is None


def test_pairs_that_lack_a_side_are_neither_matched_nor_negatives():
    head = DualEncoder(DIMS, 10, matcher="Concat", matcher_args={"dim": 8})
    made = only(features("text", batch=2), *DIMS)  # one pair is left, for which there is no negative
    auxiliary = head(made).auxiliary
    assert auxiliary[0] == 0
    assert float(auxiliary[1].detach()) > 0
    assert (head(only(features("text", "image", batch=1), *DIMS)).auxiliary == 0).all()


def test_features_that_are_not_finite_make_the_matching_loss_so_instead_of_ending_the_run():
    head = DualEncoder(DIMS, 10, matcher="Concat", matcher_args={"dim": 8})
    made = only(features(), *DIMS)
    made["image"].pooled[1] = torch.nan
    output = head(made)
    assert not output.auxiliary.isfinite().all()
    assert not output.output.isfinite().all()


def test_its_output_layers_are_those_of_its_sides_and_of_the_matcher():
    head = DualEncoder(DIMS | {"facts": 4}, 10, right=["text", "facts"], fuse="Gated", matcher="Concat", matcher_args={"dim": 8})
    expected = [head.embedders["left"], *head.embedders["right"].output_layers(), *head.matcher.output_layers()]
    assert head.output_layers() == expected
    assert DualEncoder({"image": 4, "text": 4}, 10, projection="none").output_layers() == []
