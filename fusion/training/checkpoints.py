"""Checkpoints that are whole or not there: written beside the old one, then put in its place."""

import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from fusion.data.checkpoint import read_checkpoint
from fusion.errors import UserError


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a temporary file in the same folder, flushes it to the disk and renames it: whatever fails, the previous one survives."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            written = path.with_name(f".{path.name}-{os.getpid()}")
            try:
                with open(written, "wb") as file:
                    torch.save(checkpoint, file)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(written, path)
            except BaseException:
                written.unlink(missing_ok=True)
                raise
        except (OSError, RuntimeError) as error:  # torch's zip writer turns a full disk into a RuntimeError
            survives = f"the previous one is still there: {path}" if path.exists() else "there is no earlier one"
            raise UserError(f"can't save the checkpoint {path} ({error}); {survives}") from error

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        return read_checkpoint(path)


class BestAndLast(ModelCheckpoint):
    """best.ckpt by the validation accuracy, and last.ckpt after every epoch: Lightning's `save_last` writes one only with a new best."""

    def __init__(self) -> None:
        super().__init__(
            monitor="val/accuracy", mode="max", filename="best", save_last=True, enable_version_counter=False, auto_insert_metric_name=False
        )

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        super().on_train_epoch_end(trainer, module)
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
