"""The folder of a run: everything to run it again, to continue it, and to use what it trained."""

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
    """Agrees on the folder with all ranks, then sends loggers and checkpoints there and writes what the run was.

    Rank 0 chose the folder; the other ranks, which may have started a second later, take its word.
    """

    def __init__(self, folder: Path | None, recipe: str, checkpoint: ModelCheckpoint | None, *, log: bool = True) -> None:
        self.folder, self.recipe, self.checkpoint, self.log = folder, recipe, checkpoint, log
        self.logged: dict[str, Any] = {"rows": 0, "waiting": {}}  # when the checkpoint was made that this run goes on from

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self.folder = Path(trainer.strategy.broadcast(str(self.folder) if self.folder else None))  # type: ignore[arg-type]
        if self.checkpoint is not None:
            self.checkpoint.dirpath = str(self.folder / "checkpoints")
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, ModelCheckpoint) and callback is not self.checkpoint and callback.dirpath is None:
                callback.dirpath = str(self.folder / "more_checkpoints")  # where they overwrite none of ours
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
            data.ledger.write(self.folder / ISSUES)
            if not (self.folder / SAMPLES).exists():  # a resumed run's is that of its start, which its checkpoints name
                data.record.write(self.folder)

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.go_on_with_the_log(trainer)

    def on_fit_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.go_on_with_the_log(trainer)  # a run that was already at its end doesn't start

    def go_on_with_the_log(self, trainer: Trainer) -> None:
        """A resumed run's metrics go on where its checkpoint stood; CSVLogger has deleted the file."""
        if not (trainer.is_global_zero and self.log and self.earlier is not None):
            return
        kept = self.earlier[: self.logged["rows"]]
        self.earlier = None
        self.csv.experiment.metrics[:0] = kept
        self.csv.rows = len(kept)
        if self.logged["waiting"]:
            log_now(trainer, self.logged["waiting"])
        self.csv.save()
        assert self.folder is not None
        (self.folder / EARLIER).unlink(missing_ok=True)

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """The metrics up to a checkpoint are on the disk before it is: a run killed later goes on with all of them. And the recipe, for
        the folder's may be edited later."""
        checkpoint["recipe"] = self.recipe
        if not (trainer.is_global_zero and self.log and trainer.loggers):
            return
        self.csv.save()
        seen: Any = trainer.fit_loop.epoch_loop.batch_progress.total
        # Lightning logs an update after the hook in which it may be saved.
        waits = seen.completed < seen.processed and logs_now(trainer)
        waiting = step_metrics(trainer) if waits else {}
        checkpoint["logged"] = {"rows": self.csv.rows, "waiting": waiting}

    def on_load_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.logged = checkpoint.get("logged", self.logged)


class CountingCSVLogger(CSVLogger):
    """And how many rows it has written."""

    rows = 0

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        self.rows += 1
        super().log_metrics(metrics, step)


EARLIER = "metrics-earlier.csv"


def earlier_metrics(folder: Path, writes: bool) -> list[dict[str, str]]:
    """The rows of the folder's metrics.csv. They are kept in a file of another name until the new one has them, since CSVLogger begins by
    deleting.
    """
    path, kept = folder / METRICS, folder / EARLIER
    if writes and path.is_file() and not kept.is_file():
        path.replace(kept)
    if not kept.is_file():
        return []
    return [row for row in read_metrics(kept) if row.get("step", "").isdigit()]  # a kill may have torn the last line


def read_metrics(path: Path) -> list[dict[str, str]]:
    """The rows of a metrics.csv, each with the columns that it fills."""
    with open(path, newline="", encoding="utf-8") as file:
        return [{key: value for key, value in row.items() if key and value} for row in csv.DictReader(file)]


def new_run_folder(runs: Path, name: str) -> Path:
    """runs/<name>/<time>, made now. Raises UserError where it can't be written."""
    begun = datetime.now()
    for _ in range(1000):
        folder = runs / name / begun.strftime("%Y-%m-%d_%H-%M-%S")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            begun = datetime.fromtimestamp(begun.timestamp() + 1)
        except OSError as error:
            raise UserError(f"can't make the run folder {folder} ({error.strerror}). Another place: --runs=FOLDER") from error
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
    """The commit that this code was checked out at, with + if a file of it was changed since; None outside a checkout."""
    describe = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    try:
        return subprocess.run(describe, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
