"""A run that goes wrong stops, and says where."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from tiny_world import TWO

from fusion.cli.main import run as run_command
from fusion.console import printing
from fusion.errors import UserError
from fusion.heads import Concat
from fusion.training import Engine
from fusion.training.callbacks.guards import MOST_SKIPPED, Guard, finite, first_not_finite

FP16 = ["--trainer.plugins=fusion.training.Fp16"]


class Poison(Callback):
    """Makes one value of a parameter NaN before the batch with this number."""

    def __init__(self, name, batch, value=float("nan")):
        self.name, self.batch, self.value = name, batch, value

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == self.batch:
            with torch.no_grad():
                parameter = module.model.get_parameter(self.name)
                parameter[(0,) * parameter.dim()] = self.value


@pytest.fixture
def guarded(parts, tmp_path):
    """Fits with a guard; gives the error and the folder's non_finite.json."""

    def run(*options, callbacks=()):
        model, data, trainer = parts(*options, callbacks=[*callbacks, Guard(SimpleNamespace(folder=tmp_path))])
        with pytest.raises(UserError) as caught:
            trainer.fit(model, datamodule=data)
        return str(caught.value), json.loads((tmp_path / "non_finite.json").read_text()), model, data

    return run


def test_a_weight_that_is_nan_stops_the_run_with_its_name_and_the_ids_of_the_update(guarded):
    name = "encoders.text.body.embeddings.LayerNorm.weight"
    told, kept, model, data = guarded(callbacks=[Poison(name, 3)])
    assert "update 4: the loss is nan" in told
    assert "it began in parameter text.body.embeddings.LayerNorm.weight" in told
    assert kept["update"] == 4
    assert model.updates == 3
    batches = iter(data.train_dataloader())
    fourth = [next(batches) for _ in range(4)][3]
    assert kept["ids"] == [data.splits["train"].table.ids[row] for row in fourth.sample.tolist()]
    assert kept["ids"][0] in told


def test_a_huge_weight_is_found_where_the_values_first_overflow(guarded):
    told, kept, _, _ = guarded(callbacks=[Poison("encoders.image.body.patch_embed.proj.weight", 1, 3e38)])
    assert kept["began_in"].startswith("the output of image.body.")
    assert "the gradients of" in told


def test_a_gradient_alone_that_is_not_finite_names_its_modality_and_parameter(guarded, monkeypatch):
    class Spoil(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * float("inf")

    fuse = Concat.fuse

    def spoilt(self, features):
        text = features["text"]._replace(pooled=Spoil.apply(features["text"].pooled))
        return fuse(self, {**features, "text": text})

    monkeypatch.setattr(Concat, "fuse", spoilt)
    told, kept, model, _ = guarded()
    assert "the gradients of text (text.body" in told
    assert "the loss is" not in told
    assert all(name.startswith("text.") for name in kept["parameters"])
    assert model.updates == 0


def test_with_accumulation_the_ids_are_of_the_whole_update(guarded):
    _, kept, _, _ = guarded("--trainer.accumulate_grad_batches=2", callbacks=[Poison("encoders.text.body.embeddings.LayerNorm.weight", 2)])
    assert len(kept["ids"]) == 16
    assert kept["update"] == 2


def test_in_mixed_precision_an_overflow_is_the_scalers_and_endless_overflow_stops(parts, monkeypatch):
    finite_loss = Engine.loss
    monkeypatch.setattr(Engine, "loss", lambda self, *given: finite_loss(self, *given) * float("inf"))
    model, data, trainer = parts(*FP16, "--trainer.max_epochs=100", callbacks=[Guard()])
    with pytest.raises(UserError, match=f"{MOST_SKIPPED} updates in a row overflowed"):
        trainer.fit(model, datamodule=data)
    assert (model.updates, model.skipped) == (0, MOST_SKIPPED)


def test_a_sound_run_is_left_alone(parts):
    model, data, trainer = parts("--trainer.max_epochs=1", callbacks=[Guard()])
    trainer.fit(model, datamodule=data)
    assert model.updates == 8
    assert first_not_finite(model, next(iter(data.train_dataloader()))) == ""


def test_finite_sees_every_value():
    sound = [torch.ones(3), torch.zeros(2, 2), None]
    assert finite(sound)
    assert finite([])
    assert finite([torch.tensor([3e30, -3e30])])  # whose squares are not
    for value in (float("nan"), float("inf"), -float("inf")):
        assert not finite([*sound, torch.tensor([1.0, value])])


# Parameters without a gradient.


@pytest.fixture
def deaf_head(monkeypatch):
    """A head with a layer that nothing reads."""
    make = Concat.__init__

    def with_deaf_layer(self, *arguments, **options):
        make(self, *arguments, **options)
        self.deaf = torch.nn.Linear(3, 3)

    monkeypatch.setattr(Concat, "__init__", with_deaf_layer)


def test_a_parameter_without_a_gradient_stops_the_run_by_name(parts, deaf_head):
    model, data, trainer = parts(callbacks=[Guard()])
    with pytest.raises(UserError, match=r"no gradient at the first update: head \(head\.deaf\.weight, head\.deaf\.bias\)"):
        trainer.fit(model, datamodule=data)
    assert model.updates == 0


def test_it_may_be_allowed(parts, deaf_head, capsys):
    model, data, trainer = parts("--model.allow_unused=true", "--trainer.max_steps=1", callbacks=[Guard()])
    with printing():
        trainer.fit(model, datamodule=data)
    assert model.updates == 1
    assert "warning: parameters that got no gradient" in capsys.readouterr().out


def test_or_frozen(parts, deaf_head):
    model, data, trainer = parts('--model.freeze={"head.deaf*": {}}', "--trainer.max_steps=1", callbacks=[Guard()])
    trainer.fit(model, datamodule=data)
    assert model.updates == 1


# The command.


def test_the_command_tells_it_in_one_line_without_a_traceback(tiny, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        run_command("fit", ["--recipe", str(tiny()), "--model.optimizer.init_args.lr=1e30", f"--runs={tmp_path / 'runs'}"])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert re.fullmatch(r"error: update \d+: .*non_finite\.json\. Inspect them.*\n", told), told


@pytest.mark.slow
def test_two_ranks_stop_together_with_the_ids_of_both(tiny, tmp_path):
    import subprocess
    import sys

    from tiny_world import REPOSITORY, newest

    options = ["--model.optimizer.init_args.lr=1e30", f"--runs={tmp_path / 'runs'}", *TWO]
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "scripts/fit.py"), "--recipe", str(tiny()), *options],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    kept = json.loads((newest(tmp_path / "runs") / "non_finite.json").read_text())
    assert len(set(kept["ids"])) == 16
