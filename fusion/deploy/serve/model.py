"""The interface of a model that can be served, and how one is loaded: a run, a model's folder, a checkpoint or an exported package."""

import dataclasses
import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from fusion.errors import UserError
from fusion.hub_files import SCHEME, is_hub_name
from fusion.packages.folder import is_package
from fusion.predictions import Output, Predictions, RawPredictor


class Reads(Protocol):
    """Converts one input's raw values to arrays: a fusion.processing.Preprocessor, or the like of it.

    form: "image", "text", "table"; anything else takes single values.
    """

    form: str

    def raw(self, values: Any, name: str) -> list[Any]: ...

    def batch(self, cells: Sequence[Any], unreadable: dict[int, UserError]) -> Any: ...

    def concat(self, parts: Sequence[Any]) -> Any: ...


class Model(Protocol):
    """A trained model.

    preprocessors: of its inputs, by name. names: of its answers: classes, labels, targets. run: the output of a batch of their arrays.
    gather: predictions from outputs. confidence: (n,) the probability of each answer, from values (n, K); None for numbers.
    """

    @property
    def preprocessors(self) -> Mapping[str, Any]: ...

    @property
    def names(self) -> Sequence[str]: ...

    def run(self, inputs: Mapping[str, Any]) -> Output: ...

    def gather(self, outputs: Iterable[Output]) -> Predictions: ...

    def confidence(self, values: np.ndarray) -> np.ndarray | None: ...


class Served:
    """The predictor of a run or a package, as a Model: its preprocessors make arrays without torch, one sample at a time."""

    def __init__(self, predictor: RawPredictor) -> None:
        self.predictor, self.gather = predictor, predictor.gather
        self.preprocessors: dict[str, Any] = {}
        self.converters: dict[str, Callable[[Any], Any]] = {}  # from arrays to the predictor's own inputs
        for name, reader in predictor.preprocessors.items():
            if hasattr(reader, "concat"):
                self.preprocessors[name] = reader
            else:
                self.preprocessors[name], self.converters[name] = of_kind(reader)
        answering: Any = predictor.answering
        self.names: list[str] = list(answering.names)
        self.answering = answering if not hasattr(answering, "answering") else made_by(answering)

    def run(self, inputs: Mapping[str, Any]) -> Output:
        return self.predictor.run({name: self.converters[name](one) if name in self.converters else one for name, one in inputs.items()})

    def confidence(self, values: np.ndarray) -> np.ndarray | None:
        return None if self.answering is None else self.answering.confidence(values)


def made_by(task: Any) -> Any:
    """What makes a task's answers; None for a task of one's own that doesn't say."""
    try:
        return task.answering()
    except UserError:
        return None


def of_kind(kind: Any) -> tuple[Any, Callable[[Any], Any]]:
    """The preprocessor of a run's kind of input, and what makes the encoder's input of its arrays."""
    from fusion.data.kinds.image import images_of
    from fusion.data.kinds.table import columns_of
    from fusion.data.kinds.text import texts_of

    try:
        preprocessor = kind.preprocessor()
    except UserError:
        return ByCells(kind), lambda batch: batch
    makers: dict[str, Callable[[Any], Any]] = {"image": images_of, "text": texts_of, "table": columns_of}
    return preprocessor, makers[preprocessor.form]


class ByCells:
    """The preprocessor of a kind of one's own, which makes batches of cells alone: a sample's cell is kept until its batch is made."""

    form = "value"

    def __init__(self, kind: Any) -> None:
        self.kind, self.raw = kind, kind.raw

    def batch(self, cells: Sequence[Any], unreadable: dict[int, UserError]) -> list[Any]:
        self.kind.batch(cells, unreadable)
        return list(cells)

    def concat(self, parts: Sequence[list[Any]]) -> Any:
        return self.kind.batch([cell for part in parts for cell in part], {})


class Loaded(NamedTuple):
    """A model and its version: the name of its folder, and the digest of its files."""

    model: Model
    version: str


def load(path: str | Path, *, threads: int, max_megapixels: float, device: str | None = None) -> Loaded:
    """Load a model for serving. Raises UserError for anything but a run or a package.

    path: a run, a model's folder, a checkpoint or a package, or a run on a hub, hf://USER/NAME. threads: of one call of the model.
    max_megapixels: larger images are rejected; a lower limit of the model's own is kept. device: None for the CPU, and for runs the GPU if
    there is one.
    """
    predictor, version = predictor_of(path, threads, {} if device is None else {"device": device})
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)
    model = Served(predictor)
    for preprocessor in model.preprocessors.values():
        if preprocessor.form == "image":
            most = min(preprocessor.spec.max_megapixels, max_megapixels)
            preprocessor.spec = dataclasses.replace(preprocessor.spec, max_megapixels=most)
    return Loaded(model, version)


def predictor_of(path: str | Path, threads: int, options: dict[str, Any]) -> tuple[RawPredictor, str]:
    """A predictor, and its version. torch is imported for runs alone."""
    if is_hub_name(path):
        from fusion.deploy.hub import model_folder
        from fusion.predictor import Predictor

        folder = model_folder(str(path))
        name = str(path).removeprefix(SCHEME).partition("@")[0]
        return Predictor.from_file(folder, trusted=(), **options), f"{name}-{digest_of(folder)[:8]}"
    path = Path(path).expanduser()
    if not path.exists():
        raise UserError(f"there is no run or package {path}")
    if is_package(path):
        from fusion.packages.package import Package

        package = Package.load(path, threads=threads, **options)
        return package, f"{name_of(path)}-{package.version[:8]}"
    from fusion.predictor import Predictor

    return Predictor.load(path, **options), f"{name_of(path)}-{digest_of(path)[:8]}"


def name_of(path: Path) -> str:
    """The name of a model's folder; of a run that of the run's, of a file that of the file.

    >>> name_of(Path("runs/shoes/2026-01-01/model")), name_of(Path("packages/shoes")), name_of(Path("best.ckpt"))
    ('2026-01-01', 'shoes', 'best')
    """
    path = path.resolve()
    return path.parent.name if path.name == "model" else path.stem if path.suffix == ".ckpt" else path.name


def digest_of(path: Path) -> str:
    """The digest of a run's model: of its files, with their names."""
    folder = path / "model" if (path / "model").is_dir() else path
    if folder.is_dir() and not (folder / "model.json").is_file():  # a run that was not validated has checkpoints alone
        folder = folder / "checkpoints"
    digest = hashlib.sha256()
    for file in sorted(one for one in folder.rglob("*") if one.is_file()) if folder.is_dir() else [folder]:
        with open(file, "rb") as content:
            digest.update(f"{file.name}\0".encode() + hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


def bound_embedded_images(max_megapixels: float) -> None:
    """Bounds images inside other files (ICO, ICNS) in this process, whose size the outer headers don't say: Pillow rejects them beyond
    twice its limit."""
    Image.MAX_IMAGE_PIXELS = max(int(max_megapixels * 1e6 / 2), 1)


class Concurrency(NamedTuple):
    """How work is spread. runs: batches at once. threads: of one batch. pool: threads that preprocess and run batches."""

    runs: int
    threads: int
    pool: int


def concurrency(runs: int | None = None, threads: int | None = None, pool: int | None = None, *, gpu: bool = False) -> Concurrency:
    """The given numbers, and the best for this machine where they are None.

    On a CPU one batch for each core, up to 4: batches side by side use cores better than the threads of one batch, which wait for each
    other at every layer. On a GPU one batch at once.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    runs = runs or (1 if gpu else min(cores, 4))
    return Concurrency(runs, threads or max(cores // runs, 1), pool or min(max(cores, runs, 2), 8))


def has_gpu() -> bool:
    """Whether runs are loaded to a GPU; False where torch is not installed."""
    try:
        import torch
    except ImportError:
        return False
    return bool(torch.cuda.is_available())
