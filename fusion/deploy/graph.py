"""The graph that is exported: flat tensors in, values out; and batches to trace and check it with."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim

from fusion.errors import UserError
from fusion.inputs import Columns, Images, Texts
from fusion.model import FusionModel
from fusion.packages.package import flat_arrays
from fusion.processing.image import ImagePreprocessor
from fusion.processing.preprocessor import Arrays, ImageArrays, Preprocessor, TableArrays, TextArrays
from fusion.processing.table import TablePreprocessor
from fusion.processing.text import TextPreprocessor
from fusion.tasks import Task

TRACED_SAMPLES, TRACED_TOKENS = 6, 5  # of the traced batch: two numbers that few widths of models equal
SIZES = (1, 2, 7)  # numbers of samples with which a graph is checked


class Graph(nn.Module):
    """A model with its task's values as a function of tensors: normalisation, encoders, head, probabilities.

    Args:
        model: in eval mode.
        task: converts the head's output to values.
        preprocessors: of the inputs, by name, in the model's order.
    """

    def __init__(self, model: FusionModel, task: Task, preprocessors: Mapping[str, Preprocessor]) -> None:
        super().__init__()
        self.model, self.task, self.preprocessors = model.eval(), task, dict(preprocessors)
        example = example_batch(self.preprocessors, 1, np.random.default_rng(0))
        self.names = list(flat_arrays(example))
        self.fields = {name: [key.removeprefix(f"{name}_") for key in flat_arrays({name: arrays})] for name, arrays in example.items()}

    def forward(self, *tensors: Tensor) -> Tensor:
        """Returns the values (B, K) float32. tensors: those of all inputs, in the order of `names`."""
        named = dict(zip(self.names, tensors, strict=True))
        inputs = {}
        for name, preprocessor in self.preprocessors.items():
            inputs[name] = encoder_input(preprocessor, {field: named[f"{name}_{field}"] for field in self.fields[name]})
        return self.task.values(self.model(inputs).output)

    def trace_inputs(self) -> tuple[tuple[Tensor, ...], tuple[dict[int, Any], ...]]:
        """Tensors to trace with, and their dynamic dimensions: samples, images, tokens."""
        batch = example_batch(self.preprocessors, TRACED_SAMPLES, np.random.default_rng(0))
        samples = Dim("samples", min=1)
        dynamic: list[dict[int, Any]] = []
        for name, arrays in batch.items():
            if isinstance(arrays, ImageArrays) and arrays.image_index is not None:
                images, positions = Dim(f"{name}_images", min=1), Dim(f"{name}_positions", min=1)
                dynamic += [{0: images}, {0: samples, 1: positions}, {0: samples, 1: positions}]
            elif isinstance(arrays, TextArrays):
                preprocessor = self.preprocessors[name]
                assert isinstance(preprocessor, TextPreprocessor)
                longest = preprocessor.tokenizer.max_length
                tokens = {1: Dim(f"{name}_tokens", min=1, max=longest)} if longest > 1 else {}
                dynamic += [{0: samples, **tokens}] * 2
            else:
                dynamic += [{0: samples}] * len([one for one in arrays if one is not None])
        return tuple(torch.from_numpy(array) for array in flat_arrays(batch).values()), tuple(dynamic)


def encoder_input(preprocessor: Preprocessor, tensors: Mapping[str, Tensor]) -> Any:
    """The encoder's input from the tensors of a preprocessor's arrays. Nothing is said of which samples have it, since a graph is made for
    any."""
    if isinstance(preprocessor, ImagePreprocessor):
        if "image_index" not in tensors:
            return Images(tensors["pixels"], tensors["present"])
        mask = tensors["image_mask"]
        return Images(tensors["pixels"], mask.any(dim=1), tensors["image_index"], image_mask=mask)
    if isinstance(preprocessor, TextPreprocessor):
        return Texts(tensors["ids"], tensors["mask"])
    if isinstance(preprocessor, TablePreprocessor):
        return Columns(tensors["numbers"], tensors["categories"], tensors["mask"])
    raise UserError(f"an input of {type(preprocessor).__name__} can't be exported")


def example_batch(
    preprocessors: Mapping[str, Preprocessor], count: int, rng: np.random.Generator, present: Mapping[str, Sequence[bool]] | None = None
) -> dict[str, Arrays]:
    """A random batch of `count` samples. present: by input, which of them have it; all by default."""
    batch: dict[str, Arrays] = {}
    for name, preprocessor in preprocessors.items():
        has = np.ones(count, dtype=bool) if present is None else np.array(present[name], dtype=bool)
        if isinstance(preprocessor, ImagePreprocessor):
            batch[name] = example_images(preprocessor, has, rng)
        elif isinstance(preprocessor, TextPreprocessor):
            tokenizer = preprocessor.tokenizer
            lengths = rng.integers(1, min(tokenizer.max_length, TRACED_TOKENS) + 1, count) * has
            # The longest of an example has as many tokens as possible, whatever is missing.
            mask = np.arange(min(tokenizer.max_length, TRACED_TOKENS)) < lengths[:, None]
            ids = np.where(mask, rng.integers(0, tokenizer.id_limit, mask.shape), tokenizer.pad_id)
            batch[name] = TextArrays(ids.astype(np.int64), mask)
        elif isinstance(preprocessor, TablePreprocessor):
            batch[name] = example_rows(preprocessor, has, rng)
        else:
            raise UserError(f"input '{name}' of {type(preprocessor).__name__} can't be exported")
    return batch


def example_images(preprocessor: ImagePreprocessor, has: np.ndarray, rng: np.random.Generator) -> ImageArrays:
    shape = (preprocessor.spec.channels, *preprocessor.spec.size)
    if preprocessor.max_images == 1:
        pixels = rng.integers(0, 256, (len(has), *shape), dtype=np.uint8)
        pixels[~has] = 0
        return ImageArrays(pixels, has)
    positions = 2
    mask = (np.arange(positions) < rng.integers(1, positions + 1, len(has))[:, None]) & has[:, None]
    index = np.zeros(mask.shape, dtype=np.int64)
    index[mask] = np.arange(mask.sum())
    return ImageArrays(rng.integers(0, 256, (max(int(mask.sum()), 1), *shape), dtype=np.uint8), has, index, mask)


def example_rows(preprocessor: TablePreprocessor, has: np.ndarray, rng: np.random.Generator) -> TableArrays:
    numbers = rng.standard_normal((len(has), len(preprocessor.scales))).astype(np.float32)
    sizes = [len(known) + 1 for known in preprocessor.known.values()]
    categories = np.stack([rng.integers(0, size, len(has)) for size in sizes], axis=1) if sizes else np.zeros((len(has), 0))
    width = numbers.shape[1] + len(sizes)
    mask = (rng.random((len(has), width)) < 0.7) & has[:, None]
    mask[has, rng.integers(0, width)] = True  # a row that is there has at least one cell
    return TableArrays(numbers * mask[:, : numbers.shape[1]], (categories * mask[:, numbers.shape[1] :]).astype(np.int64), mask)


def checked_batches(preprocessors: Mapping[str, Preprocessor], seed: int = 1) -> Iterator[tuple[str, dict[str, Arrays]]]:
    """Batches with every pattern of missing inputs, each with a name: all patterns side by side, each in a batch of its own, in batches of
    several sizes. In the first batch every input is missing in some sample, in some of the others in all samples."""
    rng, names = np.random.default_rng(seed), list(preprocessors)
    patterns = [pattern for pattern in product([True, False], repeat=len(names)) if any(pattern)]
    order = [patterns[i] for i in rng.permutation(len(patterns))]
    yield "all patterns", example_batch(preprocessors, len(order), rng, dict(zip(names, zip(*order, strict=True), strict=True)))
    for i, pattern in enumerate(patterns):
        size = SIZES[i % len(SIZES)]
        present = {name: [there] * size for name, there in zip(names, pattern, strict=True)}
        missing = [name for name, there in zip(names, pattern, strict=True) if not there]
        what = f"{size} samples without {' and '.join(missing)}" if missing else f"{size} samples with all inputs"
        yield what, example_batch(preprocessors, size, rng, present)
    for size in SIZES:
        yield f"{size} samples with all inputs", example_batch(preprocessors, size, rng)
