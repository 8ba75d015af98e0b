"""What is found out before training: callbacks that don't go with our engine, metrics that nothing logs, limits below one batch."""

import re
import sys
from types import ModuleType

import pytest
from lightning.pytorch import Callback
from tiny_world import EARLY, NO_VALIDATION, SELDOM, SHORT

from fusion.errors import UserError
from fusion.session import fit

# Metrics that are watched.


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([EARLY, "--trainer.callbacks.monitor=val_loss"], "EarlyStopping monitors 'val_loss', which is not logged. Did you mean val/loss"),
        ([EARLY, "--trainer.callbacks.monitor=train/loss"], "Did you mean train/loss_epoch?"),
        (["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.monitor=val/acc"], "ModelCheckpoint monitors 'val/acc'"),
        ([*NO_VALIDATION, EARLY, "--trainer.callbacks.monitor=val/loss"], "there is no validation: trainer.limit_val_batches is 0"),
        (
            [EARLY, "--trainer.callbacks.monitor=val/loss", "--trainer.callbacks.check_on_train_epoch_end=true", SELDOM],
            "epochs without validation",
        ),
    ],
    ids=["misspelt", "train", "checkpoint", "no validation", "some epochs"],
)
def test_a_metric_that_nothing_logs_is_rejected_before_training(tiny, tmp_path, options, words):
    with pytest.raises(UserError, match=re.escape(words)):
        fit(["--recipe", str(tiny()), *SHORT, *options])
    assert not list((tmp_path / "runs").glob("*/*"))


def test_without_a_validation_split_the_error_says_how_to_get_one(tiny, write_manifest, tmp_path):
    manifest = write_manifest(lambda i, row: dict(row, split="train" if row["split"] == "val" else row["split"]))
    with pytest.raises(UserError, match=r"no validation split \(--data\.val=0\.1"):
        fit(["--recipe", str(tiny(manifest=manifest)), "--data.val=0", EARLY, "--trainer.callbacks.monitor=val/loss"])


def test_what_only_another_engine_logs_is_rejected_too(tiny):
    with pytest.raises(UserError, match="'train/loss_scale', which is not logged"):
        fit(["--recipe", str(tiny()), *SHORT, EARLY, "--trainer.callbacks.monitor=train/loss_scale"])


@pytest.mark.parametrize("monitor", ["val/f1_macro", "val/balanced_accuracy", "train/lr", "train/loss_epoch", "train/accuracy_epoch"])
def test_every_metric_that_is_said_to_be_logged_can_be_watched(tiny, fit_here, monitor):
    assert fit_here("--recipe", tiny(), *SHORT, EARLY, f"--trainer.callbacks.monitor={monitor}").status == 0


@pytest.mark.parametrize("options", [[EARLY, "--trainer.callbacks.monitor=val/loss"], ["--recipe", "engine/early_stopping"]])
def test_early_stopping_waits_for_the_validation_that_a_cut_epoch_has_not(tiny, fit_here, options):
    run = fit_here("--recipe", tiny(), *options, "--trainer.max_steps=3")
    assert run.status == 0
    assert run.results()["updates"] == 3


def test_early_stopping_still_stops_after_the_validations_that_it_waited_for(tiny, fit_here):
    options = [EARLY, "--trainer.callbacks.monitor=val/loss", "--trainer.callbacks.patience=2", "--model.optimizer.init_args.lr=0"]
    assert fit_here("--recipe", tiny(), *options, "--trainer.max_epochs=9").results()["updates"] == 3 * 8


class Empty(Callback):
    pass


class Logs(Callback):
    def on_validation_epoch_end(self, trainer, module):
        module.log("val/own", 1.0)


class Silent(Callback):
    def on_train_start(self, trainer, module):
        pass


@pytest.fixture
def own(monkeypatch):
    """The option that adds a callback from a module of somebody else."""
    module = ModuleType("somebodys")
    monkeypatch.setitem(sys.modules, "somebodys", module)

    def option(cls):
        monkeypatch.setattr(cls, "__module__", "somebodys")
        setattr(module, cls.__name__, cls)
        return f"--trainer.callbacks+=somebodys.{cls.__name__}"

    return option


def test_a_callback_of_ones_own_may_log_what_is_watched(tiny, fit_here, own, tmp_path):
    watch = ["--recipe", str(tiny()), *SHORT, EARLY, "--trainer.callbacks.monitor=val/own"]
    with pytest.raises(UserError, match="'val/own', which is not logged"):
        fit([*watch, own(Empty)])
    assert fit_here(*watch, own(Logs)).status == 0
    with pytest.raises(UserError, match=r"trainer.callbacks: Early stopping conditioned on metric `val/own` which is not available"):
        fit_here(*watch, own(Silent))


# Callbacks and limits.


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (['--trainer.callbacks+={"class_path": "GradientAccumulationScheduler", "init_args": {"scheduling": {"0": 2}}}'], "device_batch"),
        (["--trainer.callbacks+=BatchSizeFinder"], "BatchSizeFinder is not allowed: an update is one global batch"),
        (["--trainer.callbacks+=LearningRateFinder"], "LearningRateFinder is not allowed"),
        (["--trainer.callbacks+=BackboneFinetuning"], "--model.freeze"),
        (["--recipe", "engine/fsdp", "--trainer.accelerator=cpu", "--recipe", "engine/ema"], "EMA copies the whole model"),
        (["--trainer.callbacks+=Timer"], "Timer has an option whose value, <Interval.step: 'step'>, can't be stored in a recipe"),
        (["--trainer.callbacks+=SpikeDetection"], "SpikeDetection is not allowed"),
        (["--trainer.callbacks+=ModelPruning", "--trainer.callbacks.pruning_fn=l1_unstructured"], "ModelPruning is not allowed"),
        (["--trainer.overfit_batches=2"], "--data.train_samples=N"),
        (["--trainer.val_check_interval=9"], "trainer.val_check_interval is 9 batches, but an epoch has 8"),
        (["--trainer.limit_train_batches=0.01"], "trainer.limit_train_batches is 0.01 of 8 batches, less than one"),
        (["--trainer.limit_val_batches=0.5"], "trainer.limit_val_batches is 0.5 of 1 batches"),
        (["--trainer.limit_test_batches=0.5"], "trainer.limit_test_batches is 0.5 of 1 batches"),
        (["--trainer.enable_checkpointing=false"], "a run needs checkpoints to be scored, used and resumed"),
        (["--trainer.enable_progress_bar=false", "--trainer.callbacks+=RichProgressBar"], "has RichProgressBar: remove one"),
    ],
)
def test_what_would_change_the_plan_or_end_it_later_is_rejected_before(tiny, tmp_path, options, words):
    with pytest.raises(UserError, match=re.escape(words)):
        fit(["--recipe", str(tiny()), "--runs", str(tmp_path / "runs"), *options])
    assert not list((tmp_path / "runs").glob("*/*"))


@pytest.mark.parametrize(
    "options",
    [
        ["--trainer.val_check_interval=8"],
        ["--trainer.val_check_interval=11", "--trainer.check_val_every_n_epoch=null"],
        ["--trainer.limit_train_batches=0.125", "--trainer.limit_test_batches=1.0"],
        ["--trainer.callbacks+=DeviceStatsMonitor", "--trainer.callbacks+=LearningRateMonitor"],  # which look for a logger at the start
    ],
)
def test_what_lightning_can_do_within_the_plan_runs(tiny, fit_here, options):
    assert fit_here("--recipe", tiny(), "--trainer.max_epochs=2", *options).status == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([EARLY], "trainer.callbacks: EarlyStopping needs monitor"),
        (
            [EARLY, "--trainer.callbacks.monitor=val/loss", "--trainer.callbacks.mode=best"],
            "EarlyStopping: `mode` can be min, max, got best",
        ),
        ([EARLY, "--trainer.callbacks.patience=soon"], "trainer.callbacks.init_args.patience: expected int, got soon"),
        (["--trainer.callbacks+=EarlyStoping"], "unknown 'EarlyStoping'. Did you mean EarlyStopping?"),
    ],
)
def test_a_callbacks_mistake_is_told_in_one_line(tiny, options, words):
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        fit(["--recipe", str(tiny()), *options])
    assert len(str(caught.value)) < 200
