"""fp16 with a gradient scaler, for real, on a CPU."""

import pytest
import torch
from lightning.pytorch import Callback

from fusion.errors import UserError
from fusion.settings.parser import FusionCLI
from fusion.training import Engine, Fp16

FP16 = ["--trainer.plugins=fusion.training.Fp16", "--trainer.plugins.init_args.init_scale=1024"]
SEVEN = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=7"]


class Weights(Callback):
    """For each batch, whether any weight moved; and the learning rate and the scale after it."""

    def __init__(self):
        self.moved, self.rates, self.scales = [], [], []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.before = [p.detach().clone() for p in module.parameters()]

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.moved.append(any(not torch.equal(a, b) for a, b in zip(self.before, module.parameters(), strict=True)))
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        self.scales.append(trainer.precision_plugin.scaler.get_scale())


@pytest.fixture
def overflow_at(monkeypatch):
    """Makes the loss of these training batches infinite."""

    def at(*batches):
        calls = []
        finite = Engine.loss

        def loss(self, logits, *targets):
            calls.append(logits.dtype)
            return finite(self, logits, *targets) * (float("inf") if len(calls) - 1 in batches else 1.0)

        monkeypatch.setattr(Engine, "loss", loss)
        return calls

    return at


@pytest.mark.parametrize("fused", [False, True])
def test_an_overflow_skips_the_update_halves_the_scale_and_holds_the_schedule(parts, overflow_at, fused):
    dtypes = overflow_at(2, 5)
    watch = Weights()
    optimizer = [f"--model.optimizer.init_args.fused={str(fused).lower()}"]
    model, data, trainer = parts(*FP16, *SEVEN, *optimizer, callbacks=[watch])
    trainer.fit(model, datamodule=data)
    assert dtypes == [torch.float16] * 7  # autocast was on
    assert watch.moved == [True, True, False, True, True, False, True]
    assert watch.scales == [1024, 1024, 512, 512, 512, 256, 256]
    assert model.updates == 5
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 5
    peak, horizon = 0.05, 7
    expected = [peak * model.schedule.factor(update, horizon) for update in (1, 2, 2, 3, 4, 4, 5)]
    assert watch.rates == pytest.approx(expected)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_the_scale_the_skipped_updates_and_the_rate_are_logged(tiny, fit_here, overflow_at):
    overflow_at(2, 5)
    run = fit_here("--recipe", tiny(), *FP16, "--trainer.max_epochs=1")
    assert run.column("train/loss_scale") == [1024, 1024, 512, 512, 512, 256, 256, 256]
    assert run.column("train/skipped_updates") == [0, 0, 1, 1, 1, 2, 2, 2]
    rates = run.column("train/lr")
    assert rates[2] == rates[3]
    assert rates[5] == rates[6]
    assert len(set(rates)) == 6


def test_without_overflow_every_update_counts(parts):
    model, data, trainer = parts(*FP16, *SEVEN)
    trainer.fit(model, datamodule=data)
    assert model.updates == trainer.lr_scheduler_configs[0].scheduler.last_epoch == 7


def test_an_overflow_in_one_of_two_accumulated_batches_skips_their_update(parts, overflow_at):
    losses = overflow_at(2)
    model, data, trainer = parts(*FP16, "--trainer.max_steps=4", "--trainer.accumulate_grad_batches=2")
    trainer.fit(model, datamodule=data)
    assert (model.updates, model.skipped) == (4, 1)
    assert len(losses) == 10
    assert trainer.precision_plugin.scaler.get_scale() == 512


def test_max_steps_and_global_step_count_updates_that_were_made(parts, overflow_at):
    losses = overflow_at(2, 5)
    model, data, trainer = parts(*FP16, "--trainer.max_steps=5")
    trainer.fit(model, datamodule=data)
    assert len(losses) == 7
    assert trainer.global_step == model.updates == trainer.lr_scheduler_configs[0].scheduler.last_epoch == 5
    assert model.skipped == 2


def test_the_scale_grows_after_the_interval_without_overflow(parts):
    watch = Weights()
    model, data, trainer = parts(
        *FP16, "--trainer.plugins.init_args.growth_interval=3", "--trainer.plugins.init_args.growth_factor=4", *SEVEN, callbacks=[watch]
    )
    trainer.fit(model, datamodule=data)
    assert watch.scales == [1024, 1024, 4096, 4096, 4096, 16384, 16384]


@pytest.mark.parametrize("options", [FP16, ["--trainer.precision=bf16-mixed"]], ids=["fp16", "bf16"])
def test_half_precision_learns_what_float32_learns(parts, options):
    losses = []
    for precision in ([], options):
        model, data, trainer = parts(*precision, *SEVEN)
        trainer.fit(model, datamodule=data)
        losses.append(float(trainer.callback_metrics["train/loss_epoch"]))
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)


def test_the_scale_is_in_the_checkpoint_and_comes_back(parts, overflow_at, tmp_path):
    overflow_at(1)
    model, data, trainer = parts(*FP16, *SEVEN)
    trainer.fit(model, datamodule=data)
    trainer.save_checkpoint(tmp_path / "fp16.ckpt")
    assert torch.load(tmp_path / "fp16.ckpt", weights_only=True)["Fp16"]["scale"] == 512
    again, data, trainer = parts(*FP16, "--trainer.max_epochs=2", "--trainer.limit_train_batches=7")
    trainer.fit(again, datamodule=data, ckpt_path=str(tmp_path / "fp16.ckpt"), weights_only=True)
    assert trainer.precision_plugin.scaler.get_scale() == 512
    assert again.updates == 6 + 7


def test_the_recipes_values_arrive_in_the_scaler():
    recipes = ["--recipe", "quickstart", "--recipe", "engine/amp"]
    given = ["init_scale=1024", "growth_factor=3", "backoff_factor=0.25", "growth_interval=17"]
    cli = FusionCLI([*recipes, "--trainer.accelerator=cpu", "--trainer.logger=false", *(f"--trainer.plugins.init_args.{v}" for v in given)])
    _, _, trainer = cli.make([])
    assert isinstance(trainer.precision_plugin, Fp16)
    scaler = trainer.precision_plugin.scaler
    assert scaler.is_enabled()
    found = scaler.get_scale(), scaler.get_growth_factor(), scaler.get_backoff_factor(), scaler.get_growth_interval()
    assert found == (1024, 3, 0.25, 17)


def test_the_recipe_as_shipped_has_torchs_own_defaults():
    cli = FusionCLI(["--recipe", "quickstart", "--recipe", "engine/amp", "--trainer.accelerator=cpu", "--trainer.logger=false"])
    _, _, trainer = cli.make([])
    ours, theirs = trainer.precision_plugin.scaler, torch.amp.GradScaler("cpu")
    for read in ("get_scale", "get_growth_factor", "get_backoff_factor", "get_growth_interval"):
        assert getattr(ours, read)() == getattr(theirs, read)()


@pytest.mark.parametrize(("options", "fused"), [([], True), (["--model.optimizer.init_args.fused=false"], False), (FP16, True)])
def test_the_optimiser_is_fused_where_the_recipe_does_not_say_no(parts, options, fused):
    model, data, trainer = parts(*SEVEN, *options)
    trainer.fit(model, datamodule=data)
    assert trainer.optimizers[0].defaults["fused"] is fused


class Gradients(Callback):
    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.norm = float(torch.cat([p.grad.flatten() for p in module.parameters()]).norm())


def test_what_looks_at_the_gradients_sees_them_unscaled_whatever_the_optimiser(parts):
    """A fused kernel would unscale them itself, in its step: balance, clipping and guards came before."""
    norms = []
    for options in ([], FP16, [*FP16, "--model.optimizer.init_args.fused=false"]):
        model, data, trainer = parts("--trainer.max_steps=1", *options, callbacks=[look := Gradients()])
        trainer.fit(model, datamodule=data)
        norms.append(look.norm)
    assert norms == pytest.approx([norms[0]] * 3, rel=0.01)


def test_a_run_on_a_cpu_is_mixed_there_whatever_the_machine_has(parts, monkeypatch, overflow_at):
    with monkeypatch.context() as on_a_gpu_machine:
        on_a_gpu_machine.setattr(torch.cuda, "is_available", lambda: True)  # when the plugin is made
        plugin = Fp16()
    dtypes = overflow_at()
    model, data, trainer = parts(*FP16, *SEVEN)
    trainer.strategy.precision_plugin = plugin
    trainer.fit(model, datamodule=data)
    assert dtypes == [torch.float16] * 7
    assert trainer.precision_plugin.device == "cpu"
    assert trainer.precision_plugin.scaler._device == "cpu"


@pytest.mark.parametrize(("how", "measure"), [("norm", lambda moved: moved.norm()), ("value", lambda moved: moved.abs().max())])
def test_gradients_are_clipped_after_they_are_unscaled(parts, how, measure):
    clip = ["--trainer.gradient_clip_val=0.01", f"--trainer.gradient_clip_algorithm={how}"]
    plain = ["--model.optimizer.init_args.momentum=0", "--model.schedule=null", "--trainer.max_steps=1"]
    for precision in ([], FP16, [*FP16, "--model.optimizer.init_args.fused=false"]):
        model, data, trainer = parts(*clip, *plain, *precision)
        model.build(data)
        before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
        trainer.fit(model, datamodule=data)
        moved = (torch.cat([p.detach().flatten() for p in model.parameters()]) - before) / 0.05
        assert float(measure(moved)) == pytest.approx(0.01, rel=0.01)


def test_tf32_is_chosen_in_the_recipe(tiny, fit_here):
    assert torch.get_float32_matmul_precision() == "highest"
    try:
        fit_here("--recipe", tiny(), "--trainer.max_steps=1", "--float32_matmul_precision=high")
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


BF16 = "--trainer.plugins=fusion.training.Bf16OnCpu"


@pytest.mark.parametrize(("has_it", "dtype", "precision"), [(True, torch.bfloat16, "bf16-mixed"), (False, torch.float32, "32-true")])
def test_bf16_is_used_where_the_processor_has_it_and_float32_elsewhere_with_a_warning(
    parts, monkeypatch, overflow_at, recwarn, has_it, dtype, precision
):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_it)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    dtypes = overflow_at()
    model, data, trainer = parts(BF16, *SEVEN)
    trainer.fit(model, datamodule=data)
    assert dtypes == [dtype] * 7
    assert trainer.precision == precision
    assert any("no bf16 instructions" in str(w.message) for w in recwarn) == (not has_it)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.updates == 7


def test_bf16_on_a_processor_learns_what_float32_learns(parts, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    losses = []
    for options in ([], [BF16]):
        model, data, trainer = parts(*options, *SEVEN)
        trainer.fit(model, datamodule=data)
        losses.append(float(trainer.callback_metrics["train/loss_epoch"]))
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)


@pytest.mark.parametrize("options", [{"init_scale": 0.0}, {"growth_factor": 1.0}, {"backoff_factor": 1.0}, {"growth_interval": 0}])
def test_scales_that_cannot_work_are_rejected(options):
    with pytest.raises(UserError, match="Fp16: init_scale"):
        Fp16(**options)
