"""Averages of the weights: over real updates, evaluated, saved, and resumed."""

import pytest
import torch
from lightning.pytorch import Callback
from slow_cases import slow_except
from tiny_world import assert_same_end

EMA = ["--trainer.callbacks+=fusion.training.EMA", "--trainer.callbacks.decay=0.9"]


class Keep(Callback):
    """The weights after each batch."""

    def __init__(self):
        self.weights = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.weights.append({name: p.detach().clone() for name, p in module.model.named_parameters()})


def test_the_average_is_the_papers_recursion_over_real_updates_and_is_what_is_evaluated(parts, monkeypatch):
    from fusion.training import Engine

    calls, sound = [], Engine.loss

    def loss(self, *given):
        calls.append(1)
        return sound(self, *given) * (float("inf") if len(calls) in (3, 6) else 1.0)

    keep = Keep()
    fp16 = ["--trainer.plugins=fusion.training.Fp16", "--trainer.plugins.init_args.init_scale=1024"]
    model, data, trainer = parts(*fp16, *EMA, "--trainer.max_epochs=1", "--trainer.limit_train_batches=7", callbacks=[keep])
    monkeypatch.setattr(Engine, "loss", loss)
    model.build(data)
    started = {name: p.detach().clone() for name, p in model.model.named_parameters()}
    trainer.fit(model, datamodule=data)
    assert model.updates == 5
    moved = [
        w for w, before in zip(keep.weights, [started, *keep.weights], strict=False) if any(not torch.equal(w[n], before[n]) for n in w)
    ]
    assert len(moved) == 5
    average = moved[0]
    for weights in moved[1:]:
        average = {name: 0.9 * average[name] + 0.1 * weights[name] for name in average}
    for name, p in model.model.named_parameters():  # after training the model holds the average
        assert torch.allclose(p, average[name], atol=1e-6), name
    loss_on_average = float(trainer.callback_metrics["val/loss"])
    (again,) = trainer.validate(model, datamodule=data, verbose=False)
    assert again["val/loss"] == pytest.approx(loss_on_average, abs=1e-6)


@pytest.mark.parametrize("stop", slow_except([4, 8, 11], 4))
def test_a_resumed_average_is_that_of_the_whole_run(interrupted_and_whole, fit_here, stop):
    stopped, whole = interrupted_and_whole(stop, *EMA)
    resumed = fit_here("--resume", stopped.folder)
    assert_same_end(resumed, whole)
    a, b = resumed.checkpoint(), whole.checkpoint()
    for name, value in b["current_model_state"].items():
        assert torch.equal(a["current_model_state"][name], value), name
    assert any(not torch.equal(b["state_dict"][name], b["current_model_state"][name]) for name in b["state_dict"])


SWA = ["--trainer.callbacks+=fusion.training.SWA", "--trainer.callbacks.start=0.5"]


def test_stochastic_weight_averaging_is_the_mean_of_the_last_epochs_ends(parts):
    keep = Keep()
    model, data, trainer = parts(*SWA, "--trainer.max_epochs=5", callbacks=[keep])
    model.build(data)
    trainer.fit(model, datamodule=data)
    ends = [keep.weights[8 * epoch - 1] for epoch in (3, 4, 5)]
    for name, p in model.model.named_parameters():
        assert torch.allclose(p, sum(end[name] for end in ends) / 3, atol=1e-6), name


def test_before_it_begins_the_weights_themselves_are_validated(parts):
    losses = []
    for options in ([], [*SWA, "--trainer.callbacks.start=0.9"]):
        model, data, trainer = parts(*options, "--trainer.max_epochs=3")
        model.build(data)
        trainer.fit(model, datamodule=data)
        losses.append(float(trainer.callback_metrics["val/loss"]))
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [4, 12, 24])
def test_a_resumed_stochastic_average_is_that_of_the_whole_run(interrupted_and_whole, fit_here, stop):
    stopped, whole = interrupted_and_whole(stop, *SWA, "--trainer.max_epochs=4")
    assert_same_end(fit_here("--resume", stopped.folder), whole)
