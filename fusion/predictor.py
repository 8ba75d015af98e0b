"""A finished run, ready to be asked: paths, pictures, arrays and texts in, classes with probabilities out."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from PIL import Image
from torch import Tensor

from fusion.data.images import ImageError, cores
from fusion.data.processor import ImageSpec, Processor
from fusion.data.raw_columns import image_column, text_column
from fusion.data.samples import load_image
from fusion.data.tokenizer import batch_texts
from fusion.encoders import Encoder, Images, Texts
from fusion.encoders.adapters import add_adapters
from fusion.errors import UserError
from fusion.heads import FusionHead
from fusion.model import FusionModel
from fusion.runs.checkpoint_files import read_checkpoint

FORMAT = 6

Picture = str | Path | bytes | Image.Image | np.ndarray


@dataclass(frozen=True)
class Predictions:
    """What a model says of N samples.

    answers: of each sample the likeliest class, the list of its labels, or the number. values (N, K) float32: the probabilities of the K
    classes or labels, or the numbers. names: of the K. present: modality -> (N,) bool, whether the sample has it.

    labels, probabilities and classes are the same by the names that they have in a classification.
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
    """A trained model with all that it needs to read raw samples: tokenizer, image size, task.

    model: a FusionModel in eval mode; processor: how samples become tensors and what the outputs mean.
    """

    def __init__(self, model: FusionModel, processor: Processor, device: str | torch.device = "cpu") -> None:
        self.model, self.processor, self.device = model.eval().to(device), processor, torch.device(device)

    @classmethod
    def load(cls, run: str | Path, *, checkpoint: str = "best", device: str | torch.device | None = None) -> "Predictor":
        """From a run folder (its "best" or "last" checkpoint) or a checkpoint file alone; on the GPU if there is one and `device` is None.
        Warns where a run that was never validated has no best one, and the last is used.

        Needs no other file, and no hub. Raises UserError for a run that isn't there, and for files that hold more than plain data.
        """
        path, note = checkpoint_of(run, checkpoint)
        if note:
            warnings.warn(note, stacklevel=2)
        held = read_checkpoint(path)
        about = held.get("fusion") if isinstance(held, dict) else None
        if about is None or "format" not in about:
            raise UserError(f"{path} is not a checkpoint of fusion")
        if about["format"] != FORMAT:
            raise UserError(
                f"{path} has format {about['format']}, this version of fusion reads {FORMAT}: predict with the version that trained it, or "
                "train anew (--init_from takes its weights)"
            )
        processor = Processor.from_state(about["processor"])
        encoders = {name: rebuilt(spec, Encoder)(**spec["init"]) for name, spec in about["encoders"].items()}
        head = partial(rebuilt(about["head"], FusionHead), **about["head"]["init"])
        model = FusionModel.build(encoders, head, processor.task.out_dim)
        add_adapters(model.encoders, about["adapters"])
        model.load_state_dict({key.removeprefix("model."): value for key, value in held["state_dict"].items() if key.startswith("model.")})
        return cls(model, processor, device or ("cuda" if torch.cuda.is_available() else "cpu"))

    @property
    def modalities(self) -> list[str]:
        return list(self.model.encoders)

    def predict(
        self, images: Iterable[Picture | None] | None = None, texts: Iterable[Any] | None = None, *, batch_size: int = 64
    ) -> Predictions:
        """The answers for samples, each an image and a text; None, NaN, pandas' NA or a blank text where a sample lacks one.

        images: paths, bytes of files, PIL pictures, or arrays (H, W, 3) uint8. texts: also numbers, booleans and times, which are written
        as in a manifest. Both are lists, iterators, NumPy arrays or columns of a data frame, in order whatever their index.

        Raises UserError for a sample that lacks both, lists of different lengths, and images that can't be read.
        """
        given = {
            "image": None if images is None else image_column(images),
            "text": None if texts is None else text_column(texts),
        }
        count = self.count(given)
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}; expected at least 1")
        columns = {name: given[name] or [None] * count for name in self.modalities}
        for i in range(count):
            if all(column[i] is None for column in columns.values()):
                raise UserError(f"sample {i} has neither of {', '.join(self.modalities)}; at least one is needed")
        outputs = []
        for start in range(0, count, batch_size):
            unreadable: dict[int, ImageError] = {}
            outputs.append(self.ask({name: column[start : start + batch_size] for name, column in columns.items()}, unreadable))
            for place, error in unreadable.items():
                picture = columns["image"][start + place]
                of = f" ({picture})" if isinstance(picture, Path) else ""
                raise ImageError(f"sample {start + place}: its image can't be read: {error}{of}")
        return self.gather(outputs)

    def count(self, given: Mapping[str, Sequence[Any] | None]) -> int:
        lengths = {name: len(column) for name, column in given.items() if column is not None}
        foreign = [name for name in lengths if name not in self.modalities]
        if foreign:
            raise UserError(f"this model reads {' and '.join(self.modalities)}, not {foreign[0]}")
        if len(set(lengths.values())) != 1:
            raise UserError(f"give images and texts of one length, None where a sample lacks one; got {lengths or 'nothing'}")
        return next(iter(lengths.values()))

    def ask(
        self, columns: Mapping[str, Sequence[Any]], unreadable: dict[int, ImageError] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What the task scores (probabilities, standardised numbers; (B, K)) and presence of one batch.

        Raises the ImageError of a picture that can't be read; or, if `unreadable` is given, puts it there by its place in the batch, whose
        row then means nothing.
        """
        inputs: dict[str, Images | Texts] = {}
        if self.processor.image is not None:
            spec = self.processor.image
            pixels = torch.zeros(len(columns["image"]), 3, *spec.size, dtype=torch.uint8)
            for i, found in enumerate(decoded(columns["image"], spec)):
                if isinstance(found, np.ndarray):
                    pixels[i] = torch.from_numpy(found)
                elif found is not None:
                    if unreadable is None:
                        raise found
                    unreadable[i] = found
            there = [picture is not None for picture in columns["image"]]
            inputs["image"] = Images(pixels, torch.tensor(there, dtype=torch.bool), anyone=any(there), everyone=all(there))
        if self.processor.tokenizer is not None:
            inputs["text"] = batch_texts(self.processor.tokenizer, columns["text"])
        return self.run(inputs)

    @torch.inference_mode()
    def run(self, inputs: dict[str, Images | Texts]) -> tuple[Tensor, dict[str, Tensor]]:
        """What the task scores (B, K) and presence by modality of a batch of tensors."""
        ordered = {name: move_data_to_device(inputs[name], self.device) for name in self.modalities}
        values = self.processor.task.values(self.model(ordered).output).cpu()
        return values, {name: x.present for name, x in inputs.items()}

    def gather(self, outputs: Iterable[tuple[Tensor, dict[str, Tensor]]]) -> Predictions:
        """What `ask` gave of batches, as predictions."""
        batches, task = list(outputs), self.processor.task
        values = torch.cat([values for values, _ in batches]) if batches else torch.zeros(0, task.out_dim)
        present = {name: np.concatenate([np.zeros(0, bool), *(there[name].numpy() for _, there in batches)]) for name in self.modalities}
        return Predictions(task.answers(values.numpy()), task.in_units(values.numpy()), list(task.names), present)


def decoded(pictures: Sequence[Picture | None], spec: ImageSpec) -> list[np.ndarray | ImageError | None]:
    """Each picture as uint8 (3, H, W), or why not; files on all cores, since Pillow decodes outside the interpreter's lock."""

    def one(picture: Picture | None) -> np.ndarray | ImageError | None:
        try:
            return None if picture is None else load_image(picture, spec)
        except ImageError as error:
            return error

    files = all(isinstance(picture, str | Path | bytes | None) for picture in pictures)  # others may be one object twice
    if not files or len(pictures) < 2:
        return [one(picture) for picture in pictures]
    with ThreadPoolExecutor(max_workers=min(32, cores())) as pool:
        return list(pool.map(one, pictures))


def checkpoint_of(run: str | Path, which: str) -> tuple[Path, str]:
    """The checkpoint file of a run folder, or the file itself; and a note, "" if all is as asked: where nothing was validated, the last
    stands in for the best.
    """
    path = Path(run).expanduser()
    if path.is_file():
        return path, ""
    if not path.is_dir():
        raise UserError(f"there is no run {path}")
    there = sorted(p.stem for p in (path / "checkpoints").glob("*.ckpt"))
    if which == "best" and which not in there and "last" in there:
        return path / "checkpoints" / "last.ckpt", f"{run} has no best checkpoint, since it wasn't validated; its last one is used"
    if which not in there:
        raise UserError(f"{path} has no checkpoint '{which}'; it has {', '.join(there) or 'none: is it a run folder?'}")
    return path / "checkpoints" / f"{which}.ckpt", ""


def rebuilt(spec: dict[str, Any], base: type) -> Any:
    """The class that a checkpoint names, if it is one of the kind expected."""
    module, _, name = spec["class"].rpartition(".")
    try:
        cls = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"the checkpoint needs {spec['class']}, which can't be imported here ({error})") from error
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise UserError(f"the checkpoint names {spec['class']} as its {base.__name__}, which it is not")
    return cls
