"""Image inputs: one or several images per sample."""

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from hashlib import blake2b
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fusion.data.cells import RawColumn, as_texts
from fusion.data.column import Column
from fusion.data.image_check import check_images, digest_of, shared_file
from fusion.data.kinds.base import Checking, Defaults, Kind, Reading, Store
from fusion.encoders import Encoder, Images
from fusion.errors import UserError
from fusion.processing.image import ImagePreprocessor, images_in
from fusion.processing.image_paths import PECULIAR, Located, bytes_or_path, locate, odd_paths
from fusion.processing.images import FileOrBytes, ImageError, ImageSpec, Resize, load_image
from fusion.processing.preprocessor import ImageArrays

MAX_IMAGES = 8  # of a sample
MAYBE_LIST = r"^[^\x21-\x7e]*\["  # a cell that may be a JSON list; as RE2 reads it
MAX_SHOWN = 5


class Augment(Protocol):
    """An augmentation of a training image: maps uint8 (C, H, W) to uint8 (C, H, W); C is 3 unless the input has other channels."""

    def __call__(self, pixels: Tensor) -> Tensor: ...


class ImageInput(Kind):
    """One or several images per sample.

    A cell is a path relative to the manifest's folder (or absolute, with ~, or file://), an image's bytes or a struct of `bytes` and `path`
    in Parquet (as Hugging Face's datasets write), or a list of at most 8 of these (in a text file a JSON list). Samples that show the same
    image share its pixels and its encoding.

    Args:
        column: name of the manifest's column.
        resize: "squash" images to the encoder's size, "crop" their centre, or "pad" them. None: data.resize.
        max_megapixels: larger images are rejected without decoding. None: data.max_megapixels.
        channels: 3 is RGB, with transparency over white; 1 greyscale; 4 RGBA, of files that have alpha; any number is that of arrays
            (H, W, C) in .npy files. Other than 3 and 1, a file of another number of channels is unusable. The encoder must read as many.
    """

    noun = "image"
    takes = Images
    spec: ImageSpec
    augment: Augment | None = None  # set from the data's settings

    def __init__(self, column: str = "image", resize: Resize | None = None, max_megapixels: float | None = None, channels: int = 3) -> None:
        if channels < 1:
            raise UserError(f"ImageInput: channels is {channels}; expected at least 1")
        self.column, self.resize, self.max_megapixels, self.channels = column, resize, max_megapixels, channels
        self.max_images = 1  # largest number of images of a sample
        self.sources: list[FileOrBytes] = []  # the distinct images
        self.pixels: Tensor | None = None  # of the distinct images, if they fit into memory
        self.digests: dict[FileOrBytes, str] = {}

    def complete(self, defaults: Defaults) -> None:
        self.resize, self.max_megapixels = self.resize or defaults.resize, self.max_megapixels or defaults.max_megapixels
        self.augment = torch.nn.Sequential(*defaults.augment) if defaults.augment else None

    @property
    def columns(self) -> list[str]:
        return [self.column]

    @property
    def rich_columns(self) -> list[str]:
        return [self.column]

    # Cells: None, an absolute path, bytes, or a tuple of these

    def read(self, columns: Mapping[str, RawColumn], reading: Reading) -> Sequence[Any]:
        cells = columns[self.column]
        if isinstance(cells, list) and set(map(type, cells)) <= {str, type(None)}:
            cells = Column.of(cells)
        if isinstance(cells, Column) and not cells.touched(MAYBE_LIST).any():
            return self.located(as_texts(self.column, cells, reading.nulls, reading.bad, is_path=True), reading)
        # One entry per image in flat lists, regrouped by sample afterwards.
        owners, flat = [], []
        for i, cell in enumerate(cells):
            images = raw_images(cell)
            if images is None:
                reading.bad.setdefault(i, f"column {self.column} holds an object, expected paths or images")
            elif len(images) > MAX_IMAGES:
                reading.bad.setdefault(i, f"column {self.column} has {len(images)} images, expected at most {MAX_IMAGES}")
            else:
                owners += [i] * len(images)
                flat += images
        of_owner = Reading(reading.path, [reading.rows[i] for i in owners], reading.nulls)
        paths = as_texts(self.column, [None if isinstance(one, bytes) else one for one in flat], reading.nulls, of_owner.bad, is_path=True)
        located = self.located(paths, of_owner)
        reading.notes += of_owner.notes
        for position, reason in of_owner.bad.items():
            reading.bad.setdefault(owners[position], reason)
        samples: list[list[FileOrBytes]] = [[] for _ in cells]
        for owner, one, path in zip(owners, flat, located, strict=True):
            image = one if isinstance(one, bytes) else path
            if image is not None:
                samples[owner].append(image)
        return [tuple(sample) if len(sample) > 1 else sample[0] if sample else None for sample in samples]

    def located(self, paths: Column[str | None], reading: Reading) -> Column[str | None]:
        """Absolute paths; an oddly written one is corrected where only the corrected path exists."""
        folder = os.path.dirname(os.path.abspath(reading.path))
        peculiar = paths.touched(PECULIAR)
        odd = {cell: locate(cell, folder) for cell in odd_paths(paths.take(np.flatnonzero(peculiar)))}
        if odd:
            reading.notes += notes_of_paths(reading.path, reading.rows, [odd.get(cell or "") for cell in paths])
            for i, cell in enumerate(paths):
                if cell in odd and odd[cell].missing:
                    reading.bad.setdefault(i, f"image missing: {odd[cell].missing}")

        def absolute(cell: str) -> str | None:
            return odd[cell].path if cell in odd else os.path.join(folder, cell) if cell.strip() else None

        resolved = paths.map(absolute, touches=peculiar)
        return resolved.prefixed(os.path.join(folder, ""), where=~(peculiar | resolved.touched("^/")))

    def check(self, cells: Sequence[Any], encoder: Encoder, checking: Checking) -> dict[int, str]:
        size = getattr(encoder, "image_size", (224, 224))
        own = getattr(encoder, "data_config", {})
        resize, interpolation = self.resize or own.get("resize", "squash"), own.get("interpolation", "bicubic")
        self.spec = ImageSpec(size, resize, interpolation, self.max_megapixels or 100.0, self.channels)
        readable = getattr(encoder, "readable_channels", (3,))
        if self.channels not in readable:
            raise UserError(
                f"{self.option}: images of {self.channels} channels, but their encoder reads {' or '.join(map(str, readable))}; set the "
                f"input's channels={readable[0]}, or a timm encoder's options={{in_chans: {self.channels}}}"
            )
        self.max_images = max((len(images_in(cell)) for cell in cells), default=1) or 1
        self.sources = sorted({one for cell in cells for one in images_in(cell)}, key=lambda one: (isinstance(one, bytes), one))
        self.pixels, bad, self.digests = check_images(
            self.sources, self.spec, memory_gib=checking.memory_gib, cache=checking.cache, shared=checking.shared
        )
        if self.pixels is not None:  # the limit is on all inputs together
            checking.memory_gib -= self.pixels.numel() / 2**30
        if checking.shared and self.pixels is not None:
            checking.leftovers.append(shared_file(self.sources, self.spec, checking.cache))
        if not bad:
            return {}
        first = [(i, next((one for one in images_in(cell) if one in bad), None)) for i, cell in enumerate(cells)]
        return {i: image_issue(bad[one], one) for i, one in first if one is not None}

    def learn(self, cells: Sequence[Any], encoder: Encoder) -> None:
        """Nothing to fit."""

    def store(self, cells: Sequence[Any], *, training: bool) -> Store:
        index_of = {source: i for i, source in enumerate(self.sources)}
        if self.max_images == 1:
            index = np.array([-1 if cell is None else index_of[cell] for cell in cells], dtype=np.int64)
        else:
            index = np.full((len(cells), self.max_images), -1, dtype=np.int64)
            for i, cell in enumerate(cells):
                index[i, : len(images_in(cell))] = [index_of[one] for one in images_in(cell)]
        return ShownImages(ImageStore(self.sources, self.spec, self.pixels), index, self.augment if training else None)

    def local(self, cell: Any, folder: str) -> str | None:
        if cell is None:
            return None
        named = [
            blake2b(one, digest_size=12).hexdigest() if isinstance(one, bytes) else os.path.abspath(one).removeprefix(folder)
            for one in images_in(cell)
        ]
        return named[0] if len(named) == 1 else json.dumps(named)

    def digest(self, cell: Any) -> str:
        digests = [self.digests.get(one, "") for one in images_in(cell)]
        return "+".join(digests) if digests and all(digests) else ""

    def digests_now(self, cells: Iterable[Any]) -> dict[Any, str]:
        digests = {}
        for cell in cells:
            with suppress(ImageError):
                digests[cell] = "+".join(digest_of(one) for one in images_in(cell))
        return digests

    def raw(self, values: Any, name: str) -> list[Any]:
        return self.preprocessor().raw(values, name)

    def batch(self, cells: Sequence[Any], unreadable: dict[int, UserError]) -> Images:
        return images_of(self.preprocessor().batch(cells, unreadable))

    def preprocessor(self) -> ImagePreprocessor:
        return ImagePreprocessor(self.spec, self.max_images)

    def learnt(self) -> dict[str, Any]:
        return self.preprocessor().state()

    def set_learnt(self, learnt: dict[str, Any]) -> None:
        preprocessor = ImagePreprocessor.of_state(learnt)
        self.spec, self.max_images = preprocessor.spec, preprocessor.max_images

    def differences(self, then: dict[str, Any]) -> Iterator[str]:
        now = self.learnt()["spec"]
        if {"channels": 3} | then["spec"] != now:
            yield f"images are preprocessed by {now}, were by {then['spec']}"


class ImageStore:
    """Distinct images, decoded and resized: held in memory as uint8 (U, C, H, W), or read from their files for each batch.

    sources: their files or bytes. pixels: their decoded pixels, or None if they don't fit into memory.
    """

    def __init__(self, sources: Sequence[FileOrBytes], spec: ImageSpec, pixels: Tensor | None = None) -> None:
        self.sources, self.spec, self.pixels = sources, spec, pixels

    def batch(self, index: np.ndarray, augment: Augment | None = None) -> Images:
        """The images with these indices (B,) or (B, P), -1 for none: each distinct one once (augmented if `augment` is given), and the
        index into them for each sample."""
        distinct, inverse = np.unique(index[index >= 0], return_inverse=True)
        which = np.zeros(index.shape, dtype=np.int64)
        which[index >= 0] = inverse
        pixels = torch.zeros(max(len(distinct), 1), self.spec.channels, *self.spec.size, dtype=torch.uint8)
        if self.pixels is not None and len(distinct):
            pixels = self.pixels[torch.from_numpy(distinct)]
        elif len(distinct):
            pixels = torch.from_numpy(np.stack([self.load(self.sources[i]) for i in distinct.tolist()]))
        if augment is not None:
            pixels = torch.stack([augment(one) for one in pixels])
        shown = torch.from_numpy(index >= 0)
        present, several = (shown, None) if index.ndim == 1 else (shown.any(dim=1), shown)
        return Images(pixels, present, torch.from_numpy(which), len(distinct) > 0, bool((index >= 0).all()), several)

    def load(self, source: FileOrBytes) -> np.ndarray:
        """The pixels of one image. Raises UserError for a file that has become unreadable since the images were checked."""
        try:
            return load_image(source, self.spec)
        except ImageError as error:
            raise UserError(
                f"{source!s:.200}: {error}; it was readable when the images were checked. Restore it and continue by --resume, "
                "or start a new run, which lists its samples in data_issues.csv"
            ) from error


class ShownImages:
    """The images of one split's samples: indices (n,) or (n, P) into an ImageStore, -1 for none."""

    def __init__(self, images: ImageStore, index: np.ndarray, augment: Augment | None = None) -> None:
        self.images, self.index, self.augment = images, index, augment
        self.in_memory, self.random, self.notes = images.pixels is not None, augment is not None, list[str]()

    def batch(self, samples: np.ndarray, seed: int) -> Images:
        # Augmentation depends only on the draw's seed, not on the worker or on earlier batches.
        with torch.random.fork_rng(devices=[]) if self.augment else nullcontext():
            if self.augment:
                torch.manual_seed(seed)
            return self.images.batch(self.index[samples], self.augment)

    def unaugmented(self) -> "ShownImages":
        return ShownImages(self.images, self.index)

    def sizes(self) -> np.ndarray | None:
        return None

    def distinct(self) -> np.ndarray | None:
        if self.index.ndim == 1:
            return self.index
        combination = np.unique(self.index, axis=0, return_inverse=True)[1].reshape(-1)
        return np.where((self.index >= 0).any(axis=1), combination, -1)


def images_of(arrays: ImageArrays) -> Images:
    """The encoder's input from arrays."""
    pixels, present = torch.from_numpy(arrays.pixels), torch.from_numpy(arrays.present)
    anyone, everyone = bool(arrays.present.any()), bool(arrays.present.all())
    if arrays.image_index is None or arrays.image_mask is None:
        return Images(pixels, present, any_present=anyone, all_present=everyone)
    index, mask = torch.from_numpy(arrays.image_index), torch.from_numpy(arrays.image_mask)
    return Images(pixels, present, index, anyone, bool(arrays.image_mask.all()), mask)


def raw_images(cell: Any) -> list[Any] | None:
    """The images of a manifest's cell as paths or bytes; None where it holds something else."""
    if isinstance(cell, str) and cell.lstrip().startswith("["):
        with suppress(ValueError, RecursionError):
            cell = json.loads(cell)
    images = []
    for one in cell if isinstance(cell, list | tuple) else [cell]:
        if isinstance(one, dict):
            if not one.keys() <= {"bytes", "path"}:
                return None
            one = bytes_or_path(one)
        if isinstance(one, list):
            return None
        images.append(one)
    return images


def image_issue(reason: str, source: FileOrBytes) -> str:
    """The reason as data_issues.csv lists it: the category of the issue, then the file and the details."""
    where = f"{len(source):,} bytes" if isinstance(source, bytes) else source
    return f"image missing: {where}" if reason == "missing" else f"image corrupt: {reason} ({where})"


def notes_of_paths(path: str, rows: Sequence[int], located: Sequence[Located | None]) -> list[str]:
    """One note for each way in which paths were oddly written and corrected, with the first rows."""
    corrected: dict[str, list[int]] = defaultdict(list)
    for row, image in zip(rows, located, strict=True):
        if image is not None and image.corrected:
            corrected[image.corrected].append(row)
    shown = {what: ", ".join(map(str, lines[:MAX_SHOWN])) for what, lines in corrected.items()}
    more = {what: f", ... ({len(lines) - MAX_SHOWN:,} more)" if len(lines) > MAX_SHOWN else "" for what, lines in corrected.items()}
    return [
        f"{path}: {len(lines):,} paths of images are written with {what}, which was corrected (rows {shown[what]}{more[what]})"
        for what, lines in corrected.items()
    ]
