"""Predictions of a finished run for raw samples."""

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusion.data.kinds import Kind
from fusion.data.processor import Processor
from fusion.encoders import Encoder
from fusion.encoders.adapters import add_adapters
from fusion.errors import UserError, first_line
from fusion.heads import FusionHead
from fusion.model import FusionModel
from fusion.packages.folder import is_package
from fusion.predictions import Output, RawPredictor
from fusion.pruning.widths import narrow
from fusion.rebuilding import class_of, importing_only, rebuilt
from fusion.runs.bundle import MODEL, PRUNED, is_bundle, of_checkpoint, read_bundle
from fusion.runs.checkpoint_files import read_checkpoint
from fusion.tasks import Task


class Predictor(RawPredictor):
    """A trained model with all that is needed to process raw samples: tokenizer, image size, task.

    model: a FusionModel in eval mode; processor: converts samples to tensors and outputs to answers.
    """

    def __init__(self, model: FusionModel, processor: Processor, device: str | torch.device = "cpu") -> None:
        try:
            self.model, self.processor, self.device = model.eval().to(device), processor, torch.device(device)
        except (RuntimeError, AssertionError) as error:  # unknown, missing, or without enough memory
            raise UserError(f"the model can't be moved to device {device}: {first_line(error)}") from error

    @classmethod
    def load(
        cls,
        run: str | Path,
        *,
        checkpoint: str = "best",
        device: str | torch.device | None = None,
        trusted: Sequence[str] | None = None,
    ) -> "Predictor":
        """Loads a run folder (its "best" or "last" checkpoint) or a checkpoint file; on the GPU if there is one and `device` is None.
        Warns if the run was not validated and so has no best checkpoint; the last is then used.

        trusted: the packages outside fusion whose classes a model may have, which are imported; None: any. Needs no other file, and no hub.
        Raises UserError for a missing run, and for files that contain more than plain data.
        """
        path, note = model_of(run, checkpoint)
        if note:
            warnings.warn(note, stacklevel=2)
        return cls.from_file(path, device=device, trusted=trusted)

    @classmethod
    def from_file(cls, path: Path, *, device: str | torch.device | None = None, trusted: Sequence[str] | None = None) -> "Predictor":
        """Loads a model's folder (model.json, model.safetensors), or a checkpoint file."""
        about, weights = read_bundle(path) if path.is_dir() else of_checkpoint(read_checkpoint(path), path)
        with importing_only(trusted):
            processor = Processor.from_state(about["processor"])
            encoders = {name: rebuilt(spec, Encoder) for name, spec in about["encoders"].items()}
            head = partial(class_of(about["head"], FusionHead), **about["head"]["init"])
            model = FusionModel.build(encoders, head, processor.task.out_dim)
            narrow(model, about.get(PRUNED, {}), str(path))
            add_adapters(model.encoders, about["adapters"])
        model.load_state_dict(weights)
        return cls(model, processor, device or ("cuda" if torch.cuda.is_available() else "cpu"))

    @property
    def preprocessors(self) -> Mapping[str, Kind]:
        return self.processor.inputs

    @property
    def answering(self) -> Task:
        return self.processor.task

    @property
    def width(self) -> int:
        return self.processor.task.out_dim

    @torch.inference_mode()
    def run(self, inputs: Mapping[str, Any]) -> Output:
        """Returns the values (B, K) that the task scores and presence by modality, for a batch of tensors."""
        ordered = {name: on_device(inputs[name], self.device) for name in self.modalities}
        values = self.processor.task.values(self.model(ordered).output).cpu().numpy()
        return values, {name: x.present.numpy() for name, x in inputs.items()}

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
    if is_package(path):
        raise UserError(f"{path} is an exported package; expected the run that it was exported from")
    if not available and not (path / "recipe.yaml").is_file() and (inside := newest_inside(path)):
        raise UserError(f"{path} holds several runs; expected one, such as {inside}")
    if which not in available:
        raise UserError(f"{path} has no checkpoint '{which}'; it has {', '.join(available) or 'none: is it a run folder?'}")
    return path / "checkpoints" / f"{which}.ckpt", note


def newest_inside(path: Path) -> Path | None:
    """The newest run in a folder of runs; None if it isn't one."""
    return max((one.parent for one in path.glob("*/recipe.yaml")), default=None)


def on_device(inputs: Any, device: torch.device) -> Any:
    """An encoder's input with its tensors on the device."""
    return type(inputs)(*(value.to(device) if isinstance(value, Tensor) else value for value in inputs))
