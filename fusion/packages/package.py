"""A package: an exported model, ready to be asked."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fusion.errors import UserError, nearest
from fusion.packages.folder import PROCESSOR, is_package, read_about, read_json, read_text, verify
from fusion.packages.runtimes import RUNTIMES, Runtime
from fusion.predictions import Output, RawPredictor
from fusion.processing.answers import Answering, answering_of
from fusion.processing.image import ImagePreprocessor
from fusion.processing.preprocessor import Arrays, Preprocessor
from fusion.processing.table import TablePreprocessor
from fusion.processing.text import TextPreprocessor

PREPROCESSORS: dict[str, type[Preprocessor]] = {one.form: one for one in (ImagePreprocessor, TextPreprocessor, TablePreprocessor)}


class Package(RawPredictor):
    """An exported model that answers raw samples like the run it was exported from.

    Args:
        runtime: runs the model.
        preprocessors: of the inputs, by name, in the model's order.
        answering: makes answers of values.
        about: the package's description: run, scores, versions, parity.
        version: identifies its content.
    """

    def __init__(
        self,
        runtime: Runtime,
        preprocessors: Mapping[str, Preprocessor],
        answering: Answering,
        about: Mapping[str, Any],
        version: str = "",
    ) -> None:
        self.runtime, self.about, self.version = runtime, dict(about), version
        self._preprocessors, self._answering = dict(preprocessors), answering

    @classmethod
    def load(cls, folder: str | Path, *, threads: int | None = None, device: str = "cpu") -> "Package":
        """Loads a package, verifying its checksums, which find accidents, not intent.

        A package of onnx has no code but its graph. Those of torch and aot are code, as torch.export and AOTInductor load them: only load
        what comes from somebody you trust.

        Args:
            folder: the package.
            threads: number of threads of one run; None for one per core.
            device: "cpu" or "cuda"; of aot, "cpu".

        Raises UserError for a folder that isn't a package, was altered, or is of another version, and for a runtime that isn't installed.
        """
        path = Path(folder).expanduser()
        if not is_package(path):
            raise UserError(f"{path} is not a package; make one by: fusion export --run RUN --to onnx --out {path}")
        about = read_about(path)
        version = verify(path)
        target = str(about.get("to"))
        if target not in RUNTIMES:
            raise UserError(f"{path} was exported to '{target}'. {nearest(target, RUNTIMES)}")
        processor = read_json(path / PROCESSOR)
        preprocessors = {name: preprocessor_of(path, state) for name, state in processor["inputs"].items()}
        runtime = RUNTIMES[target](path / RUNTIMES[target].file, about["graph_inputs"], threads, device)
        return cls(runtime, preprocessors, answering_of(processor["answers"]), about, version)

    @property
    def preprocessors(self) -> Mapping[str, Preprocessor]:
        return self._preprocessors

    @property
    def answering(self) -> Answering:
        return self._answering

    @property
    def width(self) -> int:
        return int(self.about["width"])

    def run(self, inputs: Mapping[str, Any]) -> Output:
        """Returns the values (B, K) that the task scores and presence by modality, for a batch of arrays."""
        values = self.runtime(flat_arrays({name: inputs[name] for name in self.modalities}))
        return np.asarray(values), {name: np.asarray(arrays.present) for name, arrays in inputs.items()}

    def predict_batch(self, columns: Mapping[str, Sequence[Any]], unreadable: dict[int, tuple[str, UserError]] | None = None) -> Output:
        columns = dict(columns)
        for name, preprocessor in self.preprocessors.items():
            if isinstance(preprocessor, ImagePreprocessor) and preprocessor.max_images == 1:
                for i, cell in enumerate(columns[name]):
                    if isinstance(cell, tuple):
                        error = UserError("there are several images, but the run had one in every sample")
                        if unreadable is None:
                            raise error
                        unreadable.setdefault(i, (name, error))
                columns[name] = [None if isinstance(cell, tuple) else cell for cell in columns[name]]
        return super().predict_batch(columns, unreadable)


def flat_arrays(inputs: Mapping[str, Arrays]) -> dict[str, np.ndarray]:
    """The graph's inputs, named by input and field: image_pixels, text_ids, ... What follows from others is not among them."""
    named = {}
    for name, arrays in inputs.items():
        of_several = getattr(arrays, "image_index", None) is not None
        for field, array in zip(arrays._fields, arrays, strict=True):
            if array is not None and not (of_several and field == "present"):
                named[f"{name}_{field}"] = array
    return named


def preprocessor_of(folder: Path, state: Mapping[str, Any]) -> Preprocessor:
    """The preprocessor of a state; a text's tokenizer is in a file of its own."""
    form = str(state.get("form"))
    if form not in PREPROCESSORS:
        raise UserError(f"{folder / PROCESSOR} has an input of kind '{form}'. {nearest(form, PREPROCESSORS)}")
    own = {key: value for key, value in state.items() if key != "form"}
    if "tokenizer_file" in own:
        file = own.pop("tokenizer_file")
        if Path(file).name != file:  # elsewhere
            raise UserError(f"{folder / PROCESSOR} has the tokenizer {file}; expected a file of the package")
        own["tokenizer"] = own["tokenizer"] | {"backend": read_text(folder / file)}
    return PREPROCESSORS[form].of_state(own)
