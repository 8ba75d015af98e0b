"""Checkpoints that are whole or not there: written beside the old one, then put in its place, which is kept until the next."""

import os
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from fusion.errors import UserError
from fusion.lightning_private import save_last
from fusion.runs.checkpoint_files import read_checkpoint


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a temporary file in the same folder, flushes it to the disk and renames it: whatever fails, the previous one survives.

    What last.ckpt was before becomes previous.ckpt, to go on from should last.ckpt be corrupt later.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        path = Path(path)
        try:
            save_whole(checkpoint, path, previous=path.with_name("previous.ckpt") if path.name == "last.ckpt" else None)
        except (OSError, RuntimeError) as error:  # torch's zip writer turns a full disk into a RuntimeError
            survives = f"the previous one is still there: {path}" if path.exists() else "there is no earlier one"
            raise UserError(f"can't save the checkpoint {path} ({error}); {survives}") from error

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        return read_checkpoint(path)


def save_whole(held: Any, path: Path, previous: Path | None = None) -> None:
    """By torch.save: whole and on the disk, or not at all. previous: where what was there before is kept."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        with open(written, "wb") as file:
            torch.save(held, file)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(written, path)
        flush_folder(path.parent)
    except BaseException:
        written.unlink(missing_ok=True)
        raise


def flush_folder(folder: Path) -> None:
    """So that the new names survive a power cut too."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class BestAndLast(ModelCheckpoint):
    """best.ckpt by the task's score on validation (`monitor_of`); last.ckpt after every epoch (Lightning's `save_last` writes one only with
    a new best), and within epochs after so many updates or minutes.
    """

    def __init__(self, every_updates: int | None = None, every_minutes: float | None = None) -> None:
        if (every_updates is not None and every_updates < 1) or (every_minutes is not None and every_minutes <= 0):
            raise UserError(
                f"checkpoint: every_updates is {every_updates}, every_minutes {every_minutes}; expected at least 1, above 0, or null"
            )
        super().__init__(
            monitor="val/accuracy", mode="max", filename="best", save_last=True, enable_version_counter=False, auto_insert_metric_name=False
        )
        self.every_updates, self.every_minutes = every_updates, every_minutes
        self.saved_at = time.monotonic()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Wherever the run's folder is now, and by whichever path it is named: Lightning forgets the best score where the path differs."""

        def here(path: str) -> str:
            return str(Path(str(self.dirpath)) / Path(path).name) if path else path

        moved = {name: here(state_dict[name]) for name in ("best_model_path", "kth_best_model_path", "last_model_path")}
        kept = {here(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict(state_dict | moved | {"best_k_models": kept, "dirpath": self.dirpath})

    def monitor_of(self, monitor: str, mode: str) -> None:
        """The score of validation that tells the best checkpoint: its greatest ("max") or its least ("min")."""
        self.monitor, self.mode = f"val/{monitor}", mode
        self.kth_value = torch.tensor(torch.inf if mode == "min" else -torch.inf)

    def without_validation(self) -> None:
        """Nothing will tell which is best: last.ckpt alone is kept."""
        self.monitor, self.save_top_k = None, 0

    def due_by_count(self, updates: int) -> bool:
        """Whether the schedule asks for a checkpoint after so many updates."""
        return self.every_updates is not None and updates % self.every_updates == 0

    def due_by_clock(self) -> bool:
        """Whether it does now, by this process's clock."""
        return self.every_minutes is not None and time.monotonic() - self.saved_at >= 60 * self.every_minutes

    def save_now(self, trainer: Trainer) -> None:
        """last.ckpt, in the middle of an epoch. All ranks call it."""
        if self.dirpath:
            trainer.save_checkpoint(Path(self.dirpath) / "last.ckpt", weights_only=False)
        self.saved_at = time.monotonic()

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        super().on_train_epoch_end(trainer, module)
        save_last(self, trainer)
        self.saved_at = time.monotonic()
