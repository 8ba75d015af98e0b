"""Checks before training: callbacks that are incompatible with the engine, monitored metrics that nothing logs, limits below one batch."""

from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    SpikeDetection,
    WeightAveraging,
)

from fusion.data.module import FusionData
from fusion.errors import UserError, nearest
from fusion.lightning_private import check_after_validation, checks_at_epoch_end, syncs_batchnorm
from fusion.training.distributed.ddp import DDP
from fusion.training.distributed.fsdp import FSDP
from fusion.training.engine import Engine
from fusion.training.optim.precision import scaler_of

REJECTED = {
    GradientAccumulationScheduler: "an update is one global batch: data.batch_size samples, in batches of data.device_batch_size",
    BatchSizeFinder: "an update is one global batch: data.batch_size samples; the batch of a device is data.device_batch_size",
    LearningRateFinder: "it would silently change the recipe's learning rate; try rates by --model.optimizer.lr",
    BackboneFinetuning: "use --model.freeze, as {image: {until_update: 500}}",
    SpikeDetection: "an update whose gradients aren't finite stops the run, with the ids of its samples",
    ModelPruning: "it can't prune weights in channels-last memory format; prune a trained model",
}


def validates(trainer: Trainer, splits: dict[str, Any]) -> bool:
    """Whether the run has validation."""
    return "val" in splits and trainer.limit_val_batches != 0


def check_before_training(trainer: Trainer, engine: Engine, data: FusionData) -> None:
    """Raises UserError for settings that would fail later in training, or change it from its plan."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        for kind, instead in REJECTED.items():
            if isinstance(callback, kind):
                raise UserError(f"trainer.callbacks: {kind.__name__} is not allowed: {instead}")
        if isinstance(callback, EarlyStopping) and callback.monitor.startswith("val/") and checks_at_epoch_end(callback) is None:
            # Check after each validation: an epoch that max_steps cuts short has no validation at its end.
            check_after_validation(callback)
        if isinstance(callback, WeightAveraging) and isinstance(trainer.strategy, FSDP):
            raise UserError(
                f"trainer.callbacks: {type(callback).__name__} copies the whole model, but FSDP shards it over the devices; use it with "
                "--recipe engine/ddp, or leave it out"
            )
    if isinstance(trainer.strategy, FSDP) and syncs_batchnorm(trainer.strategy):
        raise UserError("trainer.sync_batchnorm has no effect with FSDP; leave it out, or train with --recipe engine/ddp")
    if trainer.overfit_batches:  # type: ignore[attr-defined]
        raise UserError(
            "trainer.overfit_batches would draw other samples in every epoch; to overfit a model on a few samples: --data.train_samples=N"
        )
    check_limits(trainer, data)
    check_monitors(trainer, engine, data.splits)


def check_limits(trainer: Trainer, data: FusionData) -> None:
    """Raises UserError for limits below one batch, and for a validation interval of more batches than an epoch has."""
    world = trainer.num_devices * trainer.num_nodes
    batches = {split: data.batch_count(split, world, trainer.accumulate_grad_batches) for split in data.splits}
    for split, count in batches.items():
        name = f"limit_{split}_batches"
        limit = getattr(trainer, name)
        if isinstance(limit, float) and 0 < limit * count < 1:
            raise UserError(
                f"trainer.{name} is {limit} of {count} batches, less than one; expected a number of batches, or {1 / count:.3g}"
            )
    limit = trainer.limit_train_batches
    most = int(limit * batches["train"]) if isinstance(limit, float) else min(limit, batches["train"])
    every = trainer.val_check_interval
    if isinstance(every, int) and every > most and trainer.check_val_every_n_epoch is not None and validates(trainer, data.splits):
        raise UserError(
            f"trainer.val_check_interval is {every} batches, but an epoch has {most}; expected at most that, or "
            "--trainer.check_val_every_n_epoch=null, with which they are counted across epochs"
        )


def check_monitors(trainer: Trainer, engine: Engine, splits: dict[str, Any]) -> None:
    """Raises UserError for a score of --monitor that the task doesn't have, and for a callback (EarlyStopping, ModelCheckpoint) whose
    `monitor` names a metric that nothing logs.

    Nothing is checked where a callback from outside Lightning and fusion has a hook, in which it may log its own metrics; nor for
    EarlyStopping(strict=False).
    """
    scores = [*engine.task.metric_names(), "loss"]
    if engine.task.monitor not in scores:
        what = type(engine.task).__name__
        raise UserError(f"--monitor={engine.task.monitor}: {what} has no such score. {nearest(engine.task.monitor, scores)}")
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    if any(may_log(callback) for callback in callbacks):
        return
    validated, of_task = validates(trainer, splits), engine.metric_names()
    scaled = scaler_of(trainer.precision_plugin) is not None
    of_engine = ["train/loss_scale", "train/skipped_updates"] if scaled else []
    of_engine += ["train/sent_bytes"] if isinstance(trainer.strategy, DDP) else []
    known = of_engine + [name for name in of_task if validated or not name.startswith("val/")]
    for callback in callbacks:
        monitor = getattr(callback, "monitor", None)
        if monitor is None or not getattr(callback, "strict", True) or (engine.balance is not None and monitor.startswith("balance/")):
            continue
        if monitor in known:
            at_each_end = checks_at_epoch_end(callback)  # EarlyStopping's; None: Lightning decides
            if monitor.startswith("val/") and at_each_end and trainer.check_val_every_n_epoch != 1:
                raise UserError(
                    f"trainer.callbacks: {type(callback).__name__} checks '{monitor}' after epochs without validation "
                    f"(trainer.check_val_every_n_epoch is {trainer.check_val_every_n_epoch}); leave out check_on_train_epoch_end"
                )
            continue
        if monitor in of_task:
            no_split = "there is no validation split (--data.val=0.1 takes a tenth of train)"
            why = "trainer.limit_val_batches is 0" if "val" in splits else no_split
            raise UserError(f"trainer.callbacks: {type(callback).__name__} monitors '{monitor}', but there is no validation: {why}")
        fix = f"Did you mean {monitor}_epoch?" if f"{monitor}_epoch" in known else nearest(monitor, known)
        raise UserError(f"trainer.callbacks: {type(callback).__name__} monitors '{monitor}', which is not logged. {fix}")


def may_log(callback: Callback) -> bool:
    """Whether a callback is from outside Lightning and fusion and overrides any hook, in which it may log metrics."""
    foreign = type(callback).__module__.partition(".")[0] not in ("lightning", "pytorch_lightning", "fusion")
    hooks = [name for name in vars(Callback) if name.startswith(("on_", "setup"))]
    return foreign and any(getattr(type(callback), name) is not getattr(Callback, name) for name in hooks)
