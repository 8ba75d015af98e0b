"""Losses that train confidences, QMF's ranking and PDF's predictions: by the papers' formulas, whatever the ranks and interruptions."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_cases import slow_except
from tiny_world import ROUNDING, furthest_weights
from torch.nn.functional import cross_entropy

from fusion.errors import UserError
from fusion.training import PDF, QMF
from fusion.training.balance import Predictions
from fusion.training.confidence_losses import ranking_loss

ENERGY = ["--model.head=ConfidenceWeighted", "--model.head.score=energy", "--model.head.dim=8"]
PREDICTED = ["--model.head=PredictedConfidence", "--model.head.dim=8"]
QMF_RUN, PDF_RUN = [*ENERGY, "--model.balance=QMF"], [*PREDICTED, "--model.balance=PDF"]
HALF = [*PREDICTED, "--model.head.detach=true", "--model.balance=PDF", "--model.balance.weight=0.5"]
methods = pytest.mark.parametrize("method", [QMF_RUN, PDF_RUN, HALF], ids=["QMF", "PDF", "PDF detached"])


class Data:
    def __init__(self, count):
        self.splits = {"train": type("Split", (), {"samples": range(count)})}


class World:
    """What QMF asks of the engine."""

    def __init__(self, count):
        head = type("Head", (), {"score": "energy"})
        self.modalities, self.model = ["a"], type("Model", (), {"head": head})
        self.trainer = type("Trainer", (), {"world_size": 1, "datamodule": Data(count)})


def begun(count=6):
    method = QMF()
    method.begin(World(count))
    return method


def seen(sample, losses, logits=None, present=None):
    losses = torch.tensor(losses)
    logits = torch.zeros(len(losses), 3) if logits is None else logits
    there = torch.ones(len(losses), dtype=torch.bool) if present is None else torch.tensor(present)
    return Predictions(torch.tensor(sample), {"a": logits}, {"a": losses}, {"a": torch.zeros(len(losses))}, {"a": there}, None)


@given(st.lists(st.tuples(st.floats(-2, 2), st.floats(0, 1)), min_size=1, max_size=6))
def test_the_ranking_is_the_papers(pairs):
    k, history = (np.array(x) for x in zip(*pairs, strict=True))
    expected = []
    for i in range(len(k)):
        j = (i + 1) % len(k)
        sign = float(history[i] > history[j]) - float(history[i] < history[j])
        expected.append(max(0.0, sign * (k[i] - k[j]) + abs(history[i] - history[j])))
    found = ranking_loss(torch.tensor(k), torch.tensor(history), torch.ones(len(k), dtype=torch.bool))
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)


def test_a_loss_is_the_mean_over_epochs_scaled_by_all_samples():
    method = begun()
    first, second = [1.0, 2.0, 6.0], [3.0, 2.0, 4.0]
    scaled = method.record("a", torch.arange(3), torch.tensor(first), torch.ones(3, dtype=torch.bool))
    torch.testing.assert_close(scaled, torch.tensor([0, 0.2, 1]))
    method.end_epoch(World(6))
    # Sample 0 has a mean of 2, between 1 (sample 0 so far) and 6 (sample 2 so far).
    found = method.record("a", torch.tensor([0]), torch.tensor([3.0]), torch.tensor([True]))
    torch.testing.assert_close(found, torch.tensor([0.2]))
    method.record("a", torch.tensor([1, 2]), torch.tensor(second[1:]), torch.ones(2, dtype=torch.bool))
    method.end_epoch(World(6))
    assert method.before["a"].tolist() == [[4, 4, 10, 0, 0, 0], [2, 2, 2, 0, 0, 0]]


def test_harder_samples_get_lower_energies():
    method = begun(8)
    logits = torch.zeros(8, 3, requires_grad=True)
    losses = torch.arange(8.0)
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        loss = method.regularisation(seen(list(range(8)), losses.tolist(), logits))
        loss.backward()
        optimizer.step()
    energies = logits.detach().logsumexp(dim=1) / 10
    assert float(loss.detach()) < 0.05
    assert (energies.diff() < 0).all()
    assert float(energies[0] - energies[-1]) > 0.95  # at least by the difference of the scaled losses


@settings(max_examples=40)
@given(st.integers(1, 3), st.data())
def test_losses_and_gradients_are_finite_for_any_batch(size, data):
    """Batches of one and two, constant losses, samples without the modality, losses that overflowed, samples that don't count."""
    losses = data.draw(st.lists(st.sampled_from([0.0, 0.5, 0.5, math.inf, math.nan, 1e30]), min_size=size, max_size=size))
    present = data.draw(st.lists(st.booleans(), min_size=size, max_size=size))
    sample = data.draw(st.lists(st.integers(-1, 5), min_size=size, max_size=size))
    method = begun()
    for _ in range(2):
        logits = torch.randn(size, 3, requires_grad=True)
        loss = method.regularisation(seen(sample, losses, logits, present))
        loss.backward()
        assert loss.isfinite()
        assert logits.grad.isfinite().all()
        method.end_epoch(World(6))
    assert method.before["a"].isfinite().all()
    counted = sum(p and math.isfinite(x) and i >= 0 for p, x, i in zip(present, losses, sample, strict=True))
    assert float(method.before["a"][1].sum()) == 2 * counted


def test_constant_losses_rank_nothing():
    loss = begun().regularisation(seen([0, 1], [0.7, 0.7], torch.randn(2, 3)))
    assert float(loss) == 0


def test_the_history_is_the_same_in_the_middle_of_an_epoch_after_its_state_was_restored():
    whole, other = begun(), begun()
    for method in (whole, other):
        method.regularisation(seen([0, 1, 2], [1.0, 2.0, 3.0]))
        method.end_epoch(World(6))
        method.regularisation(seen([2, 0], [5.0, 1.0]))
    restored = QMF()
    restored.load_state_dict(other.state_dict())
    restored.begin(World(6))
    for method in (whole, restored):
        scaled = method.record("a", torch.tensor([1]), torch.tensor([8.0]), torch.tensor([True]))
        assert float(scaled) == 1
        method.end_epoch(World(6))
    assert torch.equal(whole.before["a"], restored.before["a"])
    assert whole.before["a"].tolist() == [[2, 10, 8, 0, 0, 0], [2, 2, 2, 0, 0, 0]]


# Runs.


@pytest.mark.parametrize("detach", ["false", "true"])
def test_pdf_adds_the_squared_errors_of_the_confidences(parts, write_manifest, detach):
    manifest = write_manifest(lambda i, row: row | ({"image": ""} if i % 3 == 0 else {}))
    plain = ["--model.optimizer.init_args.momentum=0", "--model.schedule=null", "--trainer.max_steps=1"]
    options = [*PREDICTED, f"--model.head.detach={detach}", "--model.balance=PDF", "--model.balance.weight=3"]
    model, data, trainer = parts(*options, *plain, manifest=manifest)
    model.build(data).train()
    batch = next(iter(data.train_dataloader()))
    output = model.model(batch.inputs)
    loss = cross_entropy(output.output, batch.target)
    for name, logits in output.by_modality.items():
        present = batch.inputs[name].present
        loss = loss + torch.where(present, cross_entropy(logits, batch.target, reduction="none"), 0.0).mean()
        true = logits.detach().softmax(dim=1).gather(1, batch.target[:, None])[:, 0]
        loss = loss + 3 * torch.where(present, (output.confidence[name] - true).square(), 0.0).mean()
    head = {name: p for name, p in model.model.named_parameters() if name.startswith("head.")}
    before = {name: p.detach().clone() for name, p in head.items()}
    expected = torch.autograd.grad(loss, head.values())
    trainer.fit(model, datamodule=data)
    for (name, p), gradient in zip(head.items(), expected, strict=True):
        assert torch.allclose((before[name] - p.detach()) / 0.05, gradient, atol=2e-5), name


def test_pdf_brings_confidences_near_the_true_class_s_probability(parts):
    model, data, trainer = parts(*HALF, "--model.balance.weight=5", "--trainer.max_epochs=6")
    errors = []
    for epochs in (0, 6):
        if epochs:
            trainer.fit(model, datamodule=data)
        else:
            model.build(data)
        model.eval()
        found = []
        for batch in data.train_dataloader():
            output = model.model(batch.inputs)
            for name, logits in output.by_modality.items():
                found.append((output.confidence[name] - logits.softmax(1).gather(1, batch.target[:, None])[:, 0]).square())
        errors.append(float(torch.cat(found).mean().detach()))
    assert errors[1] < errors[0]


@pytest.mark.parametrize("method", slow_except([QMF_RUN, PDF_RUN, HALF], QMF_RUN), ids=["QMF", "PDF", "PDF detached"])
def test_a_run_that_was_interrupted_goes_on_to_the_bit(tiny, assert_resumes_to_the_bit, method):
    assert_resumes_to_the_bit("--recipe", tiny(), *method, "--model.modality_dropout=0.2")


@pytest.mark.slow
def test_two_ranks_and_accumulated_batches_train_predictions_as_one_does(tiny, fit_here, fit_on_two):
    one = fit_here("--recipe", tiny(), *PDF_RUN, runs="one")
    parts = fit_here("--recipe", tiny(), *PDF_RUN, "--trainer.accumulate_grad_batches=4", runs="parts")
    two, _ = fit_on_two(tiny(), *PDF_RUN, runs="two")
    assert furthest_weights(one, parts) < ROUNDING
    assert furthest_weights(one, two) < ROUNDING


@pytest.mark.slow
def test_two_ranks_and_accumulated_batches_have_the_history_of_one(tiny, fit_here, fit_on_two):
    """Without the ranking, whose pairs are of one device's batch, so that all train alike."""
    options = [*QMF_RUN, "--model.balance.weight=0"]
    one = fit_here("--recipe", tiny(), *options, runs="one")
    parts = fit_here("--recipe", tiny(), *options, "--trainer.accumulate_grad_batches=4", runs="parts")
    two, _ = fit_on_two(tiny(), *options, runs="two")
    expected = one.checkpoint()["fusion"]["balance"]
    for other in (parts, two):
        found = other.checkpoint()["fusion"]["balance"]
        for name in ("image", "text"):
            torch.testing.assert_close(found["before"][name], expected["before"][name], atol=1e-3, rtol=1e-3)
            assert set(found["before"][name][1].unique().tolist()) <= {0, 1, 2}  # of two epochs
            assert not found["added"][name].any()
    ranked = fit_here("--recipe", tiny(), *QMF_RUN, runs="ranked")
    assert furthest_weights(one, ranked) > 100 * ROUNDING


@methods
def test_fp16_trains_finite_with_batches_of_two(parts, method):
    fp16 = ["--trainer.plugins=fusion.training.Fp16", "--trainer.plugins.init_args.init_scale=1024"]
    model, data, trainer = parts(*method, *fp16, "--trainer.max_steps=4", "--data.batch_size=2")
    trainer.fit(model, datamodule=data)
    assert model.updates == 4
    assert all(p.isfinite().all() for p in model.model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.head=ConfidenceWeighted", "--model.balance=QMF"], "score 'energy'.*the head is ConfidenceWeighted"),
        (["--model.head=LogitMean", "--model.balance=QMF"], "the head is LogitMean; use --model.head=ConfidenceWeighted"),
        (["--model.head=Concat", "--model.balance=PDF"], "which Concat doesn't; use --model.head=PredictedConfidence"),
    ],
)
def test_a_head_without_such_confidences_is_rejected(parts, options, message):
    model, data, trainer = parts(*options)
    with pytest.raises(UserError, match=message):
        trainer.fit(model, datamodule=data)


@pytest.mark.parametrize("method", [QMF, PDF])
@pytest.mark.parametrize("weight", [-1.0, math.inf])
def test_a_weight_out_of_range_is_rejected(method, weight):
    with pytest.raises(UserError, match=f"weight is {weight}; expected a number of at least 0"):
        method(weight)
