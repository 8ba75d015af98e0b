"""Images of samples as arrays."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Self

import numpy as np

from fusion.errors import UserError
from fusion.processing.images import FileOrBytes, ImageSpec, decoded
from fusion.processing.preprocessor import ImageArrays, Preprocessor
from fusion.processing.raw_columns import image_column


class ImagePreprocessor(Preprocessor):
    """Decodes and resizes images.

    Args:
        spec: their size and how they are resized.
        max_images: largest number of images of a sample; above 1, batches have `image_index` and `image_mask`.
    """

    form = "image"

    def __init__(self, spec: ImageSpec, max_images: int = 1) -> None:
        self.spec, self.max_images = spec, max_images

    def raw(self, values: Any, name: str) -> list[Any]:
        return image_column(values, name)

    def batch(self, cells: Sequence[Any], unreadable: dict[int, UserError]) -> ImageArrays:
        flat = [(i, one) for i, cell in enumerate(cells) for one in (cell if isinstance(cell, tuple) else (cell,))]
        pixels = np.zeros((max(len(flat), 1), self.spec.channels, *self.spec.size), dtype=np.uint8)
        for position, image in enumerate(decoded([one for _, one in flat], self.spec)):
            if isinstance(image, np.ndarray):
                pixels[position] = image
            elif image is not None:
                unreadable.setdefault(flat[position][0], image)
        present = np.array([cell is not None for cell in cells], dtype=bool)
        if self.max_images == 1 and len(flat) == len(cells):
            return ImageArrays(pixels, present)
        index = np.full((len(cells), max((len(images_in(cell)) for cell in cells), default=1) or 1), -1, dtype=np.int64)
        counts = [0] * len(cells)
        for position, (i, one) in enumerate(flat):
            if one is not None:
                index[i, counts[i]] = position
                counts[i] += 1
        return ImageArrays(pixels, present, index.clip(min=0), index >= 0)

    def concat(self, parts: Sequence[ImageArrays]) -> ImageArrays:
        pixels, present = np.concatenate([part.pixels for part in parts]), np.concatenate([part.present for part in parts])
        if all(part.image_index is None for part in parts):
            return ImageArrays(pixels, present)
        width = max(1 if part.image_index is None else part.image_index.shape[1] for part in parts)
        index, shown = np.zeros((len(present), width), dtype=np.int64), np.zeros((len(present), width), dtype=bool)
        row = first = 0
        for part in parts:
            own = np.arange(len(part.present))[:, None] if part.image_index is None else part.image_index
            own_shown = part.present[:, None] if part.image_mask is None else part.image_mask
            index[row : row + len(own), : own.shape[1]] = own + first
            shown[row : row + len(own), : own.shape[1]] = own_shown
            row, first = row + len(own), first + len(part.pixels)
        return ImageArrays(pixels, present, index, shown)

    def state(self) -> dict[str, Any]:
        return {"spec": asdict(self.spec) | {"size": list(self.spec.size)}, "max_images": self.max_images}

    @classmethod
    def of_state(cls, state: dict[str, Any]) -> Self:
        return cls(ImageSpec(**state["spec"] | {"size": tuple(state["spec"]["size"])}), state.get("max_images", 1))


def images_in(cell: Any) -> tuple[FileOrBytes, ...]:
    """The images of a cell: none, one, or several."""
    return cell if isinstance(cell, tuple) else () if cell is None else (cell,)
