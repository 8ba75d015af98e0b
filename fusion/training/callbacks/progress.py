"""Progress of training: a bar on a terminal, a line an epoch everywhere, and in logs a line every half minute within epochs."""

import sys
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

from fusion.console import Heartbeat, figure, print_rank_zero
from fusion.training.engine import Engine


class EpochLines(Callback):
    """Prints one line an epoch: loss, validation scores and samples a second. Where there is no bar, also the progress within the epoch, a
    validation or the test, every `every_s` seconds.

    Args:
        every_s: seconds between two lines within an epoch.
    """

    def __init__(self, every_s: float = 30.0) -> None:
        self.sign = Heartbeat(every_s)
        self.rates: list[float] = []  # samples a second of each epoch of this process, without validation

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        # Lightning calls no on_train_epoch_start for a run resumed within an epoch.
        self.begin()

    def on_train_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.begin()

    def begin(self) -> None:
        self.began, self.samples, self.training_s = time.monotonic(), 0, 0.0
        self.sign.reset()

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.samples += len(batch.target) * trainer.world_size
        if self.due(trainer):
            rate = self.samples / (time.monotonic() - self.began)
            done = f"batch {batch_idx + 1:,} of {int(trainer.num_training_batches):,}"
            print_rank_zero(f"epoch {epoch_of(trainer)}  {done}  loss {float(outputs['loss']):.4f}  {rate:,.0f} samples/s")

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self.training_s = time.monotonic() - self.began

    def on_validation_batch_end(self, trainer: Trainer, module: LightningModule, *arguments: Any) -> None:
        self.report(trainer, "validating", arguments[2], trainer.num_val_batches)

    def on_test_batch_end(self, trainer: Trainer, module: LightningModule, *arguments: Any) -> None:
        self.report(trainer, "testing", arguments[2], trainer.num_test_batches)

    def report(self, trainer: Trainer, what: str, batch_idx: int, batches: Any) -> None:
        if self.due(trainer):
            print_rank_zero(f"{what}  batch {batch_idx + 1:,} of {int(sum(batches)):,}")

    def due(self, trainer: Trainer) -> bool:
        """Whether a line within an epoch is to be printed."""
        shown = sys.stderr.isatty() and trainer.progress_bar_callback is not None
        return trainer.is_global_zero and not shown and self.sign.due()

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        assert isinstance(module, Engine)
        scores: dict[str, Any] = {
            f"train/{name}": mean for name, mean in module.means.of_epoch(module).items()
        }  # on every rank: a collective
        # Without validation in this epoch, the logged validation scores are those of an earlier one.
        scores |= {name: score for name, score in trainer.callback_metrics.items() if self.training_s or not name.startswith("val/")}
        rate = self.samples / max(self.training_s or time.monotonic() - self.began, 1e-9)
        self.rates.append(rate)
        if not trainer.is_global_zero:
            return
        best_by = module.task.monitor
        shown = {"loss": "train/loss", "val loss": "val/loss", f"val {best_by}": f"val/{best_by}"}
        parts = [f"{key} {figure(float(scores[name]))}" for key, name in shown.items() if name in scores]
        print_rank_zero(f"epoch {epoch_of(trainer)}  " + "  ".join([*parts, f"{rate:,.0f} samples/s"]))
        self.sign.reset()


def epoch_of(trainer: Trainer) -> str:
    last = f"/{trainer.max_epochs}" if (trainer.max_epochs or -1) > 0 else ""
    return f"{trainer.current_epoch + 1}{last}"


class Bar(ProgressBar):
    """Progress bar on a terminal, with the loss, the last validation score and samples a second.

    Args:
        refresh_s: seconds between two readings of the loss, each of which synchronises with the device.
    """

    def __init__(self, refresh_s: float = 0.2) -> None:
        super().__init__()
        self.refresh_s = refresh_s
        self.bar: Any = None
        self.enabled = True

    def disable(self) -> None:
        self.enabled = False

    def enable(self) -> None:
        self.enabled = True

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.on_train_epoch_start(trainer, module)  # not called by Lightning for a run resumed within an epoch

    def on_train_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.began = self.shown = time.monotonic()
        self.samples = 0
        if self.bar is None and self.enabled and sys.stderr.isatty():
            self.bar = tqdm(
                total=int(trainer.num_training_batches), desc=f"epoch {trainer.current_epoch + 1}", leave=False, mininterval=self.refresh_s
            )

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.bar is None:
            return
        self.samples += len(batch.target) * trainer.world_size
        self.bar.update(1)
        now = time.monotonic()
        if now - self.shown > self.refresh_s:
            self.shown = now
            best_by = module.task.monitor if isinstance(module, Engine) else ""
            scored = trainer.callback_metrics.get(f"val/{best_by}")
            metric = "" if scored is None else f", val {best_by} {figure(float(scored))}"
            self.bar.set_postfix_str(f"loss {float(outputs['loss']):.4f}{metric}, {self.samples / (now - self.began):,.0f} samples/s")

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
