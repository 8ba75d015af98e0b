"""The interface of a model that can be served, and how one is loaded: a run, a model's folder, a checkpoint or an exported package."""

import dataclasses
import hashlib
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

import fusion
from fusion.errors import UserError


class Preprocessor(Protocol):
    """Converts one input's raw values to what the model reads.

    noun: "image", "text" or "table".
    """

    noun: str

    def raw(self, values: Any, name: str) -> list[Any]:
        """Cells, one for each sample, from raw values; None for a missing one. Raises UserError."""

    def batch(self, cells: list[Any], unreadable: dict[int, UserError]) -> Any:
        """The model's input for these cells: a NamedTuple of arrays or tensors; errors of unreadable ones go to `unreadable` by position."""


class Predictions(Protocol):
    """Predictions of N samples. answers: of each sample. values: (N, K). names: of the K, where they have any. present: by input, (N,)."""

    answers: list[Any]
    values: np.ndarray
    names: list[str]
    present: dict[str, np.ndarray]


class Model(Protocol):
    """A trained model: `run` a batch of inputs by name, `gather` its outputs into predictions.

    modalities: names of the inputs. preprocessors: of each input.
    """

    @property
    def modalities(self) -> list[str]: ...

    @property
    def preprocessors(self) -> Mapping[str, Any]: ...

    def run(self, inputs: Mapping[str, Any]) -> Any: ...

    def gather(self, outputs: Iterable[Any]) -> Any: ...


class OfRun:
    """The predictor of a run, as a Model."""

    def __init__(self, predictor: Any) -> None:
        self.modalities: list[str] = predictor.modalities
        self.preprocessors: Mapping[str, Any] = predictor.processor.inputs
        self.run, self.gather = predictor.run, predictor.gather


class Loaded(NamedTuple):
    """A model and its version: the name of its folder, and the digest of its files."""

    model: Model
    version: str


def load(path: str | Path, *, threads: int, max_megapixels: float) -> Loaded:
    """Load a model for serving. Raises UserError for anything but a run or a package.

    path: a run, a model's folder, a checkpoint or a package. threads: of one call of the model. max_megapixels: larger images are rejected;
    a lower limit of the model's own is kept.
    """
    path = Path(path).expanduser()
    version = version_of(path)
    predictor: Any = fusion.load(str(path))
    model: Model = predictor if hasattr(predictor, "preprocessors") else OfRun(predictor)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)
    for preprocessor in model.preprocessors.values():
        spec = getattr(preprocessor, "spec", None)
        if hasattr(spec, "max_megapixels"):
            preprocessor.spec = dataclasses.replace(spec, max_megapixels=min(spec.max_megapixels, max_megapixels))
    return Loaded(model, version)


class Concurrency(NamedTuple):
    """How work is spread. runs: batches at once. threads: of one batch. pool: threads that preprocess and run batches."""

    runs: int
    threads: int
    pool: int


def concurrency(runs: int | None = None, threads: int | None = None, pool: int | None = None, *, gpu: bool = False) -> Concurrency:
    """The given numbers, and the best for this machine where they are None.

    On a CPU one batch for each core, up to 4: batches side by side use cores better than the threads of one batch, which wait for each other
    at every layer. On a GPU one batch at once.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    runs = runs or (1 if gpu else min(cores, 4))
    return Concurrency(runs, threads or max(cores // runs, 1), pool or min(max(cores, runs, 2), 8))


def version_of(path: Path) -> str:
    """A model's version: the name of its folder, and 8 digits of the digest of its files. Raises UserError where there are none."""
    if not path.exists():
        raise UserError(f"there is no run or package {path}")
    folder = path / "model" if (path / "model").is_dir() else path
    files = sorted(one for one in folder.rglob("*") if one.is_file()) if folder.is_dir() else [folder]
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as content:
            digest.update(f"{file.relative_to(folder)}\0".encode() + hashlib.file_digest(content, "sha256").digest())
    named = path.resolve()
    name = named.parent.name if named.name == "model" else named.stem if named.is_file() else named.name
    return f"{name}-{digest.hexdigest()[:8]}"


def has_gpu() -> bool:
    """Whether runs are loaded to a GPU; False where torch is not installed."""
    try:
        import torch
    except ImportError:
        return False
    return bool(torch.cuda.is_available())
