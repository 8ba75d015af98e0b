"""Interaction experts: the papers' losses in NumPy, around any head, and their effect."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy_layers import Array, array, batch, gelu, linear, norm, ready, samples, softmax
from small_heads import COUNTS, DIMS, OUT, SMALL, batch_of, smudged, whole
from torch import Tensor, nn

from fusion.benchmarks.plain_heads import clean, interaction_losses
from fusion.features import Features
from fusion.heads import FusionHead, FusionOutput, InteractionExperts
from fusion.heads.registry import HEADS

THREE = DIMS | {"c": 3}
WRAPPED = [name for name in HEADS if name != "InteractionExperts"]


def training(dims: dict[str, int] = DIMS, **more: Any) -> InteractionExperts:
    torch.manual_seed(0)
    return InteractionExperts(dims, OUT, dim=8, **more).double().train()


def auxiliary(head: FusionHead, features: Any) -> Tensor:
    found = head(features).auxiliary
    assert found is not None
    return found


@pytest.mark.parametrize("dims", [DIMS, THREE])
def test_predictions_and_losses_are_those_of_the_paper(dims: dict[str, int]) -> None:
    """With Concat for the experts, sample by sample; a sample that lacks a modality has losses over the others."""
    head = ready(InteractionExperts(dims, 3, dim=5, weight=0.7))
    assert isinstance(head, InteractionExperts)
    features = batch(dims, COUNTS)
    names = list(dims)

    def expert(name: str, x: dict[str, Array | None]) -> Array:
        one = head.experts[name]
        parts = [np.zeros(dims[m]) if (found := x[m]) is None else norm(one.norm[m], found) for m in names]
        return linear(one.classifier, gelu(linear(one.mix[0], np.concatenate(parts))))

    def cosine(a: Array, b: Array) -> float:
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    outputs, losses = [], []
    for sample in samples(features):
        x = {m: None if (found := sample[m]) is None else found[1] for m in names}
        joint = np.concatenate([np.zeros(dims[m]) if (one := x[m]) is None else norm(head.norm[m], one) for m in names])
        weights = softmax(linear(head.reweight[3], gelu(linear(head.reweight[0], joint))))
        kinds = [*(f"unique_{m}" for m in names), "synergy", "redundancy"]
        outputs.append(sum(w * expert(kind, x) for w, kind in zip(weights, kinds, strict=True)))
        there = [m for m in names if x[m] is not None]
        found = []
        for kind in kinds:
            anchor = expert(kind, x)
            lacking = {m: expert(kind, x | {m: None}) for m in there}
            if kind.startswith("unique"):
                own = kind.removeprefix("unique_")
                others = [m for m in there if m != own]
                distance = {m: np.linalg.norm(anchor - y + 1e-6) for m, y in lacking.items()}  # torch's epsilon
                hinges = [max(0.0, distance[m] - distance[own] + 1) for m in others] if own in there else []
                found.append(np.mean(hinges) if hinges else 0.0)
            else:
                mean = np.mean([cosine(anchor, y) for y in lacking.values()])
                found.append(mean if kind == "synergy" else 1 - mean)
        losses.append(0.7 * np.mean(found) if len(there) > 1 else 0.0)

    assert head(features).auxiliary is None
    np.testing.assert_allclose(array(head(features).output), np.stack(outputs), atol=1e-10)
    output, _, found_losses, *_ = head.train()(features)
    np.testing.assert_allclose(array(output), np.stack(outputs), atol=1e-10)
    np.testing.assert_allclose(array(found_losses), losses, atol=1e-10)
    assert len(dims) == 2 or min(losses) > 0


@pytest.mark.parametrize("name", WRAPPED)
def test_any_head_can_be_the_expert_and_is_built_again_from_plain_data(name: str) -> None:
    levels = {m: [dim, dim] for m, dim in DIMS.items()} if HEADS[name].stage == "levels" else DIMS
    torch.manual_seed(0)
    head = InteractionExperts(levels, OUT, expert=name, expert_args=SMALL.get(name), dim=8).double()
    assert (head.stage, head.one_of_classes) == (HEADS[name].stage, HEADS[name].one_of_classes)
    assert {type(expert).__name__ for expert in head.experts.values()} == {name}
    features: Any = smudged(batch_of(DIMS), float("nan"))
    given = {m: [f, f] for m, f in features.items()} if levels is not DIMS else features
    output, _, losses, *_ = head.train()(given)
    assert losses.shape == (4,)
    assert losses[:2].tolist() == [0, 0]  # which have one modality
    assert (losses[2:] != 0).all()
    (output.sin().sum() + losses.sum()).backward()
    for key, p in head.named_parameters():
        assert p.grad is not None, key
        assert p.grad.isfinite().all(), key
    again = InteractionExperts(levels, OUT, **head.init_args).double()
    again.load_state_dict(head.state_dict())
    if name != "Embrace":  # which draws its features in training
        assert torch.equal(auxiliary(again, given), losses)
    assert torch.equal(again.eval()(given).output, head.eval()(given).output)


@pytest.mark.parametrize("expert", ["Concat", "CrossAttention"])
def test_the_losses_reach_the_experts_and_no_values_under_a_false_mask_reach_them(expert: str) -> None:
    head = training(THREE, expert=expert, expert_args={"num_heads": 2} if expert == "CrossAttention" else {})
    features = batch_of(THREE)
    losses, gradients = [], []
    for junk in (0.0, float("nan"), float("inf")):
        head.zero_grad()
        found = auxiliary(head, smudged(features, junk))
        found.sum().backward()
        losses.append(found.detach())
        gradients.append({key: p.grad for key, p in head.named_parameters() if p.grad is not None})
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(losses[0], losses[2])
    assert {key.split(".")[1] for key in gradients[0]} == set(head.experts)  # but not to the weights of the experts
    for key, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][key]), key
    assert all(any(bool((g != 0).any()) for key, g in gradients[0].items() if key.startswith(f"experts.{e}.")) for e in head.experts)


def test_the_losses_of_a_sample_depend_on_no_other_and_are_as_those_without_a_modality_that_it_lacks() -> None:
    head = training(THREE)
    features = batch_of(THREE, 5)
    together = auxiliary(head, features)
    for row in range(5):
        alone = auxiliary(head, {m: Features(*(x[row : row + 1] for x in f[:3])) for m, f in features.items()})
        torch.testing.assert_close(alone[0], together[row], atol=1e-12, rtol=0)


def test_the_losses_make_each_expert_that_of_its_interaction() -> None:
    """Trained on them alone: without its own modality the unique expert moves more than without the other, and so on."""
    head = InteractionExperts(DIMS, OUT, dim=16, weight=1.0)
    torch.manual_seed(1)
    features = {m: whole(torch.ones(64, COUNTS[m], dtype=torch.bool), dim, torch.float32) for m, dim in DIMS.items()}

    def moved(name: str) -> tuple[dict[str, float], dict[str, float]]:
        """Distances and cosines of the expert's predictions with all modalities to those without each."""
        with torch.no_grad():
            expert = head.experts[name]
            anchor = expert(features).output
            other = {m: expert(features | {m: features[m]._replace(mask=torch.zeros_like(features[m].mask))}).output for m in DIMS}
            cosines = {m: float(nn.functional.cosine_similarity(anchor, y).mean()) for m, y in other.items()}
            return {m: float((anchor - y).norm(dim=1).mean()) for m, y in other.items()}, cosines

    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)
    first = float(auxiliary(head, features).mean().detach())
    for _ in range(150):
        optimizer.zero_grad()
        loss = auxiliary(head, features).mean()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < first - 0.4
    for own, other in (("a", "b"), ("b", "a")):
        distances, _ = moved(f"unique_{own}")
        assert distances[own] > distances[other] + 0.5
    assert max(moved("synergy")[1].values()) < 0 < 0.9 < min(moved("redundancy")[1].values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_losses_are_finite_under_autocast_also_where_predictions_are_equal_or_zero(dtype: torch.dtype) -> None:
    head = training().float()
    features = smudged(batch_of(DIMS, dtype=torch.float32), float("nan"))
    for zeroed in (False, True):
        head.zero_grad()
        with torch.no_grad():
            for layer in head.output_layers() if zeroed else []:
                for p in layer.parameters():
                    p.zero_()
        with torch.autocast("cpu", dtype=dtype):
            losses = auxiliary(head, features)
        assert losses.dtype == torch.float32
        assert losses.isfinite().all()
        (1024 * losses).sum().backward()
        assert all(p.grad.isfinite().all() for p in head.parameters() if p.grad is not None)


def test_evaluation_runs_each_expert_once_and_training_once_more_for_each_modality() -> None:
    head = training()
    calls: list[str] = []
    for name, expert in head.experts.items():
        expert.register_forward_hook(lambda module, inputs, output, name=name: calls.append(name))
    head(batch_of(DIMS))
    assert [calls.count(name) for name in head.experts] == [3] * 4
    calls.clear()
    head.eval()(batch_of(DIMS))
    assert [calls.count(name) for name in head.experts] == [1] * 4


def test_a_loss_of_the_experts_themselves_is_added() -> None:
    inner = training(expert="InteractionExperts", expert_args={"weight": 1.0}, weight=0.0)
    features = batch_of(DIMS)
    each = torch.stack([auxiliary(expert, features) for expert in inner.experts.values() if isinstance(expert, FusionHead)])
    torch.testing.assert_close(auxiliary(inner, features), each.mean(dim=0))


def test_a_class_path_names_a_head_of_ones_own_and_weights_sum_to_one() -> None:
    head = training(expert="fusion.heads.gated.Gated", expert_args={"dim": 4})
    assert {expert.candidate["a"].out_features for expert in head.experts.values()} == {4}
    assert head.reweight[0].out_features == 8
    pooled = {m: Features(f.pooled[:, None], f.present[:, None], f.pooled) for m, f in batch_of(DIMS).items()}
    torch.testing.assert_close(head.weights(pooled).sum(dim=1), torch.ones(4, dtype=torch.float64))


def test_other_heads_have_no_loss_of_their_own() -> None:
    assert FusionOutput(torch.zeros(1, 1), {}).auxiliary is None
    for name in WRAPPED:
        head = HEADS[name](DIMS, OUT, **{"dim": 8} | SMALL.get(name, {})).double().train()
        assert head(batch_of(DIMS)).auxiliary is None, name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expert": "Concatt"}, "unknown expert 'Concatt'; nearest: Concat"),
        ({"expert": "torch.nn.Linear"}, "unknown expert 'torch.nn.Linear'"),
        ({"expert": "nowhere.Head"}, "unknown expert 'nowhere.Head'.*or the class path of a fusion head"),
        (
            {"expert": "Gated", "expert_args": {"xyz": 3}},
            "'xyz', which Gated doesn't take; expected one of dim, dropout, unimodal",
        ),
        ({"expert": "Perceiver", "expert_args": {"latent": 3}}, "'latent', which Perceiver doesn't take; nearest: latents"),
        ({"weight": -1.0}, "weight is -1.0; expected a number of at least 0"),
    ],
)
def test_experts_that_can_not_be_are_rejected_with_the_nearest_that_can(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InteractionExperts(DIMS, OUT, **options)


def test_the_plain_formulation_has_the_same_losses() -> None:
    head = training(THREE, expert="Gated")
    features = batch_of(THREE)
    given = {m: clean(f, head.stage) for m, f in features.items()}
    logits = torch.stack([expert(features).output for expert in head.experts.values()], dim=1)
    torch.testing.assert_close(interaction_losses(head, given, logits), auxiliary(head, features), atol=1e-6, rtol=1e-6)
