"""Balance of modalities: coefficients by the papers' formulas, and the same updates whatever the ranks, accumulation and precision."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback
from slow_cases import slow_except
from tiny_world import ROUNDING, assert_same_end, furthest, furthest_weights
from torch.nn.functional import cross_entropy

from fusion.errors import UserError
from fusion.training.balance import GradientBlending, blending_weights, ogm_coefficients, pareto
from fusion.training.modality_dropout import presence

BALANCES = ["OGMGE", "MMPareto", "GradientBlending", "UnimodalLosses"]
FP16 = ["--trainer.plugins=fusion.training.Fp16", "--trainer.plugins.init_args.init_scale=1024"]
PLAIN_SGD = ["--model.optimizer.init_args.momentum=0", "--model.schedule=null"]


def use(name, **options):
    return [f"--model.balance=fusion.training.{name}", *(f"--model.balance.init_args.{key}={value}" for key, value in options.items())]


class Gradients(Callback):
    """The gradients of each update as the optimiser gets them, and the coefficients that were logged."""

    def __init__(self):
        self.updates, self.coefficients = [], []

    def on_before_zero_grad(self, trainer, module, optimizer):
        found = {name: p.grad.clone() for name, p in module.model.named_parameters() if p.grad is not None}
        if found:
            self.updates.append(found)
            self.coefficients.append({k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("balance/")})


def moves(parts, *options, **more):
    """By name, what one update subtracts from each parameter, over the learning rate: its gradient. And the task."""
    model, data, trainer = parts(*PLAIN_SGD, "--trainer.max_steps=1", *options, **more)
    model.build(data)
    before = {name: p.detach().clone() for name, p in model.model.named_parameters()}
    trainer.fit(model, datamodule=data)
    return {name: (before[name] - p.detach()) / 0.05 for name, p in model.model.named_parameters()}, model, data


def inside(gradients, part):
    return torch.cat([g.flatten() for name, g in gradients.items() if name.startswith(f"encoders.{part}.")])


def separate_gradients(model, data):
    """On the first batch of a model that hasn't learnt: by loss (fused, image, text), the gradients by name."""
    batch = next(iter(data.train_dataloader()))
    output = model.model(batch.inputs)
    losses = {"fused": cross_entropy(output.output, batch.target)}
    losses |= {name: cross_entropy(logits, batch.target) for name, logits in output.by_modality.items()}
    names, parameters = zip(*model.model.named_parameters(), strict=True)
    found = {}
    for key, loss in losses.items():
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        found[key] = {name: torch.zeros_like(p) if g is None else g for name, p, g in zip(names, parameters, gradients, strict=True)}
    scores = {
        name: float(logits.detach().softmax(1).gather(1, batch.target[:, None]).mean()) for name, logits in output.by_modality.items()
    }
    return found, scores, {name: float(loss.detach()) for name, loss in losses.items()}


@pytest.fixture
def fresh(parts):
    """The separate gradients of the model that a run with these options starts from."""

    def make(*options, **more):
        model, data, _ = parts(*options, **more)
        model.build(data).train()
        return separate_gradients(model, data)

    return make


# Unimodal losses.


def test_unimodal_losses_are_added_with_their_weights(parts, fresh):
    options = use("UnimodalLosses", weight='{"image": 0.5, "text": 2.0}')
    separate, _, _ = fresh(*options)
    moved, _, _ = moves(parts, *options)
    for name, gradient in moved.items():
        expected = separate["fused"][name] + 0.5 * separate["image"][name] + 2 * separate["text"][name]
        assert torch.allclose(gradient, expected, atol=2e-5), name


def test_a_sample_that_lacks_a_modality_has_no_part_in_its_own_loss(parts, write_manifest):
    manifest = write_manifest(lambda i, row: row | ({"image": ""} if i % 3 == 0 else {}))
    model, data, _ = parts(*use("UnimodalLosses"), manifest=manifest)
    model.build(data)
    batch = next(iter(data.train_dataloader()))
    output, _ = model.forward_with_dropout(batch.inputs)
    there = presence(batch.inputs)
    alone = model.unimodal_losses(output.by_modality, batch, there)
    each = cross_entropy(output.by_modality["image"], batch.target, reduction="none")
    assert 0 < int(there["image"].sum()) < len(batch.target)
    assert float(alone["image"].mean()) == pytest.approx(float(each[there["image"]].sum()) / len(batch.target), rel=1e-6)


# OGM-GE.


@given(st.lists(st.floats(0.01, 1), min_size=2, max_size=4), st.floats(0, 3))
def test_ogm_coefficients_are_the_papers(scores, alpha):
    found = ogm_coefficients(torch.tensor(scores, dtype=torch.float64), alpha).tolist()
    for place, k in enumerate(found):
        others = np.delete(np.array(scores), place)
        ratio = scores[place] / others.mean()
        assert k == pytest.approx(1 - math.tanh(alpha * ratio) if ratio > 1 + 1e-9 else 1.0, abs=1e-9)
    assert max(found) == 1.0  # the one behind is never slowed


def test_ogm_slows_the_gradients_of_the_modality_that_is_ahead(parts, fresh):
    _, scores, _ = fresh(*use("OGMGE"))
    plain, _, _ = moves(parts, *use("OGMGE", alpha=0.0, noise="false"))
    slowed, _, _ = moves(parts, *use("OGMGE", alpha=0.8, noise="false"))
    ahead, behind = sorted(scores, key=scores.get, reverse=True)
    k = 1 - math.tanh(0.8 * scores[ahead] / scores[behind])
    assert 0 < k < 1
    assert torch.allclose(inside(slowed, ahead), k * inside(plain, ahead), atol=1e-5)
    assert torch.allclose(inside(slowed, behind), inside(plain, behind), atol=1e-6)


def test_ogms_probes_leave_the_encoders_alone(parts, fresh):
    separate, _, _ = fresh(*use("OGMGE"))
    plain, _, _ = moves(parts, *use("OGMGE", alpha=0.0, noise="false"))
    for name, gradient in plain.items():
        expected = sum(separate[loss][name] for loss in separate) if "unimodal" in name else separate["fused"][name]
        assert torch.allclose(gradient, expected, atol=1e-5), name


def test_the_noise_has_the_spread_of_each_gradient(parts):
    quiet, _, _ = moves(parts, *use("OGMGE", alpha=0.0, noise="false"))
    noisy, _, _ = moves(parts, *use("OGMGE", alpha=0.0))
    large = [name for name, g in quiet.items() if name.startswith("encoders") and g.numel() > 2000]
    assert large
    for name in large:
        noise = noisy[name] - quiet[name]
        assert float(noise.std() / quiet[name].std()) == pytest.approx(1, abs=0.1), name
        assert abs(float(noise.mean())) < 0.1 * float(noise.std()), name
    assert all(torch.equal(noisy[name], quiet[name]) for name in quiet if name.startswith("head"))


def test_ogm_stops_when_it_is_told_to(parts):
    watch = Gradients()
    model, data, trainer = parts(*use("OGMGE", until_update=2), "--trainer.max_steps=4", callbacks=[watch])
    seen = []
    modulate = type(model.balance).modulate
    model.balance.modulate = lambda task: seen.append(modulate(model.balance, task)) or seen[-1]
    trainer.fit(model, datamodule=data)
    assert [bool(coefficients) for coefficients in seen] == [True, True, False, False]


def test_a_late_heads_decisions_are_what_ogm_weighs_and_its_loss_stays_its_own(parts, fresh):
    late = ["--model.head=LogitMean"]
    separate, scores, _ = fresh(*late, *use("OGMGE"))
    moved, model, _ = moves(parts, *late, *use("OGMGE", alpha=0.5, noise="false"))
    assert model.model.head.unimodal is None
    ahead = max(scores, key=scores.get)
    k = dict(zip(scores, ogm_coefficients(torch.tensor(list(scores.values())), 0.5).tolist(), strict=True))
    for name, gradient in moved.items():
        factor = k[name.split(".")[1]] if name.startswith("encoders") else 1.0
        assert torch.allclose(gradient, factor * separate["fused"][name], atol=1e-5), name
    assert k[ahead] < 1


# MMPareto.

VECTORS = st.lists(st.integers(-300, 300), min_size=3, max_size=3).map(
    lambda hundredths: torch.tensor(hundredths, dtype=torch.float64) / 100
)


@given(VECTORS, VECTORS)
def test_pareto_is_the_shortest_mixture_where_the_gradients_conflict_and_their_sum_where_not(fused, own):
    share, joined = pareto(fused, own, gamma=1.0)
    if float(fused @ own) >= 0:
        assert share == 0.5
        assert torch.allclose(joined, fused + own, atol=1e-9)
        return
    lengths = [float((a * fused + (1 - a) * own).norm()) for a in np.linspace(0, 1, 1001)]
    assert float((share * fused + (1 - share) * own).norm()) <= min(lengths) + 1e-9
    # It serves both, and is no shorter than the sum; unless they point against each other, and nothing does.
    if float(fused @ own) > -0.999999 * float(fused.norm() * own.norm()):
        assert float(joined @ fused) >= -1e-9
        assert float(joined @ own) >= -1e-9
        assert float(joined.norm()) >= float((fused + own).norm()) - 1e-9
    assert bool(joined.isfinite().all())


def test_mmpareto_joins_each_encoders_two_gradients_and_leaves_the_head_the_sum(parts, fresh):
    separate, _, _ = fresh(*use("MMPareto"))
    moved, _, _ = moves(parts, *use("MMPareto", gamma=1.5))
    for part in ("image", "text"):
        _, expected = pareto(inside(separate["fused"], part), inside(separate[part], part), 1.5)
        assert torch.allclose(inside(moved, part), expected, rtol=1e-3, atol=2e-4), part
    for name in moved:
        if name.startswith("head"):
            assert torch.allclose(moved[name], sum(separate[loss][name] for loss in separate), atol=2e-5), name


# Gradient blending.


@settings(max_examples=50)
@given(st.lists(st.tuples(*[st.floats(0.1, 2)] * 4), min_size=2, max_size=4))
def test_blending_weights_are_the_papers(rows):
    before = {str(i): list(row[:2]) for i, row in enumerate(rows)}
    now = {str(i): list(row[2:]) for i, row in enumerate(rows)}
    weights = blending_weights(before, now)
    assert sum(weights.values()) == pytest.approx(1)
    fall = {k: before[k][1] - now[k][1] for k in before}
    overfit = {k: (now[k][1] - now[k][0]) - (before[k][1] - before[k][0]) for k in before}
    raw = {k: max(fall[k], 0) / max(overfit[k] ** 2, 1e-8) for k in before}
    if sum(raw.values()):
        assert weights == pytest.approx({k: value / sum(raw.values()) for k, value in raw.items()})
    else:
        assert set(weights.values()) == {1 / len(raw)}


def test_blended_losses_are_what_is_minimised(parts, fresh, monkeypatch):
    weights = {"fused": 0.6, "image": 0.1, "text": 0.3}
    separate, _, _ = fresh(*use("GradientBlending"))
    monkeypatch.setattr(GradientBlending, "begin", lambda self, task: self.weights.update(weights))
    moved, _, _ = moves(parts, *use("GradientBlending"))
    for name, gradient in moved.items():
        expected = sum(weights[loss] * separate[loss][name] for loss in weights)
        assert torch.allclose(gradient, expected, atol=2e-5), name


def test_the_weights_come_from_losses_measured_on_train_and_val(parts):
    model, data, trainer = parts(*use("GradientBlending"), "--trainer.max_epochs=3")
    measured = []
    end_epoch = model.balance.end_epoch
    model.balance.end_epoch = lambda task: end_epoch(task) or measured.append(model.balance.before)
    trainer.fit(model, datamodule=data)
    assert len(measured) == 3
    assert model.balance.weights == blending_weights(measured[1], measured[2])
    assert measured[-1]["fused"][1] == pytest.approx(float(trainer.callback_metrics["val/loss"]), abs=1e-5)
    model.eval()
    count = len(data.splits["val"].samples)
    batch = data.splits["train"].samples.__getitems__(type(next(iter(data.train_dataloader().batch_sampler)))(list(range(count)), 0))
    output = model.model(batch.inputs)
    assert measured[-1]["fused"][0] == pytest.approx(float(cross_entropy(output.output, batch.target)), abs=1e-5)
    assert measured[-1]["text"][0] == pytest.approx(float(cross_entropy(output.by_modality["text"], batch.target)), abs=1e-5)


def test_blending_without_a_val_split_is_refused(parts, write_manifest):
    manifest = write_manifest(lambda i, row: row | {"split": "train" if row["split"] == "val" else row["split"]})
    model, data, trainer = parts(*use("GradientBlending"), "--data.val=0", manifest=manifest)
    with pytest.raises(UserError, match="there is none"):
        trainer.fit(model, datamodule=data)


# Every method, whatever the ranks, the accumulation and the precision.


@pytest.mark.parametrize("name", slow_except(BALANCES, "MMPareto"))
def test_accumulated_batches_make_the_update_of_a_whole_batch(tiny, fit_here, name):
    recipe = tiny()
    whole = fit_here("--recipe", recipe, *use(name), "--trainer.max_epochs=1", runs="whole")
    parts = fit_here("--recipe", recipe, *use(name), "--trainer.max_epochs=1", "--trainer.accumulate_grad_batches=2", runs="parts")
    assert furthest_weights(whole, parts) < ROUNDING


@pytest.mark.parametrize("name", slow_except(BALANCES, "MMPareto"))
def test_in_fp16_the_unscaled_gradients_are_changed_and_an_overflow_leaves_nothing_behind(parts, monkeypatch, name):
    from fusion.training import Engine

    steps = "--trainer.max_steps=2"
    plain, watch = Gradients(), Gradients()
    model, data, trainer = parts(*PLAIN_SGD, *use(name), steps, callbacks=[plain])
    trainer.fit(model, datamodule=data)
    calls, sound = [], Engine.loss

    def loss(self, *given):
        calls.append(1)
        return sound(self, *given) * (float("inf") if len(calls) == 1 else 1.0)

    # The first batch overflows; the second update then sees the third batch, as the plain run's third would.
    monkeypatch.setattr(Engine, "loss", loss)
    model, data, trainer = parts(*PLAIN_SGD, *use(name), *FP16, steps, callbacks=[watch])
    trainer.fit(model, datamodule=data)
    assert (model.updates, model.skipped) == (2, 1)
    assert all(torch.isfinite(g).all() for update in watch.updates[1:] for g in update.values())


@pytest.mark.parametrize("name", ["OGMGE", "MMPareto"])
def test_fp16_gives_the_coefficients_of_float32(parts, name):
    found = []
    for precision in ([], FP16):
        watch = Gradients()
        model, data, trainer = parts(*use(name), *precision, "--trainer.max_steps=3", callbacks=[watch])
        trainer.fit(model, datamodule=data)
        found.append(watch.coefficients[-1])
    assert found[0].keys() == found[1].keys() == {"balance/image", "balance/text"}
    assert found[0] == pytest.approx(found[1], abs=0.02)


@pytest.mark.parametrize("name", slow_except(BALANCES, "MMPareto"))
@pytest.mark.parametrize("stop", slow_except([5, 12], 5))
def test_a_resumed_run_is_balanced_as_the_whole_one(interrupted_and_whole, fit_here, name, stop):
    stopped, whole = interrupted_and_whole(stop, *use(name), "--trainer.max_epochs=3")
    assert_same_end(fit_here("--resume", stopped.folder), whole)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["OGMGE", "MMPareto"])  # those that change gradients; the others below
def test_two_ranks_balance_as_one(tiny, fit_here, fit_on_two, name):
    recipe = tiny()
    one = fit_here("--recipe", recipe, *use(name), runs="one")
    two, _ = fit_on_two(recipe, *use(name), runs="two")
    assert furthest_weights(one, two) < ROUNDING


@pytest.mark.slow
@pytest.mark.parametrize("name", BALANCES)
def test_fp16_two_ranks_and_accumulation_together_follow_float32_on_one(tiny, fit_here, fit_on_two, name):
    recipe = tiny()
    options = [*use(name), "--trainer.max_epochs=1"]
    one = fit_here("--recipe", recipe, *options, runs="one")
    all_of_it, _ = fit_on_two(recipe, *options, *FP16, "--trainer.accumulate_grad_batches=2", runs="all")
    assert furthest(one.column("val/loss"), all_of_it.column("val/loss")) < 0.01
    assert furthest_weights(one, all_of_it) < 0.02


# What can't be.


def test_one_modality_has_nothing_to_be_balanced_with(parts):
    with pytest.raises(UserError, match="only one modality"):
        parts('--model.modalities=["text"]', *use("OGMGE"))


@pytest.mark.parametrize(
    ("name", "options"),
    [("OGMGE", {"alpha": -1.0}), ("MMPareto", {"gamma": 0.0}), ("GradientBlending", {"every": 0}), ("UnimodalLosses", {"weight": -0.5})],
)
def test_an_option_out_of_range_is_refused_by_name(parts, name, options):
    with pytest.raises(UserError, match=rf"model\.balance: {next(iter(options))} is"):
        parts(*use(name, **options))
