"""How training goes: a bar on a terminal, a line an epoch in a log."""

import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

from fusion.training.task import Task


class Progress(ProgressBar):
    """Loss, the last validation accuracy and samples a second; every epoch leaves one line."""

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
        # A run resumed within an epoch has no start of that epoch.
        self.began, self.samples = time.monotonic(), 0

    def on_train_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.began, self.samples = time.monotonic(), 0
        if self.enabled and sys.stderr.isatty():
            self.bar = tqdm(
                total=int(trainer.num_training_batches), desc=f"epoch {trainer.current_epoch + 1}", leave=False, mininterval=self.refresh_s
            )

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.samples += len(batch.target) * trainer.world_size
        if self.bar is not None:
            self.bar.update(1)
            if time.monotonic() - getattr(self, "shown", 0.0) > self.refresh_s:  # reading the loss waits for the device
                self.shown = time.monotonic()
                scored = trainer.callback_metrics.get("val/accuracy")
                metric = "" if scored is None else f", val accuracy {float(scored):.4f}"
                rate = self.samples / (self.shown - self.began)
                self.bar.set_postfix_str(f"loss {float(outputs['loss']):.4f}{metric}, {rate:,.0f} samples/s")

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self.training_s = time.monotonic() - self.began

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        assert isinstance(module, Task)
        scores: dict[str, Any] = {f"train/{name}": mean for name, mean in module.epoch_means().items()}  # on every rank, over which it sums
        scores |= trainer.callback_metrics
        if not self.enabled:
            return
        parts = [f"{key} {float(scores[name]):.4f}" for key, name in SHOWN.items() if name in scores]
        rate = self.samples / max(getattr(self, "training_s", time.monotonic() - self.began), 1e-9)
        epochs = f"/{trainer.max_epochs}" if (trainer.max_epochs or -1) > 0 else ""
        print(f"epoch {trainer.current_epoch + 1}{epochs}  " + "  ".join([*parts, f"{rate:,.0f} samples/s"]), flush=True)


SHOWN = {"loss": "train/loss", "val loss": "val/loss", "val accuracy": "val/accuracy"}
