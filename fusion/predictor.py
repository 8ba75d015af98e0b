"""Predictions of a finished run for raw samples: paths, images, arrays and texts in, classes with probabilities out."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fusion.data.processor import Processor
from fusion.encoders import Encoder
from fusion.encoders.adapters import add_adapters
from fusion.errors import UserError
from fusion.heads import FusionHead
from fusion.model import FusionModel
from fusion.rebuilding import class_of, rebuilt
from fusion.runs.bundle import MODEL, is_bundle, of_checkpoint, read_bundle
from fusion.runs.checkpoint_files import read_checkpoint

Picture = str | Path | bytes | Image.Image | np.ndarray


@dataclass(frozen=True)
class Predictions:
    """Predictions of a model for N samples.

    answers: for each sample the most likely class, the list of its labels, or the number. values (N, K) float32: the probabilities of the
    K classes or labels, or the numbers. names: of the K. present: modality -> (N,) bool, whether the sample has it.

    labels, probabilities and classes are aliases of answers, values and names, for classification.
    """

    answers: list[Any]
    values: np.ndarray
    names: list[str]
    present: dict[str, np.ndarray]

    @property
    def labels(self) -> list[Any]:
        return self.answers

    @property
    def probabilities(self) -> np.ndarray:
        return self.values

    @property
    def classes(self) -> list[str]:
        return self.names


class Predictor:
    """A trained model with all that is needed to process raw samples: tokenizer, image size, task.

    model: a FusionModel in eval mode; processor: converts samples to tensors and outputs to answers.
    """

    def __init__(self, model: FusionModel, processor: Processor, device: str | torch.device = "cpu") -> None:
        self.model, self.processor, self.device = model.eval().to(device), processor, torch.device(device)

    @classmethod
    def load(cls, run: str | Path, *, checkpoint: str = "best", device: str | torch.device | None = None) -> "Predictor":
        """Loads a run folder (its "best" or "last" checkpoint) or a checkpoint file; on the GPU if there is one and `device` is None.
        Warns if the run was not validated and so has no best checkpoint; the last is then used.

        Needs no other file, and no hub. Raises UserError for a missing run, and for files that contain more than plain data.
        """
        path, note = model_of(run, checkpoint)
        if note:
            warnings.warn(note, stacklevel=2)
        return cls.from_file(path, device=device)

    @classmethod
    def from_file(cls, path: Path, *, device: str | torch.device | None = None) -> "Predictor":
        """Loads a model's folder (model.json, model.safetensors), or a checkpoint file."""
        about, weights = read_bundle(path) if path.is_dir() else of_checkpoint(read_checkpoint(path), path)
        processor = Processor.from_state(about["processor"])
        encoders = {name: rebuilt(spec, Encoder) for name, spec in about["encoders"].items()}
        head = partial(class_of(about["head"], FusionHead), **about["head"]["init"])
        model = FusionModel.build(encoders, head, processor.task.out_dim)
        add_adapters(model.encoders, about["adapters"])
        model.load_state_dict(weights)
        return cls(model, processor, device or ("cuda" if torch.cuda.is_available() else "cpu"))

    @property
    def modalities(self) -> list[str]:
        return list(self.model.encoders)

    def predict(
        self,
        images: Iterable[Picture | None] | None = None,
        texts: Iterable[Any] | None = None,
        *,
        batch_size: int = 64,
        **inputs: Any,
    ) -> Predictions:
        """Predicts samples; None, NaN, pandas' NA or a blank text if a sample has no such input.

        images: paths, bytes of files, PIL images, or arrays (H, W, 3) uint8, lists of these if a sample has several. texts: also
        numbers, booleans and times, which are converted as in a manifest. Both are lists, iterators, NumPy arrays or columns of a data
        frame, in order, regardless of their index. Other inputs are passed by name: title=[...], facts=FRAME (with the table's columns).

        Raises UserError for a sample without any input, lists of different lengths, and images that can't be read.
        """
        return self.gather(self.outputs(images, texts, batch_size=batch_size, **inputs))

    def outputs(
        self, images: Iterable[Picture | None] | None = None, texts: Iterable[Any] | None = None, *, batch_size: int = 64, **inputs: Any
    ) -> list[tuple[Tensor, dict[str, Tensor]]]:
        """Returns for each batch of samples, given as for `predict`, the values (B, K) that the task scores, and presence by modality."""
        usual = {"image": "images", "text": "texts"}
        pair = {"image": images, "text": texts}
        # An input may be called "images" itself.
        named = {usual[name] if usual[name] in self.modalities else name: values for name, values in pair.items()} | inputs
        given = {name: values for name, values in named.items() if values is not None}
        unknown = [name for name in given if name not in self.modalities]
        if unknown:
            raise UserError(f"this model reads {' and '.join(self.modalities)}, not {unknown[0]}")
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}; expected at least 1")
        kinds = self.processor.inputs
        cells = {name: kinds[name].raw(values, usual.get(name, name)) for name, values in given.items()}
        lengths = {name: len(column) for name, column in cells.items()}
        if len(set(lengths.values())) != 1:
            expected = " and ".join(usual.get(name, name) for name in self.modalities)
            raise UserError(f"expected {expected} of equal length, None for a missing input; got {lengths or 'nothing'}")
        count = next(iter(lengths.values()))
        columns = {name: cells.get(name) or [None] * count for name in self.modalities}
        for i in range(count):
            if all(column[i] is None for column in columns.values()):
                raise UserError(f"sample {i} has none of {', '.join(self.modalities)}; at least one is needed")
        outputs = []
        for start in range(0, count, batch_size):
            unreadable: dict[int, tuple[str, UserError]] = {}
            outputs.append(self.predict_batch({name: column[start : start + batch_size] for name, column in columns.items()}, unreadable))
            for index, (name, error) in unreadable.items():
                cell = columns[name][start + index]
                path = f" ({cell})" if isinstance(cell, Path) else ""
                raise type(error)(f"sample {start + index}: its {name} can't be read: {error}{path}")
        return outputs

    def predict_batch(
        self, columns: Mapping[str, Sequence[Any]], unreadable: dict[int, tuple[str, UserError]] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the values (B, K) that the task scores (probabilities, standardised numbers) and presence, for a batch of cells by input.

        Raises the error of an input that can't be read; or, if `unreadable` is given, stores it there with the input's name, by its index
        in the batch, whose row is then meaningless.
        """
        inputs = {}
        for name, kind in self.processor.inputs.items():
            failed: dict[int, UserError] = {}
            inputs[name] = kind.batch(columns[name], failed)
            for index, error in failed.items():
                if unreadable is None:
                    raise error
                unreadable.setdefault(index, (name, error))
        return self.run(inputs)

    @torch.inference_mode()
    def run(self, inputs: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the values (B, K) that the task scores and presence by modality, for a batch of tensors."""
        ordered = {name: on_device(inputs[name], self.device) for name in self.modalities}
        values = self.processor.task.values(self.model(ordered).output).cpu()
        return values, {name: x.present for name, x in inputs.items()}

    @torch.inference_mode()
    def match(self, columns: Mapping[str, Sequence[Any]]) -> Tensor:
        """Returns the matching logits (B,) of pairs, by cells of the inputs; of a run of Retrieval whose head has a matcher. Raises
        UserError for an input that can't be read."""
        unreadable: dict[int, UserError] = {}
        inputs = {name: kind.batch(columns[name], unreadable) for name, kind in self.processor.inputs.items()}
        for index, error in unreadable.items():
            cells = ", ".join(str(columns[name][index]) for name in self.modalities)
            raise UserError(f"a pair can't be matched: {error} ({cells})") from error
        ordered = {name: on_device(inputs[name], self.device) for name in self.modalities}
        head: Any = self.model.head
        return head.match(self.model.encode(ordered)).float().cpu()

    def gather(self, outputs: Iterable[tuple[Tensor, dict[str, Tensor]]]) -> Predictions:
        """Combines the outputs of several batches."""
        batches, task = list(outputs), self.processor.task
        values = torch.cat([values for values, _ in batches]) if batches else torch.zeros(0, task.out_dim)
        present = {name: np.concatenate([np.zeros(0, bool), *(mask[name].numpy() for _, mask in batches)]) for name in self.modalities}
        return Predictions(task.answers(values.numpy()), task.in_units(values.numpy()), list(task.names), present)


def model_of(run: str | Path, which: str) -> tuple[Path, str]:
    """The path of a run folder's model: for its best checkpoint the folder `model`, else the checkpoint; `run` itself if it is a model's
    folder or a checkpoint file. Also returns a note, "" unless the last checkpoint replaces the best, because nothing was validated.
    """
    path = Path(run).expanduser()
    if path.is_file() or is_bundle(path):
        return path, ""
    if not path.is_dir():
        raise UserError(f"there is no run {path}")
    available = sorted(p.stem for p in (path / "checkpoints").glob("*.ckpt"))
    note = ""
    if which == "best" and which not in available and "last" in available:
        which, note = "last", f"{run} has no best checkpoint, since it wasn't validated; its last one is used"
    if (which == "best" or note) and is_bundle(path / MODEL):
        return path / MODEL, note
    if which not in available:
        raise UserError(f"{path} has no checkpoint '{which}'; it has {', '.join(available) or 'none: is it a run folder?'}")
    return path / "checkpoints" / f"{which}.ckpt", note


def on_device(inputs: Any, device: torch.device) -> Any:
    """An encoder's input with its tensors on the device."""
    return type(inputs)(*(value.to(device) if isinstance(value, Tensor) else value for value in inputs))
