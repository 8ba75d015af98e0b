"""What callbacks watch: a metric that will be logged, found out before training and not after an epoch of it."""

from typing import Any

from lightning.pytorch import Callback, Trainer

from fusion.errors import UserError, nearest
from fusion.training.ddp import DDP
from fusion.training.precision import scaler_of
from fusion.training.task import Task


def validates(trainer: Trainer, splits: dict[str, Any]) -> bool:
    """Whether the run will be validated at all."""
    return "val" in splits and trainer.limit_val_batches != 0


def check_monitors(trainer: Trainer, task: Task, splits: dict[str, Any]) -> None:
    """Raises UserError for a callback (EarlyStopping, ModelCheckpoint) whose `monitor` names a metric that nothing logs.

    Nothing is rejected where a callback from outside Lightning and fusion may log metrics of its own, nor for EarlyStopping(strict=False).
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    if any(is_foreign(callback) for callback in callbacks):
        return
    validated, of_task = validates(trainer, splits), task.metric_names()
    scaled = scaler_of(trainer.precision_plugin) is not None
    of_engine = ["train/loss_scale", "train/skipped_updates"] if scaled else []
    of_engine += ["train/sent_bytes"] if isinstance(trainer.strategy, DDP) else []
    known = of_engine + [name for name in of_task if validated or not name.startswith("val/")]
    for callback in callbacks:
        monitor = getattr(callback, "monitor", None)
        if monitor is None or not getattr(callback, "strict", True) or (task.balance is not None and monitor.startswith("balance/")):
            continue
        if monitor in known:
            at_each_end = getattr(callback, "_check_on_train_epoch_end", False)  # EarlyStopping's; None: it decides by itself
            if monitor.startswith("val/") and at_each_end and trainer.check_val_every_n_epoch != 1:
                raise UserError(
                    f"trainer.callbacks: {type(callback).__name__} looks for '{monitor}' after epochs without validation "
                    f"(trainer.check_val_every_n_epoch is {trainer.check_val_every_n_epoch}); leave out check_on_train_epoch_end"
                )
            continue
        if monitor in of_task:
            none = "there is no validation split (--data.val=0.1 takes a tenth of train)"
            why = "trainer.limit_val_batches is 0" if "val" in splits else none
            raise UserError(f"trainer.callbacks: {type(callback).__name__} monitors '{monitor}', but nothing is validated: {why}")
        raise UserError(
            f"trainer.callbacks: {type(callback).__name__} monitors '{monitor}', which is not logged. {nearest(monitor, known)}"
        )


def is_foreign(callback: Callback) -> bool:
    return type(callback).__module__.partition(".")[0] not in ("lightning", "pytorch_lightning", "fusion")
