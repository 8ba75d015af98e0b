"""Pictures: one a sample, or several."""

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict
from hashlib import blake2b
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fusion.data.cells import RawColumn, as_texts
from fusion.data.column import Column
from fusion.data.image_check import check_images, digest_of, shared_file
from fusion.data.image_paths import PECULIAR, Located, bytes_or_path, locate, odd_paths
from fusion.data.images import FileOrBytes, ImageError, ImageSpec, Resize, decoded, load_image
from fusion.data.kinds.base import Checking, Defaults, Kind, Reading, Store
from fusion.data.raw_columns import image_column
from fusion.encoders import Encoder, Images
from fusion.errors import UserError

MOST = 8  # pictures of a sample
MAYBE_LIST = r"^[^\x21-\x7e]*\["  # RE2
MOST_SHOWN = 5


class Augment(Protocol):
    """What changes a training image: takes and gives uint8 (3, H, W)."""

    def __call__(self, pixels: Tensor) -> Tensor: ...


class ImageInput(Kind):
    """A picture, or several of one sample.

    A cell is a path from the manifest's folder (also absolute, with ~, or file://), a picture's bytes or a struct of `bytes` and `path` in
    Parquet (as Hugging Face's datasets write), or a list of these: a JSON list in a text file, of at most 8. Samples that show the same
    picture share its pixels and what an encoder makes of them.

    Args:
        column: of the manifest.
        resize: "squash" pictures to the encoder's size, "crop" their middle, or "pad" them. None: data.resize.
        max_megapixels: larger pictures are rejected unopened. None: data.max_megapixels.
    """

    noun = "image"
    takes = Images
    spec: ImageSpec
    augment: Augment | None = None  # of the data that it belongs to

    def __init__(self, column: str = "image", resize: Resize | None = None, max_megapixels: float | None = None) -> None:
        self.column, self.resize, self.max_megapixels = column, resize, max_megapixels
        self.most = 1  # pictures of a sample
        self.sources: list[FileOrBytes] = []  # the distinct pictures
        self.pixels: Tensor | None = None  # theirs, where there is room in memory
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

    # Cells: None, a path (absolute), bytes, or a tuple of these.

    def read(self, columns: Mapping[str, RawColumn], reading: Reading) -> Sequence[Any]:
        cells = columns[self.column]
        if isinstance(cells, list) and set(map(type, cells)) <= {str, type(None)}:
            cells = Column.of(cells)
        if isinstance(cells, Column) and not cells.touched(MAYBE_LIST).any():
            return self.located(as_texts(self.column, cells, reading.nulls, reading.bad, is_path=True), reading)
        # Every picture a place of its own, then back into samples.
        owners, flat = [], []
        for i, cell in enumerate(cells):
            pictures = pictures_of(cell)
            if pictures is None:
                reading.bad.setdefault(i, f"column {self.column} holds an object, expected paths or pictures")
            elif len(pictures) > MOST:
                reading.bad.setdefault(i, f"column {self.column} has {len(pictures)} images, at most {MOST} are read")
            else:
                owners += [i] * len(pictures)
                flat += pictures
        of_owner = Reading(reading.path, [reading.rows[i] for i in owners], reading.nulls)
        paths = as_texts(self.column, [None if isinstance(one, bytes) else one for one in flat], reading.nulls, of_owner.bad, is_path=True)
        found = self.located(paths, of_owner)
        reading.notes += of_owner.notes
        for place, reason in of_owner.bad.items():
            reading.bad.setdefault(owners[place], reason)
        samples: list[list[FileOrBytes]] = [[] for _ in cells]
        for owner, one, path in zip(owners, flat, found, strict=True):
            picture = one if isinstance(one, bytes) else path
            if picture is not None:
                samples[owner].append(picture)
        return [tuple(sample) if len(sample) > 1 else sample[0] if sample else None for sample in samples]

    def located(self, paths: Column[str | None], reading: Reading) -> Column[str | None]:
        """Absolute paths, odd ones corrected where only so there is a file."""
        folder = os.path.dirname(os.path.abspath(reading.path))
        peculiar = paths.touched(PECULIAR)
        odd = {cell: locate(cell, folder) for cell in odd_paths(paths.take(np.flatnonzero(peculiar)))}
        if odd:
            reading.notes += notes_of_paths(reading.path, reading.rows, [odd.get(cell or "") for cell in paths])
            for i, cell in enumerate(paths):
                if cell in odd and odd[cell].missing:
                    reading.bad.setdefault(i, f"image missing: {odd[cell].missing}")

        def place(cell: str) -> str | None:
            return odd[cell].path if cell in odd else os.path.join(folder, cell) if cell.strip() else None

        placed = paths.map(place, touches=peculiar)
        return placed.prefixed(os.path.join(folder, ""), where=~(peculiar | placed.touched("^/")))

    def check(self, cells: Sequence[Any], encoder: Encoder, checking: Checking) -> dict[int, str]:
        size = getattr(encoder, "image_size", (224, 224))
        interpolation = getattr(encoder, "data_config", {}).get("interpolation", "bicubic")
        self.spec = ImageSpec(size, self.resize or "squash", interpolation, self.max_megapixels or 100.0)
        self.most = max((len(several(cell)) for cell in cells), default=1) or 1
        self.sources = sorted({one for cell in cells for one in several(cell)}, key=lambda one: (isinstance(one, bytes), one))
        self.pixels, bad, self.digests = check_images(
            self.sources, self.spec, memory_gib=checking.memory_gib, cache=checking.cache, shared=checking.shared
        )
        if self.pixels is not None:  # of all inputs together
            checking.memory_gib -= self.pixels.numel() / 2**30
        if checking.shared and self.pixels is not None:
            checking.leftovers.append(shared_file(self.sources, self.spec, checking.cache))
        if not bad:
            return {}
        first = [(i, next((one for one in several(cell) if one in bad), None)) for i, cell in enumerate(cells)]
        return {i: image_issue(bad[one], one) for i, one in first if one is not None}

    def learn(self, cells: Sequence[Any], encoder: Encoder) -> None:
        """Nothing."""

    def store(self, cells: Sequence[Any], *, training: bool) -> Store:
        row_of = {source: row for row, source in enumerate(self.sources)}
        if self.most == 1:
            rows = np.array([-1 if cell is None else row_of[cell] for cell in cells], dtype=np.int64)
        else:
            rows = np.full((len(cells), self.most), -1, dtype=np.int64)
            for i, cell in enumerate(cells):
                rows[i, : len(several(cell))] = [row_of[one] for one in several(cell)]
        return ShownImages(ImageStore(self.sources, self.spec, self.pixels), rows, self.augment if training else None)

    def local(self, cell: Any, folder: str) -> str | None:
        if cell is None:
            return None
        named = [
            blake2b(one, digest_size=12).hexdigest() if isinstance(one, bytes) else os.path.abspath(one).removeprefix(folder)
            for one in several(cell)
        ]
        return named[0] if len(named) == 1 else json.dumps(named)

    def digest(self, cell: Any) -> str:
        found = [self.digests.get(one, "") for one in several(cell)]
        return "+".join(found) if found and all(found) else ""

    def digests_now(self, cells: Iterable[Any]) -> dict[Any, str]:
        found = {}
        for cell in cells:
            with suppress(ImageError):
                found[cell] = "+".join(digest_of(one) for one in several(cell))
        return found

    def raw(self, values: Any, name: str) -> list[Any]:
        return image_column(values, name)

    def batch(self, cells: Sequence[Any], unreadable: dict[int, UserError]) -> Images:
        flat = [(i, one) for i, cell in enumerate(cells) for one in (cell if isinstance(cell, tuple) else (cell,))]
        pixels = torch.zeros(max(len(flat), 1), 3, *self.spec.size, dtype=torch.uint8)
        for place, found in enumerate(decoded([one for _, one in flat], self.spec)):
            if isinstance(found, np.ndarray):
                pixels[place] = torch.from_numpy(found)
            elif found is not None:
                unreadable.setdefault(flat[place][0], found)
        there = [cell is not None for cell in cells]
        present = torch.tensor(there, dtype=torch.bool)
        if len(flat) == len(cells):
            return Images(pixels, present, anyone=any(there), everyone=all(there))
        places = np.full((len(cells), max(len(several(cell)) for cell in cells)), -1, dtype=np.int64)
        taken = [0] * len(cells)
        for place, (i, one) in enumerate(flat):
            if one is not None:
                places[i, taken[i]] = place
                taken[i] += 1
        shown = torch.from_numpy(places >= 0)
        return Images(pixels, present, torch.from_numpy(places.clip(min=0)), any(there), bool(shown.all()), shown)

    def learnt(self) -> dict[str, Any]:
        return {"spec": asdict(self.spec) | {"size": list(self.spec.size)}}

    def set_learnt(self, learnt: dict[str, Any]) -> None:
        self.spec = ImageSpec(**learnt["spec"] | {"size": tuple(learnt["spec"]["size"])})

    def differences(self, then: dict[str, Any]) -> Iterator[str]:
        now = self.learnt()["spec"]
        if then["spec"] != now:
            yield f"images are made {now} where they were made {then['spec']}"


class ImageStore:
    """Distinct pictures, decoded and resized once: kept in memory as uint8 (U, 3, H, W), or read from their files.

    sources: their files or bytes; pixels: their decoded pixels, or None when they are too many for memory.
    """

    def __init__(self, sources: Sequence[FileOrBytes], spec: ImageSpec, pixels: Tensor | None = None) -> None:
        self.sources, self.spec, self.pixels = sources, spec, pixels

    def batch(self, rows: np.ndarray, augment: Augment | None = None) -> Images:
        """The pictures of these rows (B,) or (B, P), -1 meaning none: each distinct one once (augmented, if asked), and which of them a
        sample shows."""
        distinct, picture = np.unique(rows[rows >= 0], return_inverse=True)
        which = np.zeros(rows.shape, dtype=np.int64)
        which[rows >= 0] = picture
        pixels = torch.zeros(max(len(distinct), 1), 3, *self.spec.size, dtype=torch.uint8)
        if self.pixels is not None and len(distinct):
            pixels = self.pixels[torch.from_numpy(distinct)]
        elif len(distinct):
            pixels = torch.from_numpy(np.stack([self.load(self.sources[row]) for row in distinct.tolist()]))
        if augment is not None:
            pixels = torch.stack([augment(one) for one in pixels])
        shown = torch.from_numpy(rows >= 0)
        present, several = (shown, None) if rows.ndim == 1 else (shown.any(dim=1), shown)
        return Images(pixels, present, torch.from_numpy(which), len(distinct) > 0, bool((rows >= 0).all()), several)

    def load(self, source: FileOrBytes) -> np.ndarray:
        """Raises UserError for a file that has become unreadable since all were checked."""
        try:
            return load_image(source, self.spec)
        except ImageError as error:
            raise UserError(
                f"{source!s:.200}: {error}; it could be read when the images were checked. Put it back and go on by --resume, or start "
                "anew, which lists its samples in data_issues.csv"
            ) from error


class ShownImages:
    """The pictures that the samples of one split show: rows (n,) or (n, P) in the store, -1 for none."""

    def __init__(self, images: ImageStore, rows: np.ndarray, augment: Augment | None = None) -> None:
        self.images, self.rows, self.augment = images, rows, augment
        self.in_memory, self.random, self.notes = images.pixels is not None, augment is not None, list[str]()

    def batch(self, samples: np.ndarray, seed: int) -> Images:
        # Augmentation depends on nothing but the draw's seed: neither on the worker nor on what came before.
        with torch.random.fork_rng(devices=[]) if self.augment else nullcontext():
            if self.augment:
                torch.manual_seed(seed)
            return self.images.batch(self.rows[samples], self.augment)

    def plain(self) -> "ShownImages":
        return ShownImages(self.images, self.rows)

    def sizes(self) -> np.ndarray | None:
        return None

    def distinct(self) -> np.ndarray | None:
        if self.rows.ndim == 1:
            return self.rows
        number = np.unique(self.rows, axis=0, return_inverse=True)[1].reshape(-1)
        return np.where((self.rows >= 0).any(axis=1), number, -1)


def several(cell: Any) -> tuple[FileOrBytes, ...]:
    """The pictures of a cell."""
    return cell if isinstance(cell, tuple) else () if cell is None else (cell,)


def pictures_of(cell: Any) -> list[Any] | None:
    """The pictures of a manifest's cell: paths and bytes; None for what is neither."""
    if isinstance(cell, str) and cell.lstrip().startswith("["):
        with suppress(ValueError, RecursionError):
            cell = json.loads(cell)
    found = []
    for one in cell if isinstance(cell, list | tuple) else [cell]:
        if isinstance(one, dict):
            if not one.keys() <= {"bytes", "path"}:
                return None
            one = bytes_or_path(one)
        if isinstance(one, list):
            return None
        found.append(one)
    return found


def image_issue(reason: str, source: FileOrBytes) -> str:
    """How the list of issues says it: what sort of issue, then which file and why."""
    where = f"{len(source):,} bytes" if isinstance(source, bytes) else source
    return f"image missing: {where}" if reason == "missing" else f"image corrupt: {reason} ({where})"


def notes_of_paths(path: str, rows: Sequence[int], located: Sequence[Located | None]) -> list[str]:
    corrected: dict[str, list[int]] = defaultdict(list)
    for row, image in zip(rows, located, strict=True):
        if image is not None and image.corrected:
            corrected[image.corrected].append(row)
    shown = {what: ", ".join(map(str, found[:MOST_SHOWN])) for what, found in corrected.items()}
    more = {what: f", ... ({len(found) - MOST_SHOWN:,} more)" if len(found) > MOST_SHOWN else "" for what, found in corrected.items()}
    return [
        f"{path}: {len(found):,} paths of images are written with {what}, which was corrected (rows {shown[what]}{more[what]})"
        for what, found in corrected.items()
    ]
