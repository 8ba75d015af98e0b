"""The run that is made smaller: its model, its recipe and its training samples; and the folder that a smaller run starts from."""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from torch import Tensor

from fusion.data.issues import DataIssues
from fusion.data.record import FILE as SAMPLES
from fusion.data.table import Table
from fusion.errors import UserError
from fusion.predictor import Predictor, model_of, on_device
from fusion.runs.bundle import MODEL, of_checkpoint, read_bundle, write_bundle
from fusion.runs.checkpoint_files import read_checkpoint
from fusion.scoring import run_rows

RECIPE = "recipe.yaml"


class Source:
    """A trained run, read to make a smaller one of it.

    predictor: its model, which is changed in place. about: the description of the model. recipe: its settings. note: about the checkpoint.

    Raises UserError for what is no run folder, and for one without a checkpoint.
    """

    def __init__(self, run: str | Path, checkpoint: str = "best") -> None:
        self.run = Path(run).expanduser()
        if self.run.exists() and not (self.run / RECIPE).is_file():
            raise UserError(
                f"{self.run} has no {RECIPE}; expected the run folder printed by fit, by whose recipe the smaller one is trained"
            )
        path, self.note = model_of(self.run, checkpoint)
        self.predictor = Predictor.from_file(path)
        self.about, _ = read_bundle(path) if path.is_dir() else of_checkpoint(read_checkpoint(path), path)
        self.recipe: Any = OmegaConf.to_container(OmegaConf.load(self.run / RECIPE))

    def train_table(self) -> Table:
        """The samples of the run's training split. Raises UserError if its data isn't there any more."""
        return run_rows(self.run, self.predictor, "train", DataIssues("drop"))

    def samples(self, table: Table, most: int) -> Iterator[dict[str, Any]]:
        """The model's inputs for at most so many samples that have all of them, spread over a table; one at a time, without padding."""
        complete = [i for i in range(len(table)) if all(cells[i] is not None for cells in table.inputs.values())] or range(len(table))
        for position in np.linspace(0, len(complete) - 1, min(most, len(complete))).astype(int):
            unreadable: dict[int, UserError] = {}
            kinds = self.predictor.processor.inputs
            batch = {name: kind.batch([table.inputs[name][complete[position]]], unreadable) for name, kind in kinds.items()}
            if not unreadable:
                yield {name: on_device(inputs, self.predictor.device) for name, inputs in batch.items()}


def state_bytes(weights: Mapping[str, Tensor]) -> int:
    """The size of weights in a file, without its header."""
    return sum(weight.numel() * weight.element_size() for weight in weights.values())


def check_free(out: Path) -> None:
    """Raises UserError if a folder has anything in it."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} exists already; expected a new folder")


def write_start(folder: Path, source: Source, about: dict[str, Any], recipe: dict[str, Any]) -> None:
    """Writes the model that training starts from, with the recipe and the splits of its samples: a run folder without checkpoints, which
    `evaluate`, `predict` and `--init_from` take like any other. Nothing is left of it where it can't be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(OmegaConf.create(recipe), folder / RECIPE)
        if (source.run / SAMPLES).is_file():
            shutil.copyfile(source.run / SAMPLES, folder / SAMPLES)
        write_bundle(folder / MODEL, about, source.predictor.model.state_dict())
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise UserError(f"can't write {folder} ({error.strerror or error})") from error
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
