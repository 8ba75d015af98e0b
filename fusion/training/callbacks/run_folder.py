"""The folder of a run: everything to repeat it, to resume it, and to predict with its model."""

import csv
import json
import os
import platform
import subprocess
import sys
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from fusion.data.record import FILE as SAMPLES
from fusion.errors import UserError
from fusion.lightning_private import log_now, logs_now, step_metrics

PACKAGES = ("torch", "lightning", "timm", "transformers", "tokenizers", "torchmetrics", "numpy", "pillow", "jsonargparse", "omegaconf")
ISSUES, METRICS = "data_issues.csv", "metrics.csv"
OWN_FILES = (ISSUES, METRICS, SAMPLES, "evaluation_issues.csv")  # tables that other commands must not overwrite


class RunFolder(Callback):
    """Directs loggers and checkpoints to the run's folder, and writes the recipe, the environment and the data's issues there.

    All ranks use the folder that rank 0 chose (its name has the time, which may differ on other ranks).
    """

    def __init__(self, folder: Path | None, recipe: str, checkpoint: ModelCheckpoint | None, *, log: bool = True) -> None:
        self.folder, self.recipe, self.checkpoint, self.log = folder, recipe, checkpoint, log
        self.logged: dict[str, Any] = {"rows": 0, "waiting": {}}  # state in the checkpoint that this run resumes from

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self.folder = Path(trainer.strategy.broadcast(str(self.folder) if self.folder else None))  # type: ignore[arg-type]
        if self.checkpoint is not None:
            self.checkpoint.dirpath = str(self.folder / "checkpoints")
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, ModelCheckpoint) and callback is not self.checkpoint and callback.dirpath is None:
                callback.dirpath = str(self.folder / "more_checkpoints")  # where they don't overwrite the run's own
        if self.log:
            self.earlier: list[dict[str, str]] | None = earlier_metrics(self.folder, trainer.is_global_zero)
            self.csv = CountingCSVLogger(self.folder, name="", version="", flush_logs_every_n_steps=50)
            trainer.loggers = [
                self.csv,
                TensorBoardLogger(self.folder, name="", version="tensorboard"),
            ]
        if trainer.is_global_zero:
            (self.folder / "recipe.yaml").write_text(self.recipe, encoding="utf-8")
            (self.folder / "environment.json").write_text(json.dumps(environment(), indent=2) + "\n", encoding="utf-8")
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            data.issues.write(self.folder / ISSUES)
            if not (self.folder / SAMPLES).exists():  # a resumed run keeps the record of its start, whose digest is in its checkpoints
                data.record.write(self.folder)

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.restore_metrics(trainer)

    def on_fit_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.restore_metrics(trainer)  # on_train_start isn't called for a run that had already ended

    def restore_metrics(self, trainer: Trainer) -> None:
        """Continue a resumed run's metrics.csv, which CSVLogger has deleted, with the records up to its checkpoint."""
        if not (trainer.is_global_zero and self.log and self.earlier is not None):
            return
        earlier = self.earlier[: self.logged["rows"]]
        self.earlier = None
        self.csv.experiment.metrics[:0] = earlier
        self.csv.records = len(earlier)
        if self.logged["waiting"]:
            log_now(trainer, self.logged["waiting"])
        self.csv.save()
        assert self.folder is not None
        (self.folder / EARLIER).unlink(missing_ok=True)

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write the metrics to disk before the checkpoint, so that a run killed later resumes with all of them. The checkpoint also has the
        recipe, since the folder's recipe.yaml may be edited later."""
        checkpoint["recipe"] = self.recipe
        if not (trainer.is_global_zero and self.log and trainer.loggers):
            return
        self.csv.save()
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress.total
        # Lightning logs an update only after the hook in which a checkpoint may be saved.
        is_pending = progress.completed < progress.processed and logs_now(trainer)
        pending = step_metrics(trainer) if is_pending else {}
        checkpoint["logged"] = {"rows": self.csv.records, "waiting": pending}

    def on_load_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.logged = checkpoint.get("logged", self.logged)


class CountingCSVLogger(CSVLogger):
    """CSVLogger that counts the records it has written."""

    records = 0

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        self.records += 1
        super().log_metrics(metrics, step)


EARLIER = "metrics-earlier.csv"


def earlier_metrics(folder: Path, is_writer: bool) -> list[dict[str, str]]:
    """The records of the folder's metrics.csv. The file is renamed until the new one has them, since CSVLogger begins by deleting it."""
    path, renamed = folder / METRICS, folder / EARLIER
    if is_writer and path.is_file() and not renamed.is_file():
        path.replace(renamed)
    if not renamed.is_file():
        return []
    return [record for record in read_metrics(renamed) if record.get("step", "").isdigit()]  # the last line may be incomplete after a kill


def read_metrics(path: Path) -> list[dict[str, str]]:
    """The records of a metrics.csv, each without its empty columns."""
    with open(path, newline="", encoding="utf-8") as file:
        return [{key: value for key, value in record.items() if key and value} for record in csv.DictReader(file)]


def new_run_folder(runs: Path, name: str) -> Path:
    """Create runs/<name>/<time>. Raises UserError where it can't be written."""
    started = datetime.now()
    for _ in range(1000):
        folder = runs / name / started.strftime("%Y-%m-%d_%H-%M-%S")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            started = datetime.fromtimestamp(started.timestamp() + 1)
        except OSError as error:
            raise UserError(f"can't make the run folder {folder} ({error.strerror}). Choose another place: --runs=FOLDER") from error
    raise UserError(f"can't find a free name for a run under {runs / name}")


def environment() -> dict[str, Any]:
    """Versions, git commit, command and hardware."""
    return {
        "fusion": version("fusion"),
        "git_commit": git_commit(),
        "command": sys.argv,
        "python": platform.python_version(),
        "packages": {package: version(package) for package in PACKAGES},
        "platform": platform.platform(),
        "cpu_cores": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def git_commit() -> str | None:
    """The git commit of this code, with a trailing + if files were changed since; None outside a checkout."""
    describe = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    try:
        return subprocess.run(describe, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
