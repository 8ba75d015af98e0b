"""Samples in memory or on disk, and the batches made of them."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fusion.data.images import ImageError, Source, decode, resize
from fusion.data.processor import ImageSpec
from fusion.data.sampler import PLACEHOLDER, Draw
from fusion.data.tokenizer import TokenStore
from fusion.encoders import Images, Texts
from fusion.errors import UserError


class Batch(NamedTuple):
    """What a step gets: inputs by modality; target (B,) int64, the class; row (B,) int64 in the split, -1 where not to be counted.

    update_target (G,) int64: the classes of all samples of the update, of which a training batch holds this rank's share of one
    accumulation step. Every rank knows them, since batches are drawn alike everywhere: a weighted mean needs no exchange.
    """

    inputs: dict[str, Images | Texts]
    target: Tensor
    row: Tensor
    update_target: Tensor | None = None


class Augment(Protocol):
    """What changes a training image: takes and gives uint8 (3, H, W)."""

    def __call__(self, pixels: Tensor) -> Tensor: ...


class ImageStore:
    """The distinct images of a manifest, decoded and resized once: kept in memory as uint8 (U, 3, H, W), or read from their files.

    paths: the distinct image files; pixels: their decoded pixels, or None when they are too many for memory.
    """

    def __init__(self, paths: Sequence[str], spec: ImageSpec, pixels: Tensor | None = None) -> None:
        self.paths, self.spec, self.pixels = paths, spec, pixels

    def batch(self, rows: np.ndarray, augment: Augment | None = None) -> Images:
        """The images of these rows, -1 meaning none: each distinct picture once (augmented, if asked), and which of them a sample shows."""
        distinct, picture = np.unique(rows[rows >= 0], return_inverse=True)
        shown = np.zeros(len(rows), dtype=np.int64)
        shown[rows >= 0] = picture
        pixels = torch.zeros(max(len(distinct), 1), 3, *self.spec.size, dtype=torch.uint8)
        if self.pixels is not None and len(distinct):
            pixels = self.pixels[torch.from_numpy(distinct)]
        elif len(distinct):
            pixels = torch.from_numpy(np.stack([self.load(self.paths[row]) for row in distinct.tolist()]))
        if augment is not None:
            pixels = torch.stack([augment(one) for one in pixels])
        return Images(pixels, torch.from_numpy(rows >= 0), torch.from_numpy(shown), len(distinct) > 0, bool((rows >= 0).all()))

    def load(self, path: str) -> np.ndarray:
        """Raises UserError for a file that has become unreadable since all were checked."""
        try:
            return load_image(path, self.spec)
        except ImageError as error:
            raise UserError(
                f"{path}: {error}; it could be read when the images were checked. Put it back and go on by --resume, or start anew, "
                "which lists its samples in data_issues.csv"
            ) from error


class Samples(Dataset[Batch]):
    """One split, ready to be cut into batches; a Draw of indices gives a whole Batch at once.

    images: the store and, for each sample, its row there or -1; texts likewise in a TokenStore with one text a sample.
    """

    def __init__(
        self,
        *,
        target: np.ndarray,
        images: tuple[ImageStore, np.ndarray] | None = None,
        texts: tuple[TokenStore, int] | None = None,
        augment: Augment | None = None,
    ) -> None:
        self.target, self.images, self.texts, self.augment = target, images, texts, augment

    def __len__(self) -> int:
        return len(self.target)

    def as_they_are(self) -> "Samples":
        """The same without augmentation."""
        return Samples(target=self.target, images=self.images, texts=self.texts)

    def blocks(self) -> np.ndarray:
        """(len,) a number for each sample, alike for samples that show the same image; those without one stand alone."""
        rows = np.full(len(self), -1) if self.images is None else self.images[1]
        alone = np.where(rows < 0, np.arange(len(self)) + rows.max() + 1, rows)
        return np.unique(alone, return_inverse=True)[1]

    def __getitem__(self, index: int) -> Batch:
        return self.__getitems__(Draw([index], 0))

    def __getitems__(self, draw: Draw) -> Batch:
        index = np.asarray(draw.indices)
        rows = np.where(index == PLACEHOLDER, 0, index)
        inputs: dict[str, Images | Texts] = {}
        if self.images is not None:
            store, row_of = self.images
            # Augmentation depends on nothing but the draw's seed: neither on the worker nor on what came before.
            with torch.random.fork_rng(devices=[]) if self.augment else nullcontext():
                if self.augment:
                    torch.manual_seed(draw.seed)
                inputs["image"] = store.batch(row_of[rows], self.augment)
        if self.texts is not None:
            tokens, pad_id = self.texts
            inputs["text"] = tokens.batch(rows, pad_id)
        of_update = torch.from_numpy(self.target[np.asarray(draw.update)]) if len(draw.update) else None
        return Batch(inputs, torch.from_numpy(self.target[rows]), torch.from_numpy(index), of_update)


def load_image(source: Source, spec: ImageSpec) -> np.ndarray:
    """One image as uint8 (3, H, W). Raises ImageError with the reason."""
    picture = decode(source, max_megapixels=spec.max_megapixels, at_least=spec.size)
    return resize(picture, spec.size, spec.resize, interpolation=spec.interpolation)


def as_is(batch: Any) -> Any:
    """Samples give whole batches; there is nothing left to collate."""
    return batch
