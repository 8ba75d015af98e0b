"""How often the host waits for the device: once an update at most, beside what is logged.

Counted on a CPU: whatever reads a value there would wait on a GPU. The one is whether the gradients are finite, of which the optimiser's
step depends: the guard asks, or in mixed precision the scaler.
"""

import pytest
import torch
from host_waits import CountReads
from lightning.pytorch import LightningModule
from torch.optim.swa_utils import AveragedModel

import fusion.session as command
from fusion.training import EMA

FP16 = ["--trainer.plugins=fusion.training.Fp16", "--trainer.plugins.init_args.init_scale=1024"]
ASKS = {"guards.py:is_finite", "amp.py:optimizer_step"}
# How many updates were averaged, which is counted there; and how a batch is mixed, which is drawn there.
ON_THE_HOST = {"averages.py:average", "mixing.py:draw"}
COMBINATIONS = {
    "plain": [],
    "clipped": ["--trainer.gradient_clip_val=1"],
    "fp16": FP16,
    "Muon": ["--model.optimizer=fusion.training.Muon"],
    "AdamW": ["--model.optimizer=AdamW"],
    **{name: [f"--model.balance={name}"] for name in ("OGMGE", "MMPareto", "GradientBlending", "UnimodalLosses")},
    **{f"{name} in fp16": [f"--model.balance={name}", *FP16] for name in ("OGMGE", "MMPareto")},
    "EMA": ["--recipe", "engine/ema"],
    "SWA": ["--recipe", "engine/swa"],
    "freezing": ['--model.freeze={"text": {"until_update": 5}}'],
    "dropped modalities": ["--model.modality_dropout=0.3"],
    "mixed samples": ["--model.mixing.mixup=1", "--model.mixing.cutmix=1", "--model.balance=OGMGE"],
    "batch normalisation": ["--model.image.init_args.name=resnet10t", "--model.image.init_args.options={}"],
    "class weights": ["--model.task.class_weights=balanced"],
}


def updates_reads(fit_here, monkeypatch, recipe, *options):
    count, usual = CountReads(2, 7), command.standing_callbacks
    monkeypatch.setattr(command, "standing_callbacks", lambda *given: [count, *usual(*given)])
    fit_here("--recipe", recipe, "--trainer.max_epochs=1", "--trainer.log_every_n_steps=100", *options)
    return {site: times for site, times in count.an_update.items() if site not in ON_THE_HOST}


@pytest.mark.parametrize("name", COMBINATIONS)
def test_an_update_waits_for_the_device_once(tiny, fit_here, monkeypatch, name):
    found = updates_reads(fit_here, monkeypatch, tiny(), *COMBINATIONS[name])
    assert sum(found.values()) == 1, found
    assert found.keys() <= ASKS


@pytest.fixture
def one_process_group():
    return ["--trainer.strategy.class_path=fusion.training.DDP", "--trainer.devices=1"]


@pytest.mark.parametrize("compress", ["none", "fp16", "sign"])
@pytest.mark.parametrize("precision", [[], FP16], ids=["float32", "fp16"])
def test_so_does_an_update_whose_gradients_are_exchanged(tiny, fit_here, monkeypatch, one_process_group, compress, precision):
    options = [*one_process_group, f"--trainer.strategy.init_args.compress={compress}", *precision]
    found = updates_reads(fit_here, monkeypatch, tiny(), *options)
    assert sum(found.values()) == 1, found
    assert found.keys() <= ASKS


def test_a_wait_that_is_added_is_counted(tiny, fit_here, monkeypatch):
    """Else the test above could not fail."""
    from fusion.training import Engine

    sound = Engine.loss
    monkeypatch.setattr(Engine, "loss", lambda self, *given: sound(self, *given) * float(given[0].sum().isfinite()))
    found = updates_reads(fit_here, monkeypatch, tiny())
    assert sum(found.values()) == 2


def test_averages_lie_on_the_models_device_and_are_counted_on_the_host():
    class There(LightningModule):
        device = torch.device("meta")

    average, module = EMA(decay=0.9), There()
    module.layer = torch.nn.Linear(2, 2)
    average._average_model = AveragedModel(module, use_buffers=True)
    average.on_train_start(None, module)
    assert {p.device.type for p in average._average_model.module.parameters()} == {"meta"}
    assert average._average_model.n_averaged.device.type == "cpu"
