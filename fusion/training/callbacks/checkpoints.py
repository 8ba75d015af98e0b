"""Atomic checkpoints: written to a temporary file that then replaces the old one; the old last.ckpt is retained as previous.ckpt."""

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
    """Writes a temporary file in the same folder, flushes it to disk and renames it, so that the previous checkpoint survives any failure.

    The previous last.ckpt becomes previous.ckpt, to resume from should last.ckpt get corrupt.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        path = Path(path)
        try:
            save_atomically(checkpoint, path, previous=path.with_name("previous.ckpt") if path.name == "last.ckpt" else None)
        except (OSError, RuntimeError) as error:  # torch's zip writer turns a full disk into a RuntimeError
            remaining = f"the previous one is still there: {path}" if path.exists() else "there is no earlier one"
            raise UserError(f"can't save the checkpoint {path} ({error}); {remaining}") from error

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        return read_checkpoint(path)


def save_atomically(state: Any, path: Path, previous: Path | None = None) -> None:
    """torch.save that writes the file completely, flushed to disk, or not at all. previous: new path for an earlier file at `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
        flush_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def flush_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, so that new file names survive a power failure."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class BestAndLast(ModelCheckpoint):
    """Saves best.ckpt by the task's validation score (`monitor_of`), and last.ckpt after every epoch (Lightning's `save_last` writes it
    only together with a new best one) and within epochs every so many updates or minutes.
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
        """Restore the state with paths in the current run folder: Lightning discards the best score where the folder's path differs."""

        def relocated(path: str) -> str:
            return str(Path(str(self.dirpath)) / Path(path).name) if path else path

        paths = {name: relocated(state_dict[name]) for name in ("best_model_path", "kth_best_model_path", "last_model_path")}
        best = {relocated(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict(state_dict | paths | {"best_k_models": best, "dirpath": self.dirpath})

    def monitor_of(self, monitor: str, mode: str) -> None:
        """Set the validation score that selects the best checkpoint: the highest ("max") or the lowest ("min")."""
        self.monitor, self.mode = f"val/{monitor}", mode
        self.kth_value = torch.tensor(torch.inf if mode == "min" else -torch.inf)

    def without_validation(self) -> None:
        """Save only last.ckpt, since no score selects a best one."""
        self.monitor, self.save_top_k = None, 0

    def due_by_count(self, updates: int) -> bool:
        """Whether a checkpoint is due after so many updates."""
        return self.every_updates is not None and updates % self.every_updates == 0

    def due_by_clock(self) -> bool:
        """Whether a checkpoint is due by time, on this process's clock."""
        return self.every_minutes is not None and time.monotonic() - self.saved_at >= 60 * self.every_minutes

    def save_now(self, trainer: Trainer) -> None:
        """Save last.ckpt in the middle of an epoch. All ranks call it."""
        if self.dirpath:
            trainer.save_checkpoint(Path(self.dirpath) / "last.ckpt", weights_only=False)
        self.saved_at = time.monotonic()

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        super().on_train_epoch_end(trainer, module)
        save_last(self, trainer)
        self.saved_at = time.monotonic()
